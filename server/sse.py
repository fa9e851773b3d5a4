"""The only writer of a stream: server-sent events as OpenAI's SDKs read them, keep-alive comments, the error event.

Owns when bytes go out, not what they say (`replies.py`). The status line waits for the first event, so that a request
refused by the engine still gets its proper HTTP status; after `keep_alive_interval_s` of silence it is sent anyway.
A slow reader blocks its own task only: aiohttp suspends `write` while more than 64 KiB are unsent.

Measured on two busy Xeon cores with uvloop (benchmarks/host_overhead.py, 2026-11-21): from the engine's chunk to the
socket a token costs 19 us of CPU with 64 streams and 12 us with 256, most of it the send, 2 us decoding, 1.4 us JSON.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from .choices import ChoiceUpdate
from .errors import ApiError
from .replies import ReplyFormat

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect the stream and hand it over in one piece
}
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class EventStream:
    """One response of server-sent events. Use as an async context manager; it ends the keep-alive task."""

    def __init__(self, request: web.Request, keep_alive_interval_s: float) -> None:
        self.response = web.StreamResponse(headers=HEADERS)
        self._request = request
        self._keep_alive_interval_s = keep_alive_interval_s
        self._writer: AbstractStreamWriter | None = None  # from the status line on
        self._prepare_lock = asyncio.Lock()
        self._is_writing = False  # no comment while an event waits for a slow reader
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()

    async def __aenter__(self) -> "EventStream":
        self._keep_alive_task = self._loop.create_task(self._keep_alive())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end_keep_alive()

    async def send(self, chunks: Sequence[bytes]) -> None:
        """Write some events at once."""
        if chunks:
            await self._write(b"data: " + b"\n\ndata: ".join(chunks) + b"\n\n")

    async def finish(self) -> None:
        """Say that all is said."""
        await self._write(DONE)
        await self.end()

    async def end(self) -> None:
        """Say no more; OpenAI's streams end with `finish` instead.

        Nothing is waited for behind the last byte: a client that leaves with it would cancel its handler, and be
        counted as one that left early.
        """
        await self._end_keep_alive()
        await self.response.write_eof()

    async def fail(self, error: ApiError) -> None:
        """Say what went wrong, and nothing more: a stream without [DONE] is not complete."""
        await self.send([error.body()])
        await self.end()

    async def _write(self, data: bytes) -> None:
        self._is_writing = True
        try:
            writer = self._writer or await self._prepare()
            await writer.write(data)
        finally:
            self._is_writing = False
            self._written_at = self._loop.time()

    async def _prepare(self) -> AbstractStreamWriter:
        async with self._prepare_lock:
            if self._writer is None:
                self._writer = await self.response.prepare(self._request)
                assert self._writer is not None, "the response has ended"
            return self._writer

    async def _end_keep_alive(self) -> None:
        if not self._keep_alive_task.done():
            self._keep_alive_task.cancel()
            await asyncio.gather(self._keep_alive_task, return_exceptions=True)

    async def _keep_alive(self) -> None:
        while True:
            silent_s = 0.0 if self._is_writing else self._loop.time() - self._written_at
            if silent_s < self._keep_alive_interval_s:
                await asyncio.sleep(self._keep_alive_interval_s - silent_s)
            else:
                await self._write(KEEP_ALIVE)


async def stream_reply(
    request: web.Request,
    updates: AsyncIterator[Sequence[ChoiceUpdate]],
    reply_format: ReplyFormat,
    *,
    keep_alive_interval_s: float,
    describe_error: Callable[[Exception], ApiError],
    headers: Mapping[str, str],
) -> web.StreamResponse:
    """Write all updates as events. An error before the first byte is raised; a later one becomes the error event.

    `describe_error` turns any exception into what the client is told.
    """
    async with EventStream(request, keep_alive_interval_s) as stream:
        stream.response.headers.update(headers)
        try:
            async for batch in updates:
                await stream.send(reply_format.chunks(batch))
            usage_chunk = reply_format.usage_chunk()
            if usage_chunk is not None:
                await stream.send([usage_chunk])
            await stream.finish()
        except ConnectionError:
            raise  # the reader is gone; nobody is left to be told
        except Exception as error:
            if not stream.response.prepared:
                raise
            await stream.fail(describe_error(error))
        return stream.response
