"""The bytes of a stream on a raw socket: framing, timing, bundling, keep-alive comments, errors on the way."""

import asyncio
import json
import time
from typing import Any

import pytest
from raw_http import RawClient
from server_fakes import FakeEngine, answer, chat_body, running

from lmdserve.engine.api import Chunk, EngineDeadError, FinishReason, QueueFullError
from lmdserve.server.model import ServedModel

CHAT = "/v1/chat/completions"


def events(data: bytes) -> list[Any]:
    """Parse a whole stream strictly: nothing but `data: JSON` events and comments, each ended by an empty line."""
    assert data.endswith(b"\n\n")
    parsed: list[Any] = []
    for block in data[:-2].split(b"\n\n"):
        if block.startswith(b":"):
            parsed.append(block.decode())
            continue
        assert block.startswith(b"data: ")
        assert b"\n" not in block
        payload = block.removeprefix(b"data: ")
        parsed.append("[DONE]" if payload == b"[DONE]" else json.loads(payload))
    return parsed


async def test_a_stream_byte_by_byte(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: answer('a"\n')
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        status, headers = await client.read_head()
        parsed = events(await client.read_rest())
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"].startswith("req_")
    *chunks, done = parsed
    assert done == "[DONE]"
    head = {key: chunks[0][key] for key in ("id", "created", "model")}
    envelope = {"object": "chat.completion.chunk", **head}

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**envelope, "choices": [choice]}

    assert chunks == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "a"}),
        chunk({"content": '"'}),
        chunk({"content": "\n"}),
        chunk({}, "stop"),
    ]
    assert head["model"] == "toy"
    assert abs(head["created"] - time.time()) < 60


async def test_the_first_token_is_sent_at_once(url: str, engine: FakeEngine) -> None:
    """With the second token half a second away, the first is there long before it."""
    engine.script = lambda request: [
        Chunk(tuple(b"a")), 0.5, Chunk(tuple(b"b"), finish_reason=FinishReason.LENGTH)
    ]  # fmt: skip
    async with RawClient(url) as client:
        began = time.perf_counter()
        await client.post(CHAT, chat_body(stream=True))
        await client.read_head()
        first = events(await client.read_chunk())
        took_s = time.perf_counter() - began
        await client.read_rest()
    assert [event["choices"][0]["delta"].get("content") for event in first] == ["", "a"]
    assert took_s < 0.3


async def test_the_tokens_of_one_chunk_are_one_event(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("abcdef", tokens_a_chunk=3)
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        await client.read_head()
        parsed = events(await client.read_rest())
    contents = [event["choices"][0]["delta"].get("content") for event in parsed[:-1]]
    assert contents == ["", "abc", "def", None]


async def test_choices_of_one_step_share_one_write(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("ab", finish=FinishReason.LENGTH, pause_s=0.05)
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True, n=4))
        await client.read_head()
        first = events(await client.read_chunk())
        await client.read_rest()
    assert sorted(event["choices"][0]["index"] for event in first) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("silence", ["before", "between"])
async def test_silence_is_filled_with_comments(engine: FakeEngine, model: ServedModel, silence: str) -> None:
    pauses = (0.35, 0.0) if silence == "before" else (0.0, 0.35)
    engine.script = lambda request: [
        pauses[0], Chunk(tuple(b"a")), pauses[1], Chunk(tuple(b"b"), finish_reason=FinishReason.LENGTH)
    ]  # fmt: skip
    async with running(engine, model, keep_alive_interval=0.1) as url, RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        status, _ = await client.read_head()
        parsed = events(await client.read_rest())
    assert status == 200
    assert 2 <= parsed.count(": keep-alive") <= 3
    first_comment = parsed.index(": keep-alive")
    assert first_comment == (0 if silence == "before" else 2)
    assert parsed[-1] == "[DONE]"


async def test_an_error_before_the_first_token_has_its_status(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: [QueueFullError("512 requests wait already", 2.5)]
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        status, headers = await client.read_head()
    assert status == 429
    assert headers["content-type"].startswith("application/json")


async def test_an_error_after_the_first_token_is_the_last_event(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: [Chunk(tuple(b"a")), EngineDeadError("step 7 failed; restart the server")]
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        status, _ = await client.read_head()
        parsed = events(await client.read_rest())
    assert status == 200
    assert parsed[-1]["error"]["message"] == "step 7 failed; restart the server"
    assert parsed[-1]["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in parsed


async def test_a_bug_after_the_first_token_tells_no_more_than_an_id(
    url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda request: [Chunk(tuple(b"a")), ZeroDivisionError("secret")]
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        _, headers = await client.read_head()
        data = await client.read_rest()
    assert b"secret" not in data
    assert headers["x-request-id"] in events(data)[-1]["error"]["message"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert headers["x-request-id"] in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def test_a_sequence_that_the_engine_gives_up_ends_in_an_error(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: [Chunk(tuple(b"a")), Chunk((), finish_reason=FinishReason.ABORT)]
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        await client.read_head()
        assert events(await client.read_rest())[-1]["error"]["code"] == "draining"


async def test_a_slow_reader_holds_up_nobody_and_bounds_its_own_buffer(url: str, engine: FakeEngine) -> None:
    """A reader that never reads stops taking chunks after some hundred kilobytes; another one is served meanwhile."""
    taken = 0

    def flood(request: Any) -> Any:
        nonlocal taken
        for _ in range(2000):
            taken += 1
            yield Chunk(tuple(b"\x01" * 5_000))  # 30 kB of JSON
        yield Chunk((), finish_reason=FinishReason.LENGTH)

    engine.script = flood
    async with RawClient(url, receive_buffer_bytes=4096) as slow, RawClient(url) as quick:
        await slow.post(CHAT, chat_body(stream=True))
        previous = -1
        while taken != previous or not taken:
            previous = taken
            await asyncio.sleep(0.2)
        assert taken < 1000, "the server buffered what nobody reads"
        engine.script = lambda request: answer("quick")
        began = time.perf_counter()
        await quick.post(CHAT, chat_body(stream=True))
        await quick.read_head()
        assert events(await quick.read_rest())[-1] == "[DONE]"
        assert time.perf_counter() - began < 0.5
        slow.hang_up()
        await engine.until_idle()
