"""Measure what the host costs: the engine and the server around a device that only keeps time.

    python benchmarks/host_overhead.py --step-ms 7 --streams 1,16,64,256

The stand-in for a GPU takes `--step-ms` for every step, one after another, and gives random tokens; two steps may be in
flight, as on a GPU. Everything else is the real thing: scheduling, streams, detokenizing, and over HTTP also SSE on
sockets to clients in another process. Columns: steps a second as a share of what the device could do, output tokens a
second, the device's idle share, and CPU time of the serving process for each token and step; all from the moment when
every stream has begun until nine tenths of the tokens are there. Prompts are short, answers long.
"""

import argparse
import asyncio
import datetime
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

import lmdserve
from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.engine.blocks import BlockPool
from lmdserve.engine.loop import AsyncEngine
from lmdserve.engine.scheduler import Scheduler
from lmdserve.engine.step import Chunk, ChunkResult
from lmdserve.engine.step_inputs import build_step_inputs
from lmdserve.server.app import build, listening
from lmdserve.server.config import ServerConfig
from lmdserve.server.model import load_served_model

HEADER = (
    "| streams | over | device's speed reached | out tok/s | device idle | CPU us a token | CPU ms a step |\n"
    "|---|---|---|---|---|---|---|"
)
PROMPT_LEN = 16
BLOCK_SIZE = 64
POLL_S = 0.02
NUM_TOKENS = 65536  # drawn once, so that the stand-in spends no time on it


@dataclass(frozen=True, slots=True)
class SleepingStep:
    """When the device will be done with a step, and what comes of it."""

    done_s: float
    results: list[ChunkResult]


