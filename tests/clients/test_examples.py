"""The scripts in examples/ run as they are, against a scripted server."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="a source distribution has no examples")


async def run(server: Any, name: str) -> str:
    """Return what the script prints; it must succeed."""
    program = ["bash"] if name.endswith(".sh") else [sys.executable]
    process = await asyncio.create_subprocess_exec(
        *program,
        str(EXAMPLES / name),
        env=os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, errors.decode()) == (0, "")
    return out.decode()


def whole_reply(**message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": None} | message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "demo", "choices": [choice], "usage": usage}
    return json.dumps(reply).encode()


async def test_chat(fake_server: Any) -> None:
    fake_server.raw(whole_reply(content="从前有一只狐狸。"), content_type="application/json")
    assert (await run(fake_server, "chat.py")).startswith("从前有一只狐狸。\n")
    assert fake_server.bodies[0]["messages"][1]["content"] == "帮我讲述一个关于狐狸和西瓜的小故事"
    assert (fake_server.bodies[0]["temperature"], fake_server.bodies[0]["top_p"]) == (0.8, 0.8)


async def test_stream(fake_server: Any) -> None:
    fake_server.say("Once ", "upon ", "a time")
    assert await run(fake_server, "stream.py") == "Once upon a time\n3 tokens\n"


async def test_function_call(fake_server: Any) -> None:
    for name, arguments in (("add", '{"a": 3, "b": 5}'), ("mul", '{"a": 8, "b": 2}')):
        call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
        fake_server.raw(whole_reply(tool_calls=[call]), content_type="application/json")
    assert await run(fake_server, "function_call.py") == (
        'add({"a": 3, "b": 5}): 3+5=8\nmul({"a": 8, "b": 2}): 8*2=16\n'
    )
    messages = fake_server.bodies[1]["messages"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "add"
    assert messages[2]["role"] == "environment"
    assert (messages[2]["content"], messages[2]["name"]) == ("3+5=8", "plugin")


async def test_agent(fake_server: Any) -> None:
    for name, arguments in (("add", '{"a": 3, "b": 5}'), ("mul", '{"a": 8, "b": 2}')):
        call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
        fake_server.raw(whole_reply(tool_calls=[call]), content_type="application/json")
    fake_server.raw(whole_reply(content="It is 16."), content_type="application/json")
    shown = await run(fake_server, "agent.py")
    assert shown.endswith("It is 16.\n")
    results = [message["content"] for message in fake_server.bodies[2]["messages"] if message["role"] == "tool"]
    assert results == ["8", "16"]
    assert [tool["function"]["name"] for tool in fake_server.bodies[0]["tools"]] == ["add", "mul"]


async def test_many_at_once(fake_server: Any) -> None:
    fake_server.raw(whole_reply(content="1. Sleep"), content_type="application/json")
    assert (await run(fake_server, "many_at_once.py")).count("1. Sleep") == 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl(fake_server: Any) -> None:
    fake_server.raw(whole_reply(content="1. Plan"), content_type="application/json")
    fake_server.say("1. ", "Plan")
    whole, stream = (await run(fake_server, "chat.sh")).split("\n", 1)
    assert json.loads(whole)["choices"][0]["message"]["content"] == "1. Plan"
    assert stream.endswith("data: [DONE]\n\n")
    assert [body.get("stream") for body in fake_server.bodies] == [None, True]
    assert fake_server.bodies[1]["messages"] == fake_server.bodies[0]["messages"]


def test_every_example_is_short_and_has_a_test() -> None:
    for path in EXAMPLES.iterdir():
        assert 10 <= len(path.read_text(encoding="utf-8").splitlines()) <= 26, path
        assert f'run(fake_server, "{path.name}")' in Path(__file__).read_text(encoding="utf-8")
