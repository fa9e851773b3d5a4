"""Measure how long a server takes from its process's start to /ready and to the first token of a first request.

    python benchmarks/start.py /tmp/internlm2.5-7b-awq --runs 3 -- --quant-policy 8

What follows `--` goes to `lmdserve`. The files are read once beforehand, so that weights come from the page cache, and
one start is not counted: it compiles kernels (and byte code, where the installation has none).
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

READ_BYTES = 1 << 24
POLL_S = 0.01
MAX_START_S = 600.0
PROMPT = "The quick brown fox jumps over the lazy dog"


class Start(NamedTuple):
    """One start, seconds from the process's."""

    listening_s: float
    ready_s: float
    first_token_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    own, server_options = split_at_dashes(sys.argv[1:])
    arguments = parser.parse_args(own)
    num_bytes = read_through(arguments.model)
    print(f"{arguments.model}: {num_bytes / 1e9:.2f} GB of files, {len(os.sched_getaffinity(0))} cores\n")
    print("| start | listening, s | /ready, s | first token, s |\n|---|---|---|---|")
    for index in range(arguments.runs + 1):
        start = measure(arguments.model, server_options)
        name = str(index) if index else "not counted"
        print(f"| {name} | {start.listening_s:.2f} | {start.ready_s:.2f} | {start.first_token_s:.2f} |", flush=True)
    return 0


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return what comes before `--` and what after."""
    index = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:index], arguments[index + 1 :]


def read_through(folder: Path) -> int:
    """Bring the folder's files into the page cache; return their size."""
    num_bytes = 0
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as opened:
            while piece := opened.read(READ_BYTES):
                num_bytes += len(piece)
    return num_bytes


def measure(model: Path, server_options: list[str]) -> Start:
    """Start a server, ask it for one token, stop it."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "lmdserve", "--model", str(model), "--server-port", "0", *server_options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = listening_url(process.stdout.readline())
        listening_s = time.perf_counter() - start_s
        wait_until_ready(url)
        ready_s = time.perf_counter() - start_s
        read_first_token(url, model.name)
        return Start(listening_s, ready_s, time.perf_counter() - start_s)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def listening_url(line: str) -> str:
    match = re.search(r"http://\S+?:\d+", line)
    if match is None:
        raise SystemExit(f"the server did not start: {line!r}")
    return match[0]


def wait_until_ready(url: str) -> None:
    deadline_s = time.perf_counter() + MAX_START_S
    while time.perf_counter() < deadline_s:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except OSError:
            time.sleep(POLL_S)
    raise SystemExit(f"{url} is not ready after {MAX_START_S:g} s")


def read_first_token(url: str, model: str) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "stream": True, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=MAX_START_S) as reply:
        for line in reply:
            if line.startswith(b"data:"):
                return
    raise SystemExit("the server sent no token")


if __name__ == "__main__":
    sys.exit(main())
