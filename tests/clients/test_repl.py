"""The REPL, typed at through a pipe and talking to a scripted server."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lmdserve.clients.http import AsyncClient
from lmdserve.clients.options import ReplOptions
from lmdserve.clients.repl import run_repl

ENTER, NEW_LINE, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"
TOOLS = [{"name": "add", "description": "Add two numbers", "parameters": {"type": "object"}}, {"name": "mul"}]


async def talk(server: Any, keys: str, **options: Any) -> int:
    """Type `keys` and then Ctrl-D; return the exit status."""
    async with AsyncClient(server.url, silence_timeout_s=5) as client:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys + CTRL_D)
            return await asyncio.wait_for(run_repl(client, options=ReplOptions(**options)), 20)


def sent(server: Any) -> list[list[tuple[str, Any]]]:
    """Return role and content of the messages of each request."""
    return [[(message["role"], message["content"]) for message in body["messages"]] for body in server.bodies]


async def test_a_conversation_grows_with_each_turn(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.say("你好", "，世界")
    fake_server.say("Second answer")
    assert await talk(fake_server, f"hi{ENTER}more{ENTER}") == 0
    assert sent(fake_server) == [
        [("user", "hi")],
        [("user", "hi"), ("assistant", "你好，世界"), ("user", "more")],
    ]
    shown = capsys.readouterr().out
    assert "demo at http://127.0.0.1:" in shown
    assert "你好，世界\n2 tokens · " in shown
    assert "Second answer\n1 tokens · first token after " in shown
    assert "prompt 11 tokens (4 cached)" in shown


async def test_options_are_sent_with_every_request(fake_server: Any, tmp_path: Path) -> None:
    tools_path = tmp_path / "tools.json"
    tools_path.write_text(json.dumps(TOOLS))
    fake_server.say("x")
    options = {"model": "other", "system": "Be brief.", "params": {"temperature": 0.8}, "tools_path": tools_path}
    await talk(fake_server, f"a{ENTER}b{ENTER}", **options)
    for body in fake_server.bodies:
        assert (body["model"], body["temperature"]) == ("other", 0.8)
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert body["tools"] == [{"type": "function", "function": tool} for tool in TOOLS]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (f"one{NEW_LINE}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f'"""{ENTER}def f():{ENTER}    return 1{ENTER}"""{ENTER}', "def f():\n    return 1"),
        (f'"""one line"""{ENTER}', "one line"),
        (f'say """{ENTER}', 'say """'),
        ("\x1b[200~pasted \\\nlines\n\x1b[201~" + ENTER, "pasted \\\nlines\n"),
        (f"//etc is a folder{ENTER}", "/etc is a folder"),
        (f"forget this{CTRL_C}send this{ENTER}", "send this"),
        (f"   {ENTER}{ENTER}x{ENTER}", "x"),
    ],
)
async def test_a_message_of_several_lines(fake_server: Any, keys: str, message: str) -> None:
    fake_server.say("ok")
    await talk(fake_server, keys)
    assert sent(fake_server) == [[("user", message)]]


async def test_history_is_kept_for_the_owner_only_and_recalled(fake_server: Any, tmp_path: Path) -> None:
    fake_server.say("ok")
    history_path = tmp_path / "state" / "history"
    await talk(fake_server, f"first{NEW_LINE}line{ENTER}", history_path=history_path)
    await talk(fake_server, f"\x1b[A{ENTER}", history_path=history_path)
    assert sent(fake_server)[1] == [("user", "first\nline")]
    assert history_path.stat().st_mode & 0o777 == 0o600


async def test_a_history_that_cannot_be_kept_is_told_and_does_no_harm(
    fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    fake_server.say("ok")
    assert await talk(fake_server, f"hi{ENTER}", history_path=tmp_path / "file" / "history") == 0
    assert "typed lines will not be remembered" in capsys.readouterr().out
    assert len(fake_server.bodies) == 1


async def test_tool_results_are_asked_for_and_sent_until_the_model_answers(
    fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools_path = tmp_path / "tools.json"
    tools_path.write_text(json.dumps(TOOLS))
    fake_server.call(("add", ['{"a": 3,', ' "b": 5}']))
    fake_server.call(("mul", ['{"a": 8, "b": 2}']))
    fake_server.say("16")
    await talk(fake_server, f"Compute (3+5)*2{ENTER}8{ENTER}16{ENTER}", tools_path=tools_path)
    last = fake_server.bodies[-1]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "tool", "assistant", "tool"]
    assert last[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 3, "b": 5}'}
    assert last[2] == {"role": "tool", "tool_call_id": "call_0", "content": "8"}
    assert last[4]["content"] == "16"
    shown = capsys.readouterr().out
    assert '▸ add({"a": 3, "b": 5})\n' in shown
    assert '▸ mul({"a": 8, "b": 2})\n' in shown


async def test_calls_that_are_not_run_are_answered_all_the_same(fake_server: Any) -> None:
    """A conversation with an unanswered call is refused by servers that follow OpenAI's rules."""
    fake_server.call(("add", ["{}"]), ("mul", ["{}"]))
    fake_server.say("ok")
    await talk(fake_server, f"go{ENTER}{ENTER}{CTRL_C}next{ENTER}")
    assert sent(fake_server)[1] == [
        ("user", "go"),
        ("assistant", None),
        ("tool", "not run"),
        ("tool", "not run"),
        ("user", "next"),
    ]


async def test_one_result_of_two_lets_the_model_go_on(fake_server: Any) -> None:
    fake_server.call(("add", ["{}"]), ("mul", ["{}"]))
    fake_server.say("ok")
    await talk(fake_server, f"go{ENTER}{ENTER}5{ENTER}")
    assert sent(fake_server)[1][2:] == [("tool", "not run"), ("tool", "5")]


