"""Time the CPU's products of 4-bit weights and print one Markdown row for each shape, type and way to compute them.

    python benchmarks/cpu_four_bit.py

One thread, microseconds a product, the best of three rounds. "whole": the weight is dequantized and multiplied in one
piece; "tiled": a tile at a time; "torch int4": torch's own product alone; "chosen": what the engine takes at this type
(engine/cpu_four_bit.py).
"""

import datetime
import sys
import time
from collections.abc import Callable

import torch

from lmdserve.engine.cpu_four_bit import TiledFourBitLinear, build_four_bit_linear
from lmdserve.engine.linear import FourBitLinear
from lmdserve.kernels import layout

SHAPES = ((1024, 512), (8192, 2048), (2048, 8192))  # [out_features, in_features]
ROW_COUNTS = (1, 8, 64, 512)
GROUP_SIZE = 128
ROUND_S = 0.15
SLOW_S = 1.0


def main() -> int:
    torch.set_num_threads(1)
    instruction_set = torch.backends.cpu.get_cpu_capability()
    print(f"{datetime.date.today()}, torch {torch.__version__}, {instruction_set}, one thread\n")
    print("| weight | dtype | product | " + " | ".join(f"{count} rows" for count in ROW_COUNTS) + " |")
    print("|---" * (3 + len(ROW_COUNTS)) + "|", flush=True)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for out_features, in_features in SHAPES:
                for name, product in products(out_features, in_features, dtype).items():
                    times = [time_us(product, torch.randn(count, in_features).to(dtype)) for count in ROW_COUNTS]
                    cells = " | ".join(f"{time:.0f}" for time in times)
                    kind = str(dtype).removeprefix("torch.")
                    print(f"| {out_features} x {in_features} | {kind} | {name} | {cells} |", flush=True)
    return 0


def products(
    out_features: int, in_features: int, dtype: torch.dtype
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the ways to multiply by one random weight."""
    codes = torch.randint(16, (out_features, in_features), dtype=torch.uint8)
    zeros = torch.randint(16, (out_features, in_features // GROUP_SIZE)).to(dtype)
    scales = (torch.rand(zeros.shape) * 0.01 + 0.001).to(dtype)
    rows = layout.pack_rows(codes)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scales_and_offsets = torch.stack((scales.t(), ((8 - zeros) * scales).t()), -1).contiguous()

    def int4_product(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, GROUP_SIZE, scales_and_offsets)
        return product

    return {
        "whole": FourBitLinear(rows, zeros, scales, None),
        "tiled": TiledFourBitLinear(rows, zeros, scales, None),
        "torch int4": int4_product,
        "chosen": build_four_bit_linear(codes, zeros, scales, None),
    }


def time_us(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Return the time of one product; a slow one is timed once."""
    first_s = timed_s(product, x, 1)
    if first_s > SLOW_S:
        return first_s * 1e6
    count = max(1, int(ROUND_S / first_s))
    return min(timed_s(product, x, count) for _ in range(3)) * 1e6


def timed_s(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, count: int) -> float:
    start_s = time.perf_counter()
    for _ in range(count):
        product(x)
    return (time.perf_counter() - start_s) / count


if __name__ == "__main__":
    sys.exit(main())
