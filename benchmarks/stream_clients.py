"""Processes that read many answers over HTTP, as cheaply as Python can, and note when what arrived.

Owns the clients of `serving.py`: each process opens its share of the streams at an agreed moment, one connection each,
and reads them to the end. It never parses an event: a stream's first `data:` is its first token, what arrives together
counts as one arrival, and the number of tokens is the server's own, from the usage at the end. No torch here.
"""

import asyncio
import json
import multiprocessing
import re
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import uvloop

STREAMS_PER_PROCESS = 32
CONNECT_LEAD_S = 0.3  # from the agreement on the moment to the moment
TAIL_BYTES = 4096  # hold the usage and the end of a stream
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


class StreamRecord(NamedTuple):
    """One answer; times in seconds since the moment when all streams were asked for."""

    first_token_s: float
    end_s: float
    gaps_s: list[float]  # between arrivals that carried events
    num_tokens: int


class LevelRecord(NamedTuple):
    """All streams of a level, and how busy the busiest process that read them was."""

    streams: list[StreamRecord]
    busiest_client: float

    @property
    def tokens_per_s(self) -> float:
        return sum(stream.num_tokens for stream in self.streams) / max(stream.end_s for stream in self.streams)


def read_streams(
    host: str, port: int, model: str, prompts: Sequence[Sequence[int]], output_len: int, num_processes: int
) -> LevelRecord:
    """Ask for greedy answers of `output_len` tokens to all prompts at once and return what came when."""
    context = multiprocessing.get_context("spawn")
    bodies = [body_of(model, prompt, output_len) for prompt in prompts]
    pipes, processes = [], []
    for index in range(num_processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_be_client, args=(host, port, bodies[index::num_processes], theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()  # it is ready
    start_s = time.perf_counter() + CONNECT_LEAD_S
    for pipe in pipes:
        pipe.send(start_s)
    parts = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return LevelRecord(
        [stream for part in parts for stream in part.streams], max(part.busiest_client for part in parts)
    )


def body_of(model: str, prompt: Sequence[int], output_len: int) -> bytes:
    """Return the body of a request for one streamed completion of full length."""
    fields = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


class _Stream(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, body: bytes, start_s: float) -> None:
        self._body = body
        self._start_s = start_s
        self._arrivals_s: list[float] = []
        self._tail = b""
        self.done: asyncio.Future[StreamRecord] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(self._body)}\r\n\r\n"
        self._transport = transport
        transport.write(head.encode() + self._body)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if b"data: " in data:
            self._arrivals_s.append(time.perf_counter() - self._start_s)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if b"[DONE]" in self._tail:
            self._transport.close()
            self.done.set_result(self._record())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"a stream broke off; the last of it was {self._tail!r}"))

    def _record(self) -> StreamRecord:
        usage = _USAGE.findall(self._tail)
        gaps = [later - earlier for earlier, later in zip(self._arrivals_s, self._arrivals_s[1:], strict=False)]
        return StreamRecord(self._arrivals_s[0], self._arrivals_s[-1], gaps, int(usage[-1]))


def _be_client(host: str, port: int, bodies: list[bytes], pipe: Connection) -> None:
    uvloop.run(_read_all(host, port, bodies, pipe))


async def _read_all(host: str, port: int, bodies: list[bytes], pipe: Connection) -> None:
    pipe.send("ready")
    start_s: float = pipe.recv()
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start_s - time.perf_counter())
    busy_s = time.process_time()
    connections = [loop.create_connection(lambda body=body: _Stream(body, start_s), host, port) for body in bodies]
    streams = [stream for _, stream in await asyncio.gather(*connections)]
    records = await asyncio.gather(*(stream.done for stream in streams))
    busy_s = time.process_time() - busy_s
    pipe.send(LevelRecord(list(records), busy_s / (time.perf_counter() - start_s)))
