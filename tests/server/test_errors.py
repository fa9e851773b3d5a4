"""Every way to fail, seen from a client: status, OpenAI's error object, and what the headers say about trying again."""

import json
import logging
from typing import Any

import aiohttp
import openai
import pytest
from raw_http import RawClient
from server_fakes import FakeEngine, answer, chat_body

from lmdserve.engine.api import (
    Chunk,
    ConfigError,
    ContextTooLongError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    FinishReason,
    FormatFailedError,
    InvalidRequestError,
    QueueFullError,
)
from lmdserve.server.routes import OTHER_APIS, bodies, routes

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("error", "status", "expected", "headers"),
    [
        (
            ContextTooLongError(5000, 4096),
            400,
            {"type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"},
            {},
        ),
        (
            InvalidRequestError("logit_bias bans every token", "logit_bias"),
            400,
            {"type": "invalid_request_error", "param": "logit_bias", "code": None},
            {},
        ),
        (
            QueueFullError("512 requests wait already", 2.25),
            429,
            {"type": "rate_limit_error", "param": None, "code": "queue_full"},
            {"Retry-After": "3", "retry-after-ms": "2250", "x-should-retry": "true"},
        ),
        (
            EngineDrainingError("the engine is stopping"),
            503,
            {"type": "service_unavailable_error", "param": None, "code": "draining"},
            {"Retry-After": "5", "retry-after-ms": "5000", "x-should-retry": "true"},
        ),
        (
            EngineDeadError("step 7 failed; restart the server"),
            503,
            {"type": "service_unavailable_error", "param": None, "code": "engine_unavailable"},
            {"Retry-After": "30", "retry-after-ms": "30000", "x-should-retry": "false"},
        ),
        (
            FormatFailedError("this request's output format failed: it is too costly to follow"),
            400,
            {"type": "invalid_request_error", "param": None, "code": "format_failed"},
            {"x-should-retry": "false"},
        ),
        (
            EngineError("the model gave no finite logits"),
            500,
            {"type": "server_error", "param": None, "code": "generation_failed"},
            {"x-should-retry": "false"},
        ),
    ],
)
async def test_what_the_engine_raises(
    session: aiohttp.ClientSession,
    url: str,
    engine: FakeEngine,
    error: Exception,
    status: int,
    expected: dict[str, Any],
    headers: dict[str, str],
) -> None:
    engine.script = lambda request: [error]
    async with session.post(url + CHAT, json=chat_body()) as reply:
        body = await reply.json()
        assert reply.status == status
        assert body == {"error": {"message": str(error), **expected}}
        names = ("Retry-After", "retry-after-ms", "x-should-retry")
        assert {name: reply.headers[name] for name in names if name in reply.headers} == headers


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), KeyError("secret")])
async def test_a_bug_tells_the_client_an_id_and_the_log_everything(
    session: aiohttp.ClientSession,
    url: str,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    engine.script = lambda request: [error]
    async with session.post(url + CHAT, json=chat_body(), headers={"x-request-id": "my-id.1"}) as reply:
        assert reply.status == 500
        assert reply.headers["x-request-id"] == "my-id.1"
        assert reply.headers["x-should-retry"] == "false"
        text = await reply.text()
    assert "secret" not in text
    assert "Traceback" not in text
    assert "my-id.1" in text
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "my-id.1" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_an_answer_without_an_end_is_no_answer(
    session: aiohttp.ClientSession, url: str, engine: FakeEngine
) -> None:
    engine.script = lambda request: [Chunk(tuple(b"half"))]
    async with session.post(url + CHAT, json=chat_body()) as reply:
        assert reply.status == 503
    engine.script = lambda request: [Chunk(tuple(b"half")), Chunk((), finish_reason=FinishReason.ABORT)]
    async with session.post(url + CHAT, json=chat_body()) as reply:
        assert (reply.status, (await reply.json())["error"]["code"]) == (503, "draining")


@pytest.mark.parametrize(
    ("method", "path", "status", "parts"),
    [
        ("GET", "/", 404, ["/openapi.json"]),
        ("POST", "/v1/chat/completion", 404, ["did you mean /v1/chat/completions?"]),
        ("POST", "/chat/completions", 404, ["did you mean /v1/chat/completions?"]),
        ("POST", "/v1/responses", 404, ["/v1/responses", "use /v1/chat/completions"]),
        ("POST", "/v1/messages/", 404, ["use /v1/chat/completions"]),
        ("POST", "/v1/embeddings", 404, ["makes no embeddings"]),
        ("GET", "/v1/model", 404, ["did you mean /v1/models?"]),
        ("GET", "/v1/chat/completions", 405, ["use POST"]),
        ("DELETE", "/v1/models", 405, ["use GET or HEAD"]),
        ("GET", "/" + "x" * 3000, 404, ["there is no"]),
    ],
)
async def test_wrong_paths_and_methods(
    session: aiohttp.ClientSession, url: str, method: str, path: str, status: int, parts: list[str]
) -> None:
    async with session.request(method, url + path) as reply:
        error = (await reply.json())["error"]
        assert reply.status == status
        assert error["type"] == "invalid_request_error"
        assert all(part in error["message"] for part in parts), error["message"]
        assert len(error["message"]) < 400
        if status == 405:
            assert set(reply.headers["Allow"].split(", ")) <= {"GET", "HEAD", "POST"}


async def test_every_reply_has_a_request_id_of_its_own(session: aiohttp.ClientSession, url: str) -> None:
    ids = []
    for path in ("/health", "/nowhere", "/v1/models"):
        async with session.get(url + path) as reply:
            ids.append(reply.headers["x-request-id"])
    assert len(set(ids)) == 3
    for forged in ("a b", "x" * 200, "é"):
        async with session.get(url + "/health", headers={"x-request-id": forged}) as reply:
            assert reply.headers["x-request-id"].startswith("req_")


async def test_the_sdk_raises_its_own_types(url: str, engine: FakeEngine) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        engine.script = lambda request: [ContextTooLongError(5000, 4096)]
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(**chat_body(model="toy"))  # type: ignore[call-overload]
        assert (bad.value.param, bad.value.code) == ("messages", "context_length_exceeded")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(**chat_body(model="gpt-4o"))  # type: ignore[call-overload]
        assert missing.value.code == "model_not_found"
        engine.script = lambda request: [Chunk(tuple(b"a")), EngineDeadError("step 7 failed")]
        with pytest.raises(openai.APIError, match="step 7 failed"):
            async for _ in await client.chat.completions.create(**chat_body(model="toy", stream=True)):  # type: ignore[call-overload]
                pass


async def test_the_sdk_comes_back_when_the_queue_has_room(url: str, engine: FakeEngine) -> None:
    """It waits for the time we say, not for its own back-off, and its second try is answered."""
    scripts = iter([[QueueFullError("full", 0.05)], answer("now")])
    engine.script = lambda request: next(scripts)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as client:
        reply = await client.chat.completions.create(**chat_body(model="toy"))  # type: ignore[call-overload]
    assert reply.choices[0].message.content == "now"
    assert len(engine.requests) == 2


async def test_the_sdk_does_not_hammer_a_dead_engine(url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: [EngineDeadError("step 7 failed")]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=3) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**chat_body(model="toy"))  # type: ignore[call-overload]
    assert len(engine.requests) == 1


