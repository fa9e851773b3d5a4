"""The command itself: as a process in a pipe, and as a process on a terminal of its own."""

import asyncio
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lmdserve.clients import api_client

COMMAND = [sys.executable, "-m", "lmdserve.clients.api_client"]
PROMPT = "\x1b[?2004h"  # each prompt begins by asking the terminal to mark pasted text
# A terminal of one's own: a session leader whose controlling terminal is its standard input.
ON_A_TERMINAL = """
import fcntl, os, runpy, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv = sys.argv[1:]
runpy.run_module("lmdserve.clients.api_client", run_name="__main__")
"""


async def pipe(*arguments: str, message: bytes = b"hi\n", **environment: str) -> tuple[int, str, str]:
    """Run the command on `message` and return its status, output and errors."""
    keep = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=keep | environment,
    )
    out, errors = await asyncio.wait_for(process.communicate(message), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


async def test_a_pipe_gets_the_answer_and_nothing_else(fake_server: Any) -> None:
    fake_server.say("你好", ", \x1b[1mworld")
    assert await pipe(fake_server.url) == (0, "你好, \x1b[1mworld\n", "")
    assert fake_server.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]


async def test_all_of_the_input_is_one_message_and_options_count(fake_server: Any) -> None:
    fake_server.say("ends with a line feed\n")
    arguments = ["--model", "other", "--system", "S", "--param", "temperature=0", "--param", 'stop=["a b"]']
    result = await pipe(
        f"{fake_server.url}/v1/",
        *arguments,
        message="一\n\n/reset\n".encode(),
        LMDSERVE_API_KEY="k1",
        OPENAI_API_KEY="k2",
    )
    assert result == (0, "ends with a line feed\n", "")
    body = fake_server.bodies[0]
    assert (body["model"], body["temperature"], body["stop"]) == ("other", 0, ["a b"])
    assert body["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "一\n\n/reset"}]
    assert set(fake_server.authorizations) == {"Bearer k1"}


async def test_tool_calls_are_lines_of_json(fake_server: Any, tmp_path: Path) -> None:
    tools_path = tmp_path / "tools.json"
    tools_path.write_text('[{"name": "add"}]')
    fake_server.call(("add", ['{"a": ', "3}"]), ("now", []))
    status, out, errors = await pipe(fake_server.url, "--tools", str(tools_path))
    assert (status, errors) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"name": "add", "arguments": {"a": 3}},
        {"name": "now", "arguments": {}},
    ]


async def test_an_error_in_mid_answer_is_status_1(fake_server: Any) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    fake_server.stream([chunk, {"error": {"message": "the engine died"}}], ends="break")
    assert await pipe(fake_server.url) == (1, "half\n", "api_client: error while answering: the engine died\n")


@pytest.mark.parametrize(
    ("arguments", "message", "status", "expected"),
    [
        (["127.0.0.1:1"], b"hi", 1, "api_client: cannot connect to http://127.0.0.1:1 (Connection refused)"),
        (["127.0.0.1:1"], b" \n", 1, "api_client: standard input holds no message"),
        (["ftp://x"], b"hi", 2, "'ftp://x' is not the address of an HTTP server"),
        (["--param", "temprature=1"], b"hi", 2, "did you mean 'temperature'?"),
        (["--nonsense"], b"hi", 2, "unrecognized arguments: --nonsense"),
    ],
)
async def test_an_error_is_one_sentence_on_standard_error(
    arguments: list[str], message: bytes, status: int, expected: str
) -> None:
    returned, out, errors = await pipe(*arguments, message=message)
    assert (returned, out) == (status, "")
    assert expected in errors
    assert "Traceback" not in errors


async def test_a_reader_that_leaves_stops_the_answer_quietly(fake_server: Any) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 100}, "finish_reason": None}]}
    fake_server.stream([chunk] * 1000, pause_s=0.01)
    line = f"echo hi | {' '.join(COMMAND)} {fake_server.url} | head -c 10"
    process = await asyncio.create_subprocess_shell(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = await asyncio.wait_for(process.communicate(), 30)
    assert (out, errors) == (b"x" * 10, b"")
    await asyncio.wait_for(fake_server.was_left.wait(), 5)


class Terminal:
    """The command on a pseudo-terminal: what it shows, and a keyboard."""

    def __init__(self, url: str, home: Path) -> None:
        self._ours, theirs = pty.openpty()
        os.set_blocking(self._ours, False)
        environment = os.environ | {"HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment.pop("XDG_STATE_HOME", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, "api_client", url],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    async def wait_for(self, text: str) -> None:
        """Wait until `text` is shown after what was waited for before."""
        deadline = time.monotonic() + 20
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            self._look()
            await asyncio.sleep(0.02)
        self.shown = self.shown.partition(text)[2]

    async def wait_for_exit(self) -> int:
        async with asyncio.timeout(20):
            while self.process.poll() is None:
                self._look()
                await asyncio.sleep(0.02)
        return self.process.returncode

    def _look(self) -> None:
        try:
            self.shown += os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # nothing to read, or the other end is closed
            return

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
async def terminal(fake_server: Any, tmp_path: Path) -> AsyncIterator[Terminal]:
    opened = Terminal(fake_server.url, tmp_path)
    yield opened
    opened.close()


async def test_ctrl_c_on_a_terminal_stops_the_answer_and_ctrl_d_the_program(
    terminal: Terminal, fake_server: Any, tmp_path: Path
) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "once upon"}, "finish_reason": None}]}
    fake_server.stream([chunk], ends="hang")
    fake_server.say("the end")
    await terminal.wait_for("Ctrl-D leaves")
    terminal.press("tell\r")
    await terminal.wait_for("once upon")
    terminal.press("\x03")
    await terminal.wait_for("stopped")
    await asyncio.wait_for(fake_server.was_left.wait(), 5)
    await terminal.wait_for(PROMPT)
    terminal.press("go on\r")
    await terminal.wait_for("the end")
    await terminal.wait_for(PROMPT)
    terminal.press("\x03")
    await terminal.wait_for(PROMPT)
    terminal.press("\x04")
    assert await terminal.wait_for_exit() == 0
    assert [message["content"] for message in fake_server.bodies[1]["messages"]] == ["tell", "once upon", "go on"]
    assert "+go on" in (tmp_path / ".local/state/lmdserve/history").read_text()


def test_ctrl_c_while_modules_are_imported_is_quiet() -> None:
    program = (
        "import builtins, os, signal, sys\n"
        "from lmdserve.clients.api_client import main\n"
        "load = builtins.__import__\n"
        "def importing(name, *args):\n"
        "    if name == 'aiohttp':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return load(name, *args)\n"
        "builtins.__import__ = importing\n"
        "sys.exit(main([]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (api_client.EXIT_INTERRUPTED, "")


def test_help_needs_no_heavy_import() -> None:
    """`--help` in under 0.3 s: aiohttp, rich and prompt_toolkit cost more than that together."""
    code = "import atexit, sys; from lmdserve.clients.api_client import main; "
    code += "atexit.register(lambda: print(*sys.modules)); main(['--help'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30).stdout
    assert "usage: api_client" in out
    modules = set(out.splitlines()[-1].split())
    assert not modules & {"aiohttp", "rich", "prompt_toolkit", "torch", "asyncio"}


def test_a_key_of_the_environment_is_not_shown_in_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "top-secret")
    with pytest.raises(SystemExit):
        api_client.main(["--help"])
    assert "top-secret" not in capsys.readouterr().out
