"""The operator's routes, and how an application starts, drains and stops."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import aiohttp
import pytest
import yarl
from raw_http import RawClient
from server_fakes import FakeEngine, answer, chat_body, running

from lmdserve import __version__
from lmdserve.engine.api import Chunk, ConfigError, EngineDeadError, FinishReason
from lmdserve.server.app import build, listening, serve
from lmdserve.server.config import ServerConfig
from lmdserve.server.model import ServedModel
from lmdserve.server.services import SERVICES, Phase

CHAT = "/v1/chat/completions"


async def get(session: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with session.get(url) as reply:
        return reply.status, await reply.json()


async def test_a_healthy_server(session: aiohttp.ClientSession, url: str) -> None:
    assert await get(session, url + "/health") == (200, {"status": "ok"})
    assert await get(session, url + "/ready") == (200, {"status": "ok"})
    assert await get(session, url + "/version") == (200, {"version": __version__})


async def test_a_dead_engine_fails_both_probes_with_the_reason(
    session: aiohttp.ClientSession, url: str, engine: FakeEngine
) -> None:
    engine.health_error = EngineDeadError("no step finished for 61 s")
    for path in ("/health", "/ready"):
        status, body = await get(session, url + path)
        assert status == 503
        assert body["error"]["message"] == "no step finished for 61 s"


@pytest.mark.parametrize(("phase", "code"), [(Phase.STARTING, "engine_unavailable"), (Phase.DRAINING, "draining")])
async def test_a_server_that_is_not_open_is_alive_but_not_ready(
    session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel, phase: Phase, code: str
) -> None:
    config = ServerConfig(server_port=0)
    app = build(engine, model, config)
    async with listening(app, config) as url:
        app[SERVICES].lifecycle.phase = phase
        assert (await get(session, url + "/health"))[0] == 200
        assert (await get(session, url + "/v1/models"))[0] == 200
        status, body = await get(session, url + "/ready")
        assert (status, body["error"]["code"]) == (503, code)
        async with session.post(url + CHAT, json=chat_body()) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (503, code)
            assert int(reply.headers["Retry-After"]) >= 1
    assert engine.requests == []


async def test_the_engine_lives_as_long_as_the_application(engine: FakeEngine, model: ServedModel) -> None:
    async with running(engine, model):
        assert engine.is_started
        assert engine.stopped_after_s == []
    assert engine.stopped_after_s == [0.0]


async def test_a_taken_port_is_one_sentence(engine: FakeEngine, model: ServedModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServerConfig(server_port=port)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}.*--server-port"):
            async with listening(build(engine, model, config), config):
                pass
    assert engine.stopped_after_s == [0.0]


class Serving:
    """`serve` running in this process, to be stopped by real signals."""

    def __init__(self, engine: FakeEngine, model: ServedModel, **options: Any) -> None:
        config = ServerConfig(server_port=0, **options)
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.app = build(engine, model, config)
        self.task = asyncio.create_task(serve(self.app, config, on_listening=self._url.set_result))

    async def url(self) -> str:
        await asyncio.wait({self._url, self.task}, return_when=asyncio.FIRST_COMPLETED)
        return self._url.result()

    async def signal(self, number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)

    async def exit_status(self) -> int:
        async with asyncio.timeout(5.0):
            return await self.task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(
    session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel, number: signal.Signals
) -> None:
    engine.script = lambda request: answer("all of it", pause_s=0.04)
    serving = Serving(engine, model)
    url = await serving.url()
    async with RawClient(url) as streaming:
        await streaming.post(CHAT, chat_body(stream=True))
        await streaming.read_head()
        whole = asyncio.create_task(session.post(url + CHAT, json=chat_body()))
        await asyncio.sleep(0.05)
        await serving.signal(number)
        async with session.post(url + CHAT, json=chat_body()) as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"] == "5"
        async with session.get(url + "/ready") as ready:
            assert ready.status == 503
        data = await streaming.read_rest()
        assert data.endswith(b"data: [DONE]\n\n")
        async with await whole as reply:
            assert (await reply.json())["choices"][0]["message"]["content"] == "all of it"
    assert await serving.exit_status() == 0
    assert engine.aborted == []


async def test_a_body_that_never_comes_does_not_hold_up_a_shutdown(engine: FakeEngine, model: ServedModel) -> None:
    """It counted as a running request, and got all of --shutdown-timeout to finish."""
    serving = Serving(engine, model, shutdown_timeout=30.0)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    async with RawClient(await serving.url()) as client:
        client.writer.write(head.encode() + b"{")
        await asyncio.sleep(0.05)
        await serving.signal(signal.SIGTERM)
        assert await serving.exit_status() == 0


async def test_a_body_that_comes_after_the_signal_is_refused(engine: FakeEngine, model: ServedModel) -> None:
    engine.script = lambda request: answer("all of it", pause_s=0.04)
    serving = Serving(engine, model)
    body = json.dumps(chat_body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    url = await serving.url()
    async with RawClient(url) as early, RawClient(url) as late:
        await early.post(CHAT, chat_body(stream=True))
        await early.read_head()
        late.writer.write(head.encode() + body[:5])
        await asyncio.sleep(0.05)
        await serving.signal(signal.SIGTERM)
        late.writer.write(body[5:])
        assert (await late.read_head())[0] == 503
        assert (await early.read_rest()).endswith(b"data: [DONE]\n\n")
    assert await serving.exit_status() == 0
    assert len(engine.requests) == 1


async def test_an_idle_server_stops_at_once(engine: FakeEngine, model: ServedModel) -> None:
    serving = Serving(engine, model)
    await serving.url()
    began = time.perf_counter()
    await serving.signal(signal.SIGTERM)
    assert await serving.exit_status() == 0
    assert time.perf_counter() - began < 0.5


async def test_ctrl_c_again_while_the_server_stops_does_not_cut_that_short(
    engine: FakeEngine, model: ServedModel
) -> None:
    """Nobody listened for signals any more: the second one came as a KeyboardInterrupt out of the clean-up."""
    stop = engine.stop

    async def stop_slowly(timeout_s: float) -> None:
        await asyncio.sleep(0.1)
        await stop(timeout_s)

    engine.stop = stop_slowly  # type: ignore[method-assign]
    serving = Serving(engine, model)
    await serving.url()
    await serving.signal(signal.SIGINT)
    assert engine.stopped_after_s == []
    await serving.signal(signal.SIGINT)
    assert await serving.exit_status() == 0
    assert engine.stopped_after_s == [0.0]


@pytest.mark.parametrize("ends_by", ["timeout", "second signal"])
async def test_what_does_not_finish_in_time_ends_with_an_error_event(
    engine: FakeEngine, model: ServedModel, ends_by: str
) -> None:
    """The engine aborts what still runs when it is stopped, and the client is told instead of cut off."""
    stopped = asyncio.Event()
    stop = engine.stop

    async def stopping(timeout_s: float) -> None:
        await stop(timeout_s)
        stopped.set()

    async def generate(request: Any) -> Any:
        yield Chunk(tuple(b"a"))
        await stopped.wait()
        yield Chunk((), finish_reason=FinishReason.ABORT)

    engine.stop = stopping  # type: ignore[method-assign]
    engine.generate = generate  # type: ignore[method-assign]
    serving = Serving(engine, model, shutdown_timeout=0.2 if ends_by == "timeout" else 30.0)
    async with RawClient(await serving.url()) as client:
        await client.post(CHAT, chat_body(stream=True))
        await client.read_head()
        await serving.signal(signal.SIGTERM)
        if ends_by == "second signal":
            await serving.signal(signal.SIGINT)
        data = await client.read_rest()
    assert b'"code":"draining"' in data
    assert b"[DONE]" not in data
    assert await serving.exit_status() == 0


def test_the_http_layer_imports_without_torch() -> None:
    """Only the engine needs torch; blocking it shows that nothing on the HTTP side asks for it."""
    program = (
        "import sys; sys.modules['torch'] = None; "
        "import lmdserve.server.app, lmdserve.server.chat; "
        "assert lmdserve.server.app.build"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


async def test_a_path_cannot_forge_entries_of_the_log(
    session: aiohttp.ClientSession, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lmdserve.access"):
        async with session.get(yarl.URL(f"{url}/x%0a2026-11-21%20ERROR%1b%5b31m{'y' * 3000}", encoded=True)) as reply:
            assert reply.status == 404
    (record,) = [record for record in caplog.records if record.name == "lmdserve.access"]
    assert record.getMessage().startswith("GET /x%0a2026-11-21%20ERROR%1b%5b31myyy")
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 400
