"""A client that leaves ends its sequences at once: on both event loops, streamed or not, before or after a token."""

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import uvloop
from aiohttp import web
from raw_http import RawClient
from server_fakes import FakeEngine, answer, chat_body, running

from lmdserve.engine.api import Chunk
from lmdserve.server.model import ServedModel

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ABORTED_WITHIN_S = 0.1


def on_loop(name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[name]) as runner:
        runner.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2.0):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("has_begun", [False, True])
def test_hanging_up_aborts_every_choice(
    engine: FakeEngine, model: ServedModel, loop_name: str, stream: bool, n: int, has_begun: bool
) -> None:
    """The engine is silent for a minute when the client leaves: only the lost connection can end the sequence."""
    engine.script = lambda request: [*([Chunk(tuple(b"a"))] if has_begun else []), 60.0]

    async def main() -> None:
        async with running(engine, model) as url, RawClient(url) as client:
            await client.post(CHAT, chat_body(stream=stream, n=n))
            await until(lambda: len(engine.live) == n)
            if has_begun and stream:
                await client.read_head()
            client.hang_up()
            await engine.until_idle(ABORTED_WITHIN_S)
        assert sorted(engine.aborted) == sorted(request.uid for request in engine.requests)
        assert len(engine.aborted) == n

    on_loop(loop_name, main)


async def test_a_busy_stream_is_aborted_too(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("x" * 100_000, pause_s=0.001)
    async with RawClient(url) as client:
        await client.post(COMPLETIONS, {"prompt": "a", "stream": True})
        await client.read_head()
        await client.read_chunk()
        client.hang_up()
        await engine.until_idle(ABORTED_WITHIN_S)
    assert engine.aborted == [engine.requests[0].uid]


async def test_one_failing_choice_ends_the_others(url: str, engine: FakeEngine) -> None:
    failing = iter([True])
    engine.script = lambda request: [0.05, ValueError("bug")] if next(failing, False) else [60.0]
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(n=3))
        status, _ = await client.read_head()
    assert status == 500
    assert not engine.live
    assert len(engine.aborted) == 2


async def test_the_connection_serves_the_next_request(url: str, engine: FakeEngine) -> None:
    """Keep-alive survives a whole stream."""
    async with RawClient(url) as client:
        for _ in range(3):
            await client.post(CHAT, chat_body(stream=True))
            status, _ = await client.read_head()
            assert status == 200
            assert (await client.read_rest()).endswith(b"data: [DONE]\n\n")


async def test_a_disconnect_is_counted_and_logs_no_traceback(
    url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda request: [Chunk(tuple(b"a")), 60.0]
    async with RawClient(url) as client:
        await client.post(CHAT, chat_body(stream=True))
        await client.read_head()
        client.hang_up()
        await engine.until_idle()
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        page = await reply.text()
    assert 'lmdserve_requests_total{outcome="disconnected",route="/v1/chat/completions"} 1.0' in page
    assert not [record for record in caplog.records if record.exc_info or record.levelname in ("ERROR", "WARNING")]


async def test_a_write_after_the_client_left_is_a_disconnect(
    url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transport may be closing before aiohttp has cancelled the handler: that was logged as an error of ours."""

    async def write_eof(response: web.StreamResponse, data: bytes = b"") -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    async with RawClient(url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(web.StreamResponse, "write_eof", write_eof)
            await client.post(CHAT, chat_body(stream=True))
            assert not (await client.reader.read()).endswith(b"0\r\n\r\n")
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        page = await reply.text()
    assert 'lmdserve_requests_total{outcome="disconnected",route="/v1/chat/completions"} 1.0' in page
    assert not [record for record in caplog.records if record.exc_info or record.levelname in ("ERROR", "WARNING")]


@pytest.mark.parametrize("loop_name", LOOPS)
def test_a_client_that_leaves_with_the_last_byte_has_not_left_early(
    engine: FakeEngine, model: ServedModel, loop_name: str
) -> None:
    """Some such streams were once logged and counted as disconnected. The client has a thread of its own: it must be
    able to leave while the handler still runs.
    """
    body = json.dumps(chat_body(stream=True))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    def ask(url: str) -> None:
        for _ in range(100):
            with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
                connection.sendall((head + body).encode())
                received = b""
                while not received.endswith(b"\r\n0\r\n\r\n"):
                    received += connection.recv(2**16)

    async def main() -> None:
        async with running(engine, model) as url, aiohttp.ClientSession() as session:
            await asyncio.to_thread(ask, url)
            async with session.get(url + "/metrics") as reply:
                text = await reply.text()
        assert 'outcome="succeeded",route="/v1/chat/completions"} 100.0' in text
        assert "disconnected" not in text

    on_loop(loop_name, main)
