"""Time the 4-bit products of a model's layers and print one Markdown row for each, beside cuBLAS in the same run.

    python benchmarks/kernels_w4a16.py --models internlm2_5-7b --rows 1,16,64,256,4096
    python benchmarks/kernels_w4a16.py --models internlm2_5-7b --tune

A time is the median of replays of a CUDA graph that makes the product once for each of several copies of the weight,
which together exceed the L2 cache; the gap between launches counts. The floor is the larger of the bytes that have to
be read over 4.3 TB/s and the additions and multiplications over 790 TFLOP/s, both measured on an H200. cuBLAS
multiplies fp16 matrices and writes fp16; ours does what the engine asks of it: it adds into fp32 (add), writes 16 bits
(store, queries, keys and values of more than 64 rows) or applies SwiGLU (swiglu).
--tune first measures all tiles and writes the fastest to the user's table.
"""

import argparse
import datetime
from functools import partial

import torch
import triton

import lmdserve
from lmdserve.engine.step_buffers import MOST_ROWS_TO_ACCUMULATE
from lmdserve.kernels.w4a16_plan import ROW_BUCKETS, Operation, bucket_of, choose_tile, deterministic_tile, render
from lmdserve.kernels.w4a16_tune import Bench, Product, tune

# out_features x in_features of a layer's products: queries, keys and values; attention's output; gate and up; down.
MODELS = {
    "internlm2_5-1_8b": ((4096, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    "internlm2_5-7b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "internlm2_5-20b": ((8192, 6144), (6144, 6144), (32768, 6144), (6144, 16384)),
    "llama-2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llama-2-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "llama-2-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
OPERATIONS = (Operation.ADD, Operation.ADD, Operation.SWIGLU, Operation.ADD)
BYTES_PER_WEIGHT = 0.5 + 2 / 128 + 0.5 / 128  # codes, fp16 scale and 4-bit zero point of 128
BYTES_PER_S, FLOPS_PER_S = 4.3e12, 790e12
COPIED_BYTES = 400 << 20
HEADER = (
    "| product | rows | us | TB/s | TFLOP/s | share of floor | cuBLAS fp16 us | cuBLAS / ours | deterministic us "
    "| tile |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="internlm2_5-7b")
    parser.add_argument("--rows", default="1,16,64,128,256,1024,4096")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--tune", action="store_true", help="measure all tiles first, for every number of rows")
    arguments = parser.parse_args()
    cases = products(arguments.models.split(","), [int(rows) for rows in arguments.rows.split(",")])
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).name
    print(
        f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {gpu}, {arguments.dtype}\n"
    )
    if arguments.tune:
        for found in tune(cases, ROW_BUCKETS):
            best = found[0]
            name = f"{best.product.operation} {best.product.out_features}x{best.product.in_features}"
            print(f"{name}, {best.num_rows} rows: {best.microseconds:.2f} us, {render(best.tile)}", flush=True)
    print(HEADER)
    for product, row_counts in cases.items():
        print_rows(product, row_counts, getattr(torch, arguments.dtype))
    return 0


def products(models: list[str], row_counts: list[int]) -> dict[Product, list[int]]:
    """Return the models' products, each with the numbers of rows that it has in the engine."""
    cases: dict[Product, list[int]] = {}
    for model in models:
        for first, (out_features, in_features) in zip(OPERATIONS, MODELS[model], strict=True):
            is_qkv = (out_features, in_features) == MODELS[model][0]
            for num_rows in row_counts:
                operation = Operation.STORE if is_qkv and num_rows > MOST_ROWS_TO_ACCUMULATE else first
                product = Product(operation=operation, out_features=out_features, in_features=in_features)
                if num_rows not in cases.setdefault(product, []):
                    cases[product].append(num_rows)
    return cases


def print_rows(product: Product, row_counts: list[int], dtype: torch.dtype) -> None:
    """Print a row for each number of rows."""
    bench = Bench(product, dtype=dtype)
    matrices = _matrices(product)
    size = product.out_features * product.in_features
    for num_rows in row_counts:
        tile = choose_tile(product.operation, bucket_of(num_rows), bench.weight)
        microseconds = bench.measure_tile(num_rows, tile).microseconds
        ordered = bench.measure_tile(num_rows, deterministic_tile(bench.weight), is_ordered=True).microseconds
        x = torch.randn(num_rows, product.in_features, device="cuda", dtype=torch.float16)
        out = torch.empty(num_rows, product.out_features, device="cuda", dtype=torch.float16)
        calls = [partial(torch.mm, x, matrix.t(), out=out) for matrix in matrices]
        library = bench.time(calls[:4] if num_rows >= 1024 else calls)
        floor = max(size * BYTES_PER_WEIGHT / BYTES_PER_S, 2 * num_rows * size / FLOPS_PER_S) * 1e6
        print(
            f"| {product.operation} {product.out_features}x{product.in_features} | {num_rows} | {microseconds:.2f} "
            f"| {size * BYTES_PER_WEIGHT / microseconds / 1e6:.2f} | {2 * num_rows * size / microseconds / 1e6:.0f} "
            f"| {floor / microseconds:.0%} | {library:.2f} | {library / microseconds:.2f} | {ordered:.2f} "
            f"| {render(tile)} |",
            flush=True,
        )


def _matrices(product: Product) -> list[torch.Tensor]:
    matrix = torch.randn(product.out_features, product.in_features, device="cuda", dtype=torch.float16)
    num_copies = max(2, -(-COPIED_BYTES // (matrix.numel() * 2)))
    return [matrix, *(matrix.clone() for _ in range(num_copies - 1))]


if __name__ == "__main__":
    raise SystemExit(main())
