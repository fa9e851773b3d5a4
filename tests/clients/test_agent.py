"""The agent loop against a scripted server: what is sent, what runs, and how it ends."""

import asyncio
import json
from typing import Any

import pytest

from lmdserve.clients.agent import MAX_ATTEMPTS, AgentError, run_agent
from lmdserve.clients.http import AsyncClient
from lmdserve.clients.wire import ServerError

TOGETHER = 2


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def fail(reason: str) -> None:
    """Fail."""
    raise RuntimeError(reason)


def reply(server: Any, content: str | None = None, *calls: tuple[str, Any], finish_reason: str = "stop") -> None:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": f"c{place}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for place, (name, arguments) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    server.raw(json.dumps({"choices": [choice]}).encode(), content_type="application/json")


async def test_calls_are_run_until_there_is_an_answer(fake_server: Any) -> None:
    reply(fake_server, "Let me see.", ("add", {"a": 3, "b": 5}), ("fail", {"reason": "no"}), ("mul", {}))
    reply(fake_server, "It is 8.")
    told: list[Any] = []
    async with AsyncClient(fake_server.url) as client:
        run = await run_agent(client, "3+5?", [add, fail], on_message=told.append, temperature=0.5)
    assert run.answer == "It is 8."
    first, second = fake_server.bodies
    assert [tool["function"]["name"] for tool in first["tools"]] == ["add", "fail"]
    assert first["temperature"] == second["temperature"] == 0.5
    assert second["messages"] == run.messages[:-1]
    assert run.messages[0] == {"role": "user", "content": "3+5?"}
    assert run.messages[2:5] == [
        {"role": "tool", "tool_call_id": "c0", "content": "8"},
        {"role": "tool", "tool_call_id": "c1", "content": "error: RuntimeError: no"},
        {"role": "tool", "tool_call_id": "c2", "content": "error: there is no function mul; there are: add, fail"},
    ]
    assert told == run.messages[1:]


async def test_the_calls_of_one_answer_run_at_the_same_time(fake_server: Any) -> None:
    barrier = asyncio.Barrier(TOGETHER)

    async def meet() -> str:
        """Return once all calls have come."""
        async with asyncio.timeout(5):
            await barrier.wait()
        return "met"

    reply(fake_server, None, *[("meet", {})] * TOGETHER)
    reply(fake_server, "Done.")
    async with AsyncClient(fake_server.url) as client:
        run = await run_agent(client, [{"role": "system", "content": "Be brief."}], [meet])
    assert [message["content"] for message in run.messages if message["role"] == "tool"] == ["met"] * TOGETHER


async def test_an_answer_that_the_server_withholds_is_drawn_again(fake_server: Any) -> None:
    for _ in range(MAX_ATTEMPTS - 1):
        fake_server.refuse(422, {"message": "non-unique elements", "code": "invalid_output"})
    reply(fake_server, "Done.")
    async with AsyncClient(fake_server.url) as client:
        assert (await run_agent(client, "Go", [add])).answer == "Done."
    assert fake_server.bodies == [fake_server.bodies[0]] * MAX_ATTEMPTS


@pytest.mark.parametrize(("code", "count"), [("invalid_output", MAX_ATTEMPTS), ("other", 1)])
async def test_an_error_that_stays_is_raised(fake_server: Any, code: str, count: int) -> None:
    for _ in range(count):
        fake_server.refuse(422, {"message": "not now", "code": code})
    async with AsyncClient(fake_server.url) as client:
        with pytest.raises(ServerError, match="not now"):
            await run_agent(client, "Go", [add], model="m")
    assert len(fake_server.bodies) == count


async def test_a_conversation_goes_on_and_is_not_changed(fake_server: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    reply(fake_server, "Hello.")
    async with AsyncClient(fake_server.url) as client:
        run = await run_agent(client, messages, [])
    assert "tools" not in fake_server.bodies[0]
    assert len(messages) == 1
    assert run.messages == [*messages, {"role": "assistant", "content": "Hello."}]


async def test_without_an_answer_the_error_says_why(fake_server: Any) -> None:
    reply(fake_server, None, ("add", {"a": 1, "b": 1}))
    async with AsyncClient(fake_server.url) as client:
        with pytest.raises(AgentError, match="after 3 rounds") as caught:
            await run_agent(client, "Go", [add], max_rounds=3)
        assert len(fake_server.bodies) == 3
        assert len(caught.value.messages) == 1 + 3 * 2
        reply(fake_server, "Hm", finish_reason="length")
        with pytest.raises(AgentError, match="cut the answer off"):
            await run_agent(client, "Go", [add], max_rounds=9)