async def test_a_call_with_broken_arguments_is_no_call(fake_server: Any) -> None:
    fake_server.call(("add", ['{"a": ']))
    fake_server.say("ok")
    await talk(fake_server, f"go{ENTER}next{ENTER}")
    assert sent(fake_server)[1] == [("user", "next")]


async def test_control_characters_of_a_model_do_not_reach_the_terminal(
    fake_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.say("a\x1b]0;owned\x07b\x9b2Jc\r\n[bold]d[/bold]\te")
    await talk(fake_server, f"hi{ENTER}")
    shown = capsys.readouterr().out
    assert "a␛]0;owned␇b�2Jc\n[bold]d[/bold]\te\n" in shown
    assert not any(character in shown for character in "\x1b\x07\x9b\r")


async def interrupt_when(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def content(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


async def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    fake_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.stream([content("The begin"), content("ning")], ends="hang")
    fake_server.say("ok")
    handler = signal.getsignal(signal.SIGINT)
    shown: list[str] = []

    def is_shown() -> bool:
        shown.append(capsys.readouterr().out)
        return "The beginning" in "".join(shown)

    interrupter = asyncio.create_task(interrupt_when(is_shown))
    assert await talk(fake_server, f"tell{ENTER}go on{ENTER}") == 0
    await interrupter
    await asyncio.wait_for(fake_server.was_left.wait(), 5)
    assert sent(fake_server)[1] == [("user", "tell"), ("assistant", "The beginning"), ("user", "go on")]
    assert "stopped\n" in "".join(shown) + capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


async def test_ctrl_c_before_the_first_word_takes_the_turn_back(fake_server: Any) -> None:
    fake_server.stream([], ends="hang")
    fake_server.say("ok")
    interrupter = asyncio.create_task(interrupt_when(lambda: bool(fake_server.bodies)))
    await talk(fake_server, f"tell{ENTER}again{ENTER}")
    await interrupter
    assert sent(fake_server)[1] == [("user", "again")]


async def test_a_stopped_tool_call_is_not_kept(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}
    fake_server.stream([content("I will add."), chunk], ends="hang")
    fake_server.say("ok")
    shown: list[str] = []

    def is_shown() -> bool:
        shown.append(capsys.readouterr().out)
        return "add({}" in "".join(shown)

    interrupter = asyncio.create_task(interrupt_when(is_shown))
    await talk(fake_server, f"tell{ENTER}next{ENTER}")
    await interrupter
    assert sent(fake_server)[1] == [("user", "tell"), ("assistant", "I will add."), ("user", "next")]
    assert "tool_calls" not in fake_server.bodies[1]["messages"][1]


@pytest.mark.parametrize("is_in_stream", [False, True])
async def test_an_error_takes_the_turn_back_and_the_talk_goes_on(
    fake_server: Any, capsys: pytest.CaptureFixture[str], is_in_stream: bool
) -> None:
    error = {"message": "no room", "param": "messages"}
    if is_in_stream:
        fake_server.stream([content("half"), {"error": error}], ends="break")
    else:
        fake_server.refuse(400, error)
    fake_server.say("ok")
    assert await talk(fake_server, f"one{ENTER}two{ENTER}") == 0
    assert sent(fake_server)[1] == [("user", "two")]
    shown = capsys.readouterr().out
    assert "no room (field: messages)" in shown
    assert "not part of the conversation" in shown


async def test_an_answer_that_was_cut_off_is_kept_and_told(
    fake_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.say("half an ans", finish_reason="length")
    await talk(fake_server, f"hi{ENTER}more{ENTER}")
    assert sent(fake_server)[1][1] == ("assistant", "half an ans")
    assert "cut off at the token limit" in capsys.readouterr().out


async def test_nobody_there_is_one_sentence_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        assert await run_repl(client, options=ReplOptions()) == 1
    assert capsys.readouterr().out.startswith("error: cannot connect to http://127.0.0.1:1 (Connection refused)")


async def test_an_unknown_model_is_status_1_with_what_there_is(
    fake_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await talk(fake_server, "", model="dem") == 1
    assert "the server offers no model 'dem'; did you mean 'demo'?" in capsys.readouterr().out


async def test_functions_of_a_file_run_without_asking(
    fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def add(a: int, b: int) -> int:\n    'Add two numbers'\n    return a + b\n")
    fake_server.call(("add", ['{"a": 3,', ' "b": 5}']))
    fake_server.say("It is 8.")
    await talk(fake_server, f"/tools {path}{ENTER}3+5?{ENTER}")
    assert fake_server.bodies[0]["tools"][0]["function"]["description"] == "Add two numbers"
    assert fake_server.bodies[1]["messages"][-1] == {"role": "tool", "tool_call_id": "call_0", "content": "8"}
    shown = capsys.readouterr().out
    assert "add gave 8" in shown
    assert "It is 8." in shown


async def test_reasoning_is_shown_before_the_answer_and_sent_back(
    fake_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk = {"index": 0, "delta": {"reasoning_content": "Hm.", "reasoning": "Hm."}, "finish_reason": None}
    end = {"index": 0, "delta": {"content": "Yes."}, "finish_reason": "stop"}
    fake_server.stream([{"choices": [chunk]}, {"choices": [end]}])
    fake_server.say("x")
    await talk(fake_server, f"a{ENTER}b{ENTER}")
    assert "Hm.\nYes.\n" in capsys.readouterr().out
    assert fake_server.bodies[1]["messages"][1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Hm.",
    }
