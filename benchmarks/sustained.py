"""Repeat a product of many rows for a while and print its time, the GPU's clock and its power as they change.

    python benchmarks/sustained.py

Each kind of product runs back to back for a second after a pause: cuBLAS with fp16 and bf16, and ours with 4-bit
weights, SwiGLU included. A short measurement ends before the GPU lowers its clock to stay within its power limit; a
prompt, or a batch, does not. Clock and power are read through nvidia-smi, which changes nothing.
"""

import argparse
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from lmdserve.kernels.w4a16 import w4a16_swiglu
from lmdserve.kernels.w4a16_plan import Operation
from lmdserve.kernels.w4a16_tune import Product, random_weight
from lmdserve.kernels.w4a16_workspace import Workspace

PAUSE_S = 0.5
CALLS_AT_ONCE = 8
NUM_PARTS = 5
QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "25"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--shape", default="28672x4096", help="out_features x in_features (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    out_features, in_features = map(int, arguments.shape.split("x"))
    flops = 2 * arguments.rows * out_features * in_features
    print(f"{datetime.date.today()}, torch {torch.__version__}, {torch.cuda.get_device_name()}, {arguments.shape}, "
          f"{arguments.rows} rows; in each fifth of {arguments.seconds:g} s\n")  # fmt: skip
    print("| product | us | TFLOP/s at the end | SM clock, MHz | power, W |\n|---|---|---|---|---|")
    for name, call in products(arguments.rows, out_features, in_features).items():
        times_us, clocks_mhz, powers_w = observe(call, arguments.seconds)
        last = flops / float(times_us[-1]) / 1e6
        print(f"| {name} | {', '.join(times_us)} | {last:.0f} | {', '.join(clocks_mhz)} | {', '.join(powers_w)} |")
    return 0


def products(num_rows: int, out_features: int, in_features: int) -> dict[str, Callable[[], object]]:
    """Return what is repeated, by name."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(num_rows, in_features, device="cuda", dtype=dtype)
        weight = torch.randn(out_features, in_features, device="cuda", dtype=dtype)
        out = torch.empty(num_rows, out_features, device="cuda", dtype=dtype)
        calls[f"cuBLAS, {dtype}"] = lambda x=x, weight=weight, out=out: torch.mm(x, weight.t(), out=out)
    product = Product(operation=Operation.SWIGLU, out_features=out_features, in_features=in_features)
    packed, _ = random_weight(product, torch.float16, torch.device("cuda"))
    rows = torch.randn(num_rows, in_features, device="cuda", dtype=torch.float16)
    activated, workspace = rows.new_empty(num_rows, out_features // 2), Workspace(rows.device)
    calls["4-bit SwiGLU, torch.float16"] = lambda: w4a16_swiglu(rows, packed, activated, workspace)
    return calls


def observe(call: Callable[[], object], seconds: float) -> tuple[list[str], list[str], list[str]]:
    """Return the median microseconds of a call, clock and power in each part of the time."""
    call()
    torch.cuda.synchronize()
    time.sleep(PAUSE_S)
    samples: list[str] = []
    times_us: list[float] = []
    with subprocess.Popen(QUERY, stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdout is not None
        samples.append(sampler.stdout.readline())  # it has started
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS_AT_ONCE):
                call()
            stop.record()
            stop.synchronize()
            times_us.append(start.elapsed_time(stop) * 1e3 / CALLS_AT_ONCE)
        sampler.terminate()
        samples += sampler.stdout.read().splitlines()[:-1]
    clocks, powers = zip(*(map(float, sample.split(",")) for sample in samples[1:]), strict=True)
    return parts(times_us), parts(clocks), parts(powers)


def parts(values: list[float] | tuple[float, ...]) -> list[str]:
    """Return the median of each of NUM_PARTS runs of the values."""
    size = max(1, len(values) // NUM_PARTS)
    return [f"{statistics.median(values[start : start + size]):.0f}" for start in range(0, size * NUM_PARTS, size)]


if __name__ == "__main__":
    raise SystemExit(main())
