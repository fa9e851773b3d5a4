"""Load a server over HTTP and print one Markdown row for each number of streams.

    python benchmarks/serving.py --model demo --streams 1,16,64,256 [options of the server]
    python benchmarks/serving.py --url http://127.0.0.1:23333 --model demo --streams 1,16,64,256

The first form measures the engine alone, in a process of its own, and then a server that it starts with the same
options; `--max-batch-size` is 256 unless given. Both get the same work: all streams are asked for at once, each with
`--input-len` random tokens of its own, and answer `--output-len` tokens, greedy. Every number comes from the run of
median throughput of `--repeats`, after a shorter run that is not counted.

out tok/s: all output tokens over the time from the first request to the last token. TTFT: from the common start to a
stream's first event, its place in the queue included. ITL: time between arrivals at the client; tokens that arrive
together count once. HTTP costs: the share of the engine's own tokens a second that is missing over HTTP. busiest
client: CPU time over time of the busiest process that reads the streams; near 100 % the row measures the client.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stream_clients import STREAMS_PER_PROCESS, LevelRecord, read_streams

import lmdserve

HEADER = (
    "| model | server options | streams | in / out tokens | out tok/s | engine alone | HTTP costs "
    "| TTFT p50 / p99 ms | ITL p50 / p99 ms | busiest client |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
START_TIMEOUT_S = 300.0
WARM_UP_OUTPUT_LEN = 8
MAX_BATCH_SIZE = ("--max-batch-size", "256")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--streams", default="1,16,64,256")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-engine", action="store_true", help="leave the engine alone unmeasured")
    arguments, options = parser.parse_known_args()
    levels = [int(level) for level in arguments.streams.split(",")]
    server_options = options if MAX_BATCH_SIZE[0] in options else [*MAX_BATCH_SIZE, *options]

    print(
        f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {version('torch')}, {hardware()}\n\n{HEADER}"
    )
    alone: dict[int, float] = {}
    if arguments.url is None and not arguments.no_engine:
        alone = measure_engine(levels, arguments, server_options)
    with running_server(arguments, server_options) as url:
        for level in levels:
            record = measure(url, level, arguments)
            print(row(arguments, options, record, alone.get(level)), flush=True)
    return 0


def measure_engine(levels: Sequence[int], arguments: argparse.Namespace, options: list[str]) -> dict[int, float]:
    """Return the engine's own output tokens a second at each level; the GPU is free again afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_be_engine, args=(levels, arguments, options, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()  # type: ignore[no-any-return]
    except EOFError:
        sys.exit("the engine alone could not be measured; see above")
    finally:
        process.join()


def _be_engine(levels: Sequence[int], arguments: argparse.Namespace, options: list[str], pipe: Connection) -> None:
    import uvloop

    from engine import Work, run, shortened
    from lmdserve.engine.config import EngineConfig
    from lmdserve.engine.load_engine import load_engine
    from lmdserve.server.options import OptionParser, add_options, read_options

    parser = OptionParser()
    add_options(parser, EngineConfig, title="engine")
    known, _ = parser.parse_known_args(["--model", arguments.model, *options])
    engine = load_engine(read_options(EngineConfig, known))

    async def run_all() -> dict[int, float]:
        rng = random.Random(1)
        await engine.start()
        found = {}
        for level in levels:
            work = Work("batch", level, arguments.input_len, arguments.output_len)
            await run(engine, shortened(work), rng)
            found[level] = statistics.median(
                [work.value(await run(engine, work, rng)) for _ in range(arguments.repeats)]
            )
        await engine.stop(0.0)
        return found

    pipe.send(uvloop.run(run_all()))


@contextmanager
def running_server(arguments: argparse.Namespace, options: list[str]) -> Iterator[str]:
    """Give the address of the server: the one that runs, or one of our own that ends afterwards."""
    if arguments.url is not None:
        yield arguments.url
        return
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "lmdserve", "--model", arguments.model, "--server-port", "0", *options]
        command += [] if "--log-level" in options else ["--log-level", "WARNING"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = read_url(server)
            if url is None:
                log.seek(0)
                sys.exit(f"the server did not start:\n{log.read()}")
            yield url
        finally:
            server.terminate()
            server.wait()


def read_url(server: "subprocess.Popen[str]") -> str | None:
    """Return the address that the server announces, or None when it ends or hangs without one."""
    assert server.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_S, server.kill)
    watchdog.start()
    try:
        for line in server.stdout:
            if found := re.search(r"http://\S+?:\d+", line):
                return found.group()
    finally:
        watchdog.cancel()
    return None


def measure(url: str, level: int, arguments: argparse.Namespace) -> LevelRecord:
    """Return the run of median throughput at one number of streams."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    assert host is not None
    assert port is not None
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    rng = random.Random(level)
    num_processes = min(-(-level // STREAMS_PER_PROCESS), max(1, len(os.sched_getaffinity(0)) - 2))

    def read(output_len: int) -> LevelRecord:
        # Ids that every vocabulary of ours holds and that are not its first, special ones.
        prompts = [rng.choices(range(100, 3000), k=arguments.input_len) for _ in range(level)]
        record = read_streams(host, port, model, prompts, output_len, num_processes)
        assert all(stream.num_tokens == output_len for stream in record.streams)
        return record

    read(WARM_UP_OUTPUT_LEN)
    records = sorted((read(arguments.output_len) for _ in range(arguments.repeats)), key=lambda run: run.tokens_per_s)
    return records[len(records) // 2]


def row(arguments: argparse.Namespace, options: list[str], record: LevelRecord, alone: float | None) -> str:
    """Return one row of the table."""
    first_tokens_ms = [stream.first_token_s * 1000 for stream in record.streams]
    gaps_ms = [gap * 1000 for stream in record.streams for gap in stream.gaps_s]
    cells = [
        Path(arguments.model).name,
        " ".join(options) or "-",
        len(record.streams),
        f"{arguments.input_len} / {arguments.output_len}",
        f"{record.tokens_per_s:.0f}",
        "-" if alone is None else f"{alone:.0f}",
        "-" if alone is None else f"{1 - record.tokens_per_s / alone:.1%}",
        f"{percentile(first_tokens_ms, 50):.0f} / {percentile(first_tokens_ms, 99):.0f}",
        f"{percentile(gaps_ms, 50):.1f} / {percentile(gaps_ms, 99):.1f}",
        f"{record.busiest_client:.0%}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that `percent` of the values do not exceed (nearest rank)."""
    ordered: list[Any] = sorted(values)
    return float(ordered[max(0, -(-len(ordered) * percent // 100) - 1)])


def hardware() -> str:
    """Return the GPU's name, or the CPU's with the number of cores this process may use."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    sys.exit(main())
