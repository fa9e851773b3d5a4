"""The client against a scripted server on a real socket."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from lmdserve.clients import http
from lmdserve.clients.http import AsyncClient, normalize_base_url
from lmdserve.clients.wire import (
    ChatDelta,
    ConnectionFailed,
    ProtocolError,
    ReplyBuilder,
    ServerError,
    ToolCallDelta,
    Usage,
)

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(fake_server: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake_server.url, "secret", silence_timeout_s=5) as connected:
        yield connected


async def read(client: AsyncClient, **params: Any) -> list[ChatDelta]:
    return [delta async for delta in client.stream_chat(HI, **params)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://127.0.0.1:23333", "http://127.0.0.1:23333"),
        ("http://127.0.0.1:23333/", "http://127.0.0.1:23333"),
        ("http://127.0.0.1:23333/v1", "http://127.0.0.1:23333"),
        (" localhost:23333/v1/ ", "http://localhost:23333"),
        ("localhost", "http://localhost"),
        ("https://api.example.org/llm/v1", "https://api.example.org/llm"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_is_taken_as_people_write_it(given: str, expected: str) -> None:
    assert normalize_base_url(given) == expected


@pytest.mark.parametrize(
    "given", ["", "ftp://host", "http://", "http://host:99999", "http://host:x", "host:1?a=b", "http://[::1"]
)
def test_what_is_no_address_is_refused_with_an_example(given: str) -> None:
    with pytest.raises(ValueError, match=r"write it as http://127\.0\.0\.1:23333"):
        AsyncClient(given)


async def test_models_are_listed_with_the_key(client: AsyncClient, fake_server: Any) -> None:
    assert await client.models() == ["demo", "other"]
    assert fake_server.authorizations == ["Bearer secret"]


async def test_no_key_sends_no_authorization(fake_server: Any) -> None:
    async with AsyncClient(fake_server.url) as client:
        await client.models()
    assert fake_server.authorizations == [None]


async def test_a_stream_yields_what_came_and_counts_last(client: AsyncClient, fake_server: Any) -> None:
    fake_server.say("Hel", "lo, ", "世界")
    deltas = await read(client, temperature=0.5, model="other")
    assert [delta.content for delta in deltas] == ["", "Hel", "lo, ", "世界", "", ""]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["stop", None]
    assert deltas[-1].usage == Usage(prompt_tokens=11, completion_tokens=3, cached_tokens=4)
    assert fake_server.bodies == [
        {
            "model": "other",
            "messages": HI,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_without_a_model_the_first_is_used_and_looked_up_once(client: AsyncClient, fake_server: Any) -> None:
    fake_server.say("x")
    await read(client)
    await read(client)
    assert [body["model"] for body in fake_server.bodies] == ["demo", "demo"]
    assert len(fake_server.authorizations) == 3


async def test_stream_options_of_the_caller_are_kept(client: AsyncClient, fake_server: Any) -> None:
    fake_server.say("x")
    await read(client, stream_options={"include_usage": False, "other": 1})
    assert fake_server.bodies[0]["stream_options"] == {"include_usage": False, "other": 1}


async def test_a_complete_stream_leaves_its_connection_for_the_next(client: AsyncClient, fake_server: Any) -> None:
    """Closing it at [DONE] would look to the server like a client that gave up."""
    fake_server.say("x")
    for _ in range(3):
        await read(client)
    assert len(set(fake_server.ports)) == 1
    assert fake_server.num_disconnects == 0


async def test_tool_calls_fold_into_a_message_that_can_be_sent_back(client: AsyncClient, fake_server: Any) -> None:
    fake_server.call(("add", ['{"a": 3', ', "b": 5}']), ("now", []))
    builder = ReplyBuilder()
    for delta in await read(client):
        builder.add(delta)
    reply = builder.reply()
    assert reply.finish_reason == "tool_calls"
    assert reply.message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 5}'}},
            {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    }


def test_a_tool_call_that_skips_a_number_is_refused() -> None:
    with pytest.raises(ProtocolError, match="tool call 2 before call 0"):
        ReplyBuilder().add(ChatDelta(tool_calls=(ToolCallDelta(2, None, "x", ""),)))


async def test_a_reply_that_is_not_streamed(client: AsyncClient, fake_server: Any) -> None:
    message = {"role": "assistant", "content": "Hello"}
    body = {
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
    }
    fake_server.raw(json.dumps(body).encode(), content_type="application/json")
    reply = await client.chat(HI, max_tokens=1)
    assert (reply.message, reply.finish_reason, reply.usage) == (message, "length", Usage(2, 1))
    assert fake_server.bodies == [{"model": "demo", "messages": HI, "max_tokens": 1}]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            {"error": {"message": "too hot", "type": "invalid_request_error", "param": "temperature", "code": None}},
            "HTTP 400: too hot (field: temperature)",
        ),
        (400, {"error": {"message": "temperature too hot", "param": "temperature"}}, "HTTP 400: temperature too hot"),
        (401, {"message": "Invalid key", "code": 401, "object": "error"}, "HTTP 401: Invalid key"),
        (422, {"detail": "bad body"}, "HTTP 422: bad body"),
        (500, {"error": "plain words"}, "HTTP 500: plain words"),
        (500, ["odd"], 'HTTP 500: ["odd"]'),
        (500, {"error": None}, 'HTTP 500: {"error": null}'),
    ],
)
async def test_an_error_status_is_raised_in_the_servers_words(
    client: AsyncClient, fake_server: Any, status: int, body: Any, expected: str
) -> None:
    fake_server.raw(json.dumps(body).encode(), status=status, content_type="application/json")
    with pytest.raises(ServerError) as caught:
        await read(client)
    assert str(caught.value) == expected
    assert caught.value.status == status


async def test_an_error_page_is_quoted_in_part(client: AsyncClient, fake_server: Any) -> None:
    fake_server.raw(b"<html>" + b"x" * 10_000, status=502, content_type="text/html")
    with pytest.raises(ServerError, match=r"HTTP 502: <html>x+$") as caught:
        await read(client)
    assert len(str(caught.value)) < 400


async def test_the_wait_that_a_full_server_asks_for_is_told(client: AsyncClient, fake_server: Any) -> None:
    fake_server.refuse(429, {"message": "queue full", "code": "queue_full"}, Retry_After="7")
    with pytest.raises(ServerError, match="HTTP 429: queue full; try again in 7 s") as caught:
        await read(client)
    assert (caught.value.retry_after_s, caught.value.code) == (7.0, "queue_full")


async def test_an_error_inside_a_stream_comes_after_what_was_said(client: AsyncClient, fake_server: Any) -> None:
    error = {"error": {"message": "the engine died", "type": "server_error", "param": None, "code": None}}
    fake_server.stream([{"choices": [{"index": 0, "delta": {"content": "He"}}]}, error], ends="break")
    deltas = client.stream_chat(HI)
    assert (await anext(deltas)).content == "He"
    with pytest.raises(ServerError, match="error while answering: the engine died") as caught:
        await anext(deltas)
    assert caught.value.status is None


async def test_a_stream_that_breaks_off_is_an_error(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([{"choices": [{"index": 0, "delta": {"content": "He"}}]}], ends="break")
    with pytest.raises(ConnectionFailed, match="before it was complete"):
        await read(client)


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"<html>", "text/html", "sent text/html where a stream was asked for"),
        (b"data: nonsense\n\n", "text/event-stream", "'nonsense', which is not a JSON object"),
        (b"data: [1]\n\n", "text/event-stream", r"'\[1\]', which is not a JSON object"),
        (b"data: {}\n\n", "text/event-stream", "no `choices` with a `delta`"),
        (b'data: {"choices": [{"index": 0, "delta": 5}]}\n\n', "text/event-stream", "no `choices` with a `delta`"),
        (b'data: {"choices": [], "usage": {"x": 1}}\n\n', "text/event-stream", "no `choices` with a `delta`"),
    ],
)
async def test_what_is_not_an_api_is_called_so(
    client: AsyncClient, fake_server: Any, body: bytes, content_type: str, expected: str
) -> None:
    fake_server.raw(body, content_type=content_type)
    with pytest.raises(ProtocolError, match=expected):
        await read(client)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}'])
async def test_a_reply_that_is_not_an_apis_is_called_so(client: AsyncClient, fake_server: Any, body: bytes) -> None:
    fake_server.raw(body, content_type="application/json")
    with pytest.raises(ProtocolError, match="does not answer as an OpenAI API"):
        await client.chat(HI)


async def test_https_to_a_server_without_tls_says_so(fake_server: Any) -> None:
    """It said "Operation not permitted": the number of the TLS error, read as one of the system's."""
    async with AsyncClient(fake_server.url.replace("http:", "https:")) as client:
        with pytest.raises(ConnectionFailed, match=r"no TLS there: .*begins with http://"):
            await client.models()


