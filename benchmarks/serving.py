"""Start a server, load it at several levels of concurrency and print one Markdown row for each.

    python benchmarks/serving.py --model demo --concurrency 1,8,32 [server options]

The rows are what `benchmarks/RESULTS.md` holds. Options that this script does not know go to the server.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

import lmdserve

HEADER = (
    "| model | server options | streams | in / out tokens | out tok/s | TTFT p50 / p99 ms | ITL p50 / p99 ms |\n"
    "|---|---|---|---|---|---|---|"
)
START_TIMEOUT_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--input-len", default="128")
    parser.add_argument("--output-len", default="128")
    parser.add_argument("--num-prompts", default="64")
    arguments, server_options = parser.parse_known_args()

    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {hardware()}\n")
    print(HEADER, flush=True)
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "lmdserve", "--model", arguments.model, "--server-port", "0", *server_options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = read_url(server)
            if url is None:
                log.seek(0)
                sys.exit(f"the server did not start:\n{log.read()}")
            for level in arguments.concurrency.split(","):
                print(row(arguments, server_options, measure(url, level, arguments)), flush=True)
        finally:
            server.terminate()
            server.wait()
    return 0


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


def measure(url: str, level: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Run the load generator at one level of concurrency and return its report."""
    command = [sys.executable, "-m", "lmdserve.clients.bench", url, "--concurrency", level, "--ignore-eos"]
    command += ["--input-len", arguments.input_len, "--output-len", arguments.output_len]
    command += ["--num-prompts", str(max(8, min(int(arguments.num_prompts), 4 * int(level)))), "--json", "-"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)["levels"][0]  # type: ignore[no-any-return]


def row(arguments: argparse.Namespace, server_options: list[str], report: dict[str, object]) -> str:
    """Return one row of the table."""
    cells = [
        arguments.model,
        " ".join(server_options) or "-",
        report["concurrency"],
        f"{arguments.input_len} / {arguments.output_len}",
        f"{report['output_token_throughput_per_s']:.0f}",
        f"{report['median_ttft_ms']:.0f} / {report['p99_ttft_ms']:.0f}",
        f"{report['median_itl_ms']:.1f} / {report['p99_itl_ms']:.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def hardware() -> str:
    """Return the GPU's name, or the CPU's with the number of cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    sys.exit(main())
