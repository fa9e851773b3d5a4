"""A small async client for the OpenAI chat API: models, chat, streamed chat, and errors that say what to do.

Owns connections: URLs, headers, time limits, what can go wrong. wire.py knows what the replies mean, sse.py how a
stream is cut. Needs nothing but aiohttp, so these files can be copied into another project. (Keep them in a package: a
lone http.py beside a script would hide the standard library's `http`.)
"""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from .sse import SSEDecoder
from .wire import (
    MAX_QUOTED_CHARS,
    ChatDelta,
    ChatReply,
    ConnectionFailed,
    Json,
    ProtocolError,
    error_from,
    parse_deltas,
    parse_usage,
)

Message = Mapping[str, Any]

CONNECT_TIMEOUT_S = 10.0
# A reply that is not streamed sends nothing until it is complete, which takes minutes for a long one on a CPU.
SILENCE_TIMEOUT_S = 600.0
END_TIMEOUT_S = 1.0


def normalize_base_url(url: str) -> str:
    """Return `url` with a scheme and without a trailing slash or `/v1`; ValueError says what is wrong with it."""
    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        is_address = bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:  # no port number, or half an IPv6 address
        is_address = False
    if not is_address or parts.scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is not the address of an HTTP server; write it as http://127.0.0.1:23333")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


class AsyncClient:
    """One server, many requests at once. Use it as `async with`, or call `close` when done.

    Closing the iterator of a stream, or cancelling the task that reads it, closes the connection, which tells the
    server to stop; so wrap a stream that you leave early in `contextlib.aclosing`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        self.base_url = normalize_base_url(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=silence_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._default_model: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; the client can be used again afterwards."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def models(self) -> list[str]:
        """Return the names of the models that the server offers."""
        reply = await self._get("/v1/models")
        try:
            return [str(entry["id"]) for entry in reply["data"]]
        except (KeyError, TypeError):
            raise self._not_an_api("its list of models has no `data` with an `id` each") from None

    async def chat(self, messages: Sequence[Message], *, model: str | None = None, **params: Any) -> ChatReply:
        """Send a conversation and return the first choice's answer when it is complete."""
        payload = await self._chat_payload(messages, model, params)
        async with self._request("POST", "/v1/chat/completions", payload) as response:
            reply = await self._read_json(response)
        try:
            choice = reply["choices"][0]
            return ChatReply(choice["message"], choice["finish_reason"], parse_usage(reply.get("usage")))
        except (KeyError, IndexError, TypeError):
            raise self._not_an_api("its reply has no `choices` with a `message`") from None

    async def stream_chat(
        self, messages: Sequence[Message], *, model: str | None = None, **params: Any
    ) -> AsyncGenerator[ChatDelta, None]:
        """Send a conversation and yield its answer as it is made; token counts come last."""
        payload = await self._chat_payload(messages, model, params)
        payload["stream_options"] = {"include_usage": True, **params.get("stream_options", {})}
        async with aclosing(self.stream("/v1/chat/completions", payload)) as chunks:
            async for chunk in chunks:
                try:
                    deltas = list(parse_deltas(chunk))
                except (AttributeError, KeyError, TypeError):
                    raise self._not_an_api("a chunk of its stream has no `choices` with a `delta`") from None
                for delta in deltas:
                    yield delta

    async def stream(self, path: str, payload: Json) -> AsyncGenerator[Json, None]:
        """POST `payload` with `stream` on and yield each chunk as the server sent it, up to [DONE]."""
        async with self._request("POST", path, payload | {"stream": True}) as response:
            if response.content_type != "text/event-stream":
                raise self._not_an_api(f"it sent {response.content_type} where a stream was asked for")
            decoder = SSEDecoder()
            async for block in response.content.iter_any():
                for data in decoder.feed(block):
                    if data == "[DONE]":
                        await _read_to_end(response)
                        return
                    yield self._parse_event(data)
        raise ConnectionFailed(f"{self.base_url} ended the answer before it was complete; its log may say why")

    async def _chat_payload(self, messages: Sequence[Message], model: str | None, params: Mapping[str, Any]) -> Json:
        return {"model": model or await self._first_model(), "messages": list(messages), **params}

    async def _first_model(self) -> str:
        if self._default_model is None:
            names = await self.models()
            if not names:
                raise ProtocolError(f"{self.base_url} offers no model")
            self._default_model = names[0]
        return self._default_model

    async def _get(self, path: str) -> Json:
        async with self._request("GET", path, None) as response:
            return await self._read_json(response)

    async def _read_json(self, response: aiohttp.ClientResponse) -> Json:
        try:
            reply = json.loads(await response.read())
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._not_an_api(f"{response.url.path} did not answer with a JSON object")
        return reply

    def _parse_event(self, data: str) -> Json:
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise self._not_an_api(f"its stream holds {data[:MAX_QUOTED_CHARS]!r}, which is not a JSON object")
        if "error" in chunk:
            raise error_from(chunk, status=None)
        return chunk

    def _not_an_api(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self.base_url} does not answer as an OpenAI API: {what}; check the URL")

    @asynccontextmanager
    async def _request(self, method: str, path: str, payload: Json | None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request; yield its response when the status is good; turn every failure into a ClientError."""
        if self._session is None:
            # limit=0: as many connections as requests; whoever sends them bounds their number.
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        try:
            async with self._session.request(method, self.base_url + path, json=payload) as response:
                if response.status >= 400:
                    await self._raise_status(response)
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectionFailed(
                f"cannot connect to {self.base_url} ({_reason(error)}); check the address, and that a server runs "
                "there (`lmdserve --model demo` starts one)"
            ) from error
        except TimeoutError as error:
            raise ConnectionFailed(
                f"{self.base_url} sent nothing for {self._timeout.sock_read:g} s; it is overloaded or hangs: "
                f"look at {self.base_url}/health"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionFailed(
                f"the connection to {self.base_url} was lost ({_reason(error)}); the server's log may say why"
            ) from error

    async def _raise_status(self, response: aiohttp.ClientResponse) -> NoReturn:
        text = await response.text(errors="replace")
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            body = {"message": text.strip()[:MAX_QUOTED_CHARS] or response.reason or "no reason given"}
        raise error_from(body, status=response.status, retry_after=response.headers.get("Retry-After"))


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    """Take the few bytes after [DONE]: a connection closed before them looks like a client that gave up."""
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(END_TIMEOUT_S):
            async for _ in response.content.iter_any():
                pass


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):  # its errno is no system's
            return f"no TLS there: {cause.reason}; an address without TLS begins with http://"
        if cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno)
        return cause.strerror or str(cause)
    if isinstance(error, aiohttp.ClientPayloadError):
        return "it ended in the middle of an answer"
    return str(error) or type(error).__name__