class SleepingDevice:
    """A StepRunner that computes nothing; its waiting releases the GIL, as a wait for a GPU does."""

    max_in_flight = 2

    def __init__(self, step_s: float, token_ids: Sequence[int]) -> None:
        self._step_s = step_s
        rng = random.Random(0)
        self._results = [ChunkResult((rng.choice(token_ids),)) for _ in range(NUM_TOKENS)]
        self._next_result = 0
        self._free_s = 0.0
        self.device_busy_s = 0.0
        self.device_idle_s = 0.0

    def launch(self, chunks: Sequence[Chunk]) -> SleepingStep:
        build_step_inputs(chunks)
        now_s = time.perf_counter()
        if self._free_s:
            self.device_idle_s += max(0.0, now_s - self._free_s)
        self._free_s = max(now_s, self._free_s) + self._step_s
        self.device_busy_s += self._step_s
        return SleepingStep(self._free_s, self._take(len(chunks)))

    def collect(self, step: SleepingStep) -> list[ChunkResult]:
        time.sleep(max(0.0, step.done_s - time.perf_counter()))
        return step.results

    def probe(self) -> None:
        pass

    def _take(self, count: int) -> list[ChunkResult]:
        if self._next_result + count > len(self._results):
            self._next_result = 0
        self._next_result += count
        return self._results[self._next_result - count : self._next_result]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=7.0)
    parser.add_argument("--streams", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long each row takes")
    parser.add_argument("--client", nargs=2, metavar=("URL", "STREAMS"), help=argparse.SUPPRESS)
    parser.add_argument("--output-len", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="print where the event loop's time goes")
    arguments = parser.parse_args()
    if arguments.client:
        uvloop.run(be_clients(arguments.client[0], int(arguments.client[1]), arguments.output_len))
        return 0
    cores = len(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, {cores} cores, step {arguments.step_ms:g} ms\n")
    print(HEADER, flush=True)
    for num_streams in map(int, arguments.streams.split(",")):
        for over in ("engine", "HTTP"):
            uvloop.run(measure(over, num_streams, arguments))
    return 0


async def measure(over: str, num_streams: int, arguments: argparse.Namespace) -> None:
    """Print one row."""
    step_s = arguments.step_ms / 1000
    output_len = max(8, round(arguments.seconds / step_s))
    folder = Path(lmdserve.__file__).parent / "demo" / "model"
    model = load_served_model(folder, name="demo", chat_template=None)
    text_ids = [i for i in range(model.tokenizer.vocab_size) if model.tokenizer.special_token(i) is None]
    device = SleepingDevice(step_s, text_ids)
    engine = build_engine(device, model.tokenizer.vocab_size, num_streams, output_len)
    run = run_engine if over == "engine" else run_http
    num_tokens = num_streams * output_len
    async with run(engine, model, num_streams, output_len) as work:
        await until_generated(engine, 2 * num_streams)
        profile = start_profile() if arguments.profile else None
        begin = read_counters(engine)
        await until_generated(engine, round(0.9 * num_tokens))
        end = read_counters(engine)
        if profile is not None:
            stop_profile(profile)
        await work
    took = [after - before for before, after in zip(begin, end, strict=True)]
    took_s, cpu_s, steps, tokens, busy_s, idle_s = took
    print(
        f"| {num_streams} | {over} | {steps * step_s / took_s:.1%} | {tokens / took_s:.0f} "
        f"| {idle_s / (idle_s + busy_s):.1%} | {cpu_s / tokens * 1e6:.1f} | {cpu_s / steps * 1e3:.2f} |",
        flush=True,
    )


async def until_generated(engine: AsyncEngine, num_tokens: int) -> None:
    """Return once there are so many tokens in all."""
    while engine.stats().generation_tokens_total < num_tokens:  # noqa: ASYNC110  # an event would cost what is measured
        await asyncio.sleep(POLL_S)


def read_counters(engine: AsyncEngine) -> tuple[float, ...]:
    """Return wall time, CPU time, steps, tokens, and the device's busy and idle time, all so far."""
    stats = engine.stats()
    return (
        time.perf_counter(), time.process_time(), stats.steps_total, stats.generation_tokens_total,
        stats.device_busy_s_total, stats.device_idle_s_total,
    )  # fmt: skip


def build_engine(device: SleepingDevice, vocab_size: int, num_streams: int, output_len: int) -> AsyncEngine:
    """Return an engine with blocks for all streams at once."""
    num_blocks = num_streams * (-(-(PROMPT_LEN + output_len) // BLOCK_SIZE) + 1)
    pool = BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    scheduler = Scheduler(
        pool, max_batch_size=num_streams, max_prefill_tokens=8192, max_decode_rows=num_streams,
        enable_prefix_caching=True,
    )  # fmt: skip
    info = EngineInfo(vocab_size=vocab_size, session_len=PROMPT_LEN + output_len, eos_token_ids=frozenset())
    return AsyncEngine(
        device, scheduler, pool, info=info, rope_base_for=lambda num_tokens: 1e6, max_live_requests=2 * num_streams,
        step_limit_s=60.0,
    )  # fmt: skip


@asynccontextmanager
async def run_engine(engine: AsyncEngine, model: object, num_streams: int, output_len: int) -> AsyncIterator[object]:
    """Give what reads all streams from the engine itself."""

    async def read(index: int) -> None:
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        prompt = [(index * 7 + place) % 100 for place in range(PROMPT_LEN)]
        async for _ in engine.generate(Request(uid=str(index), prompt_token_ids=prompt, sampling=sampling)):
            pass

    await engine.start()
    yield asyncio.gather(*(read(index) for index in range(num_streams)))
    await engine.stop(0.0)


@asynccontextmanager
async def run_http(engine: AsyncEngine, model: object, num_streams: int, output_len: int) -> AsyncIterator[object]:
    """Give what waits for client processes that read all streams over HTTP."""
    config = ServerConfig(server_port=0, log_level="WARNING")
    async with listening(build(engine, model, config), config) as url:  # type: ignore[arg-type]
        command = [sys.executable, __file__, "--output-len", str(output_len), "--client", url, str(num_streams)]
        client = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert client.stdin is not None
        assert client.stdout is not None
        await client.stdout.readline()  # it is ready
        client.stdin.write(b"go\n")
        yield asyncio.ensure_future(client.stdout.readline())
        await client.wait()


async def be_clients(url: str, num_streams: int, output_len: int) -> None:
    """Read streams in this process, as cheaply as Python can, and check that all of every answer came."""
    host, port = url.removeprefix("http://").split(":")
    print("ready", flush=True)
    sys.stdin.readline()
    counts = await asyncio.gather(*(count_events(host, int(port), i, output_len) for i in range(num_streams)))
    print("done", min(counts), max(counts), flush=True)


async def count_events(host: str, port: int, index: int, output_len: int) -> int:
    """Ask for one stream and return how many events it had."""
    prompt = ", ".join(str((index * 7 + place) % 100) for place in range(PROMPT_LEN))
    body = f'{{"prompt": [{prompt}], "max_tokens": {output_len}, "ignore_eos": true, "stream": true}}'.encode()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        + str(len(body)).encode() + b"\r\n\r\n" + body
    )  # fmt: skip
    count = 0
    is_done = False
    while not is_done:
        data = await reader.read(65536)
        if not data:
            sys.exit("a stream broke off")
        count += data.count(b"data: ")
        is_done = b"[DONE]" in data
    writer.close()
    return count


def start_profile() -> object:
    import cProfile

    profile = cProfile.Profile()
    profile.enable()
    return profile


def stop_profile(profile: object) -> None:
    import pstats

    profile.disable()  # type: ignore[attr-defined]
    pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    sys.exit(main())
