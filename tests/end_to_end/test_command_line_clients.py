"""curl and the REPL against a real server, as the README shows them."""

import json
import shutil
import subprocess
import sys

import pytest
from server_process import ServerProcess


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    result = subprocess.run(["curl", "-sS", "-N", *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def chat_body(**fields: object) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **fields})


def test_curl_gets_a_whole_reply(server: ServerProcess) -> None:
    arguments = ["-H", "Content-Type: application/json", "-d", chat_body(), f"{server.url}/v1/chat/completions"]
    reply = json.loads(curl(*arguments))
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"]["content"]
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_curl_gets_a_stream_that_says_the_same(server: ServerProcess) -> None:
    url = f"{server.url}/v1/chat/completions"
    header = ["-H", "Content-Type: application/json"]
    whole = json.loads(curl(*header, "-d", chat_body(), url))
    stream = curl(*header, "-d", chat_body(stream=True, stream_options={"include_usage": True}), url)
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    content = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert content == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_text_piped_into_the_repl_is_answered_on_stdout(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "lmdserve.clients.api_client", server.url]
    result = subprocess.run(command, input="Hello\n", capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "\x1b" not in result.stdout


def test_the_repl_says_where_it_found_nobody() -> None:
    command = [sys.executable, "-m", "lmdserve.clients.api_client", "http://127.0.0.1:9"]
    result = subprocess.run(command, input="Hello\n", capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


def test_lmdserve_chat_answers_without_a_server() -> None:
    command = [sys.executable, "-m", "lmdserve", "chat", "demo"]
    result = subprocess.run(command, input="Hello\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