async def test_a_closed_port_is_named_with_what_to_try() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with AsyncClient(url) as client:
            with pytest.raises(ConnectionFailed, match=rf"cannot connect to {url} \(Connection refused\).*lmdserve"):
                await client.models()


async def test_a_server_that_dies_in_mid_answer() -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:"
        )
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    async with server, AsyncClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(ConnectionFailed, match=r"was lost \(it ended in the middle of an answer\)"):
            async for _ in client.stream_chat(HI, model="m"):
                pass


async def test_something_that_does_not_speak_http() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server, AsyncClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(ConnectionFailed, match="was lost"):
            await client.models()


async def test_a_server_that_hangs_is_given_up(fake_server: Any) -> None:
    fake_server.stream([{"choices": [{"index": 0, "delta": {"content": "He"}}]}], ends="hang")
    async with AsyncClient(fake_server.url, silence_timeout_s=0.2) as client:
        with pytest.raises(ConnectionFailed, match=r"sent nothing for 0\.2 s"):
            await read(client)


async def test_leaving_a_stream_tells_the_server(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([{"choices": [{"index": 0, "delta": {"content": "He"}}]}], ends="hang")
    async with aclosing(client.stream_chat(HI)) as deltas:
        async for _ in deltas:
            break
    await asyncio.wait_for(fake_server.was_left.wait(), 5)


async def test_cancelling_a_reader_tells_the_server(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([{"choices": [{"index": 0, "delta": {"content": "He"}}]}], ends="hang")
    task = asyncio.create_task(read(client))
    while not fake_server.bodies:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(fake_server.was_left.wait(), 5)


async def test_a_server_that_keeps_the_connection_after_done_does_not_hold_the_answer(
    client: AsyncClient, fake_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "END_TIMEOUT_S", 0.05)

    chunk = {"choices": [{"index": 0, "delta": {"content": "He"}, "finish_reason": "stop"}]}
    fake_server.stream([chunk], ends="done, then hang")
    assert [delta.content for delta in await asyncio.wait_for(read(client), 5)] == ["He"]


async def test_many_streams_at_once_are_not_limited(client: AsyncClient, fake_server: Any) -> None:
    """aiohttp's own limit of 100 connections would make the rest wait for the first to end."""
    fake_server.stream([{"choices": [{"index": 0, "delta": {"content": "He"}}]}], ends="hang")

    async def first_word() -> str:
        async with aclosing(client.stream_chat(HI, model="demo")) as deltas:
            first = await anext(deltas)
            await all_started.wait()
            return first.content

    all_started = asyncio.Event()
    tasks = [asyncio.create_task(first_word()) for _ in range(120)]
    async with asyncio.timeout(20):
        while len(fake_server.bodies) < 120:
            await asyncio.sleep(0.01)
    all_started.set()
    assert await asyncio.gather(*tasks) == ["He"] * 120