async def test_an_unforeseen_engine_error_type_is_still_an_answer(
    session: aiohttp.ClientSession, url: str, engine: FakeEngine
) -> None:
    engine.script = lambda request: [ConfigError("raised where it does not belong")]
    async with session.post(url + CHAT, json=chat_body()) as reply:
        assert reply.status == 500
        assert "error" in await reply.json()


def test_no_other_api_is_ours() -> None:
    assert not OTHER_APIS.keys() & {route.path for route in routes()}


@pytest.mark.parametrize(
    ("headers", "data"), [("Content-Encoding: gzip\r\n", b"no gzip"), ("Content-Encoding: deflate\r\n", b"\xff" * 9)]
)
async def test_a_body_that_is_not_encoded_as_it_claims_is_the_clients_mistake(
    url: str, headers: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It was reported as an internal error, with a traceback in the log."""
    async with RawClient(url) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
        client.writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, reply_headers = await client.read_head()
        error = json.loads(await client.reader.readexactly(int(reply_headers["content-length"])))["error"]
    assert (status, error["param"]) == (400, "body")
    assert "not encoded as its headers say" in error["message"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_that_does_not_arrive_is_not_waited_for_without_end(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)
    async with RawClient(url) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        client.writer.write(head.encode() + b"{")
        status, headers = await client.read_head()
        error = json.loads(await client.reader.readexactly(int(headers["content-length"])))["error"]
    assert (status, error["param"], error["code"]) == (408, "body", "body_timeout")


@pytest.mark.parametrize(
    "data", [b"GET /health HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET /health\0 HTTP/1.1\r\n\r\n"]
)
async def test_what_is_no_http_is_one_line_in_the_log(url: str, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Each probe of a port scanner left a traceback at level ERROR."""
    with caplog.at_level(logging.INFO):
        async with RawClient(url) as client:
            client.writer.write(data)
            assert (await client.read_head())[0] == 400
    (record,) = [record for record in caplog.records if record.name == "lmdserve.http"]
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert record.getMessage().startswith("no valid HTTP: ")
    assert "\n" not in record.getMessage()
