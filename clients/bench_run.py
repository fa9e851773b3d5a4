"""Sends the requests of a benchmark and notes when what arrived. Latencies are seen from here: network included."""

import asyncio
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum

from .bench_workload import BenchOptions, Calibration, PlannedRequest, calibration_prompts, make_payload
from .http import AsyncClient
from .settings import SettingError
from .wire import ClientError, Json, ProtocolError, Usage, parse_usage

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_SPARE_FILES = 64  # open files beside the connections


class Outcome(Enum):
    """How a request ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    LEFT = "left"  # this client went away, as planned


@dataclass(slots=True)
class Record:
    """One request as it went; times are of one monotonic clock, in seconds."""

    started_s: float
    outcome: Outcome = Outcome.FAILURE
    error: str | None = None
    first_token_s: float | None = None  # None also when no token had text, which cannot be seen from here
    last_token_s: float | None = None
    ended_s: float | None = None  # the chunk with the finish_reason
    gaps_s: list[float] = field(default_factory=list)  # between chunks that carried tokens
    usage: Usage | None = None
    num_chunks: int = 0  # that carried tokens

    def add(self, chunk: Json, now_s: float) -> None:
        """Note a chunk of the stream, which arrived at `now_s`."""
        try:
            has_token, is_end = _look_at(chunk)
            self.usage = parse_usage(chunk.get("usage")) or self.usage
        except (AttributeError, KeyError, TypeError):
            raise ProtocolError("a chunk of the stream has no `choices` as the API defines them") from None
        if is_end:
            self.ended_s = now_s
        if not has_token:
            return
        if self.last_token_s is None:
            self.first_token_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = now_s
        self.num_chunks += 1


@dataclass(frozen=True, slots=True)
class LevelResult:
    """All requests of one level of concurrency."""

    concurrency: int
    records: list[Record]
    num_not_sent: int  # the level's time was over before their turn
    duration_s: float


async def calibrate(client: AsyncClient, options: BenchOptions) -> Calibration:
    """Ask the server how it counts random words. Raises ClientError when it cannot be asked."""
    counts = []
    for num_words, text in calibration_prompts():
        payload = make_payload(text, max_tokens=1, options=options)
        record = await _send(client, options, PlannedRequest(payload), _now() + options.request_timeout_s)
        if record.usage is None:
            raise ClientError(record.error or "the server sends no token counts")
        counts.append((num_words, record.usage.prompt_tokens))
    return Calibration.from_counts(counts[0], counts[1])


async def warm_up(client: AsyncClient, options: BenchOptions, requests: Sequence[PlannedRequest]) -> None:
    """Send requests that are not counted. Raises ClientError when one fails: the benchmark would as well."""
    for request in requests:
        record = await _send(client, options, request, _now() + options.request_timeout_s)
        if record.error is not None:
            raise ClientError(f"the warm-up request failed: {record.error}")


async def run_level(
    client: AsyncClient, options: BenchOptions, requests: Sequence[PlannedRequest], *, concurrency: int
) -> LevelResult:
    """Send `requests`, at most `concurrency` at once and none before its arrival, until all ended or time is up."""
    _allow_open_files(concurrency + _SPARE_FILES)
    queue, records = iter(requests), list[Record]()
    started_s = _now()
    deadline_s = started_s + options.max_duration_s

    async def work() -> None:
        for request in _until(deadline_s, queue):
            arrival_s = started_s + request.arrival_s
            if arrival_s >= deadline_s:
                return
            await asyncio.sleep(max(0.0, arrival_s - _now()))
            records.append(await _send(client, options, request, deadline_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(work())
    return LevelResult(concurrency, records, len(requests) - len(records), _now() - started_s)


def _until(deadline_s: float, queue: Iterator[PlannedRequest]) -> Iterator[PlannedRequest]:
    while _now() < deadline_s and (request := next(queue, None)) is not None:
        yield request


async def _send(client: AsyncClient, options: BenchOptions, request: PlannedRequest, deadline_s: float) -> Record:
    """Send one request and read its answer; every failure ends up in the record."""
    record = Record(started_s=_now())
    timeout_s = min(options.request_timeout_s, deadline_s - record.started_s)
    try:
        async with asyncio.timeout(timeout_s):
            await _read(client, _PATHS[options.endpoint], request, record)
    except TimeoutError:
        record.error = f"not finished after {timeout_s:.1f} s"
    except ClientError as error:
        record.error = str(error)
    else:
        if record.outcome is not Outcome.LEFT:
            _judge(record)
    return record


async def _read(client: AsyncClient, path: str, request: PlannedRequest, record: Record) -> None:
    async with aclosing(client.stream(path, request.payload)) as chunks:
        async for chunk in chunks:
            record.add(chunk, _now())
            if request.leave_after_chunks is not None and record.num_chunks >= request.leave_after_chunks:
                record.outcome = Outcome.LEFT
                return


def _judge(record: Record) -> None:
    """Call a complete answer a success; one that lacks its end or its counts cannot be counted."""
    if record.ended_s is None:
        record.error = "the answer has no finish_reason"
    elif record.usage is None:
        record.error = "the server sent no token counts (stream_options.include_usage)"
    else:
        record.outcome = Outcome.SUCCESS


def _look_at(chunk: Json) -> tuple[bool, bool]:
    """Return whether a chunk carries a token, and whether it ends an answer."""
    has_token = is_end = False
    for choice in chunk["choices"]:
        delta = choice.get("delta", choice)  # completions have their text in the choice itself
        has_token = has_token or bool(delta.get("content") or delta.get("tool_calls") or delta.get("text"))
        is_end = is_end or choice.get("finish_reason") is not None
    return has_token, is_end


def _allow_open_files(num_files: int) -> None:
    """Raise this process's limit of open files where it is too low for the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < num_files:
        if hard != resource.RLIM_INFINITY and hard < num_files:
            raise SettingError(f"{num_files} open files are needed and the system allows {hard}; lower --concurrency")
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))


def _now() -> float:
    return time.perf_counter()
