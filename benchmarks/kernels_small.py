"""Times the small kernels of a step on a GPU: norm, embedding, rotary tables, SwiGLU, sampling, the 8-bit head.

Each kernel runs many times in one CUDA graph, over buffers that together exceed the L2 cache, as in a decode step whose
weights pass through it (logits are read where they were just written); the median of several replays is printed.

    python benchmarks/kernels_small.py
"""

import statistics
from collections.abc import Callable, Iterator

import torch

from lmdserve.kernels.embedding import embed
from lmdserve.kernels.rms_norm import rms_norm
from lmdserve.kernels.rope_tables import rope_tables
from lmdserve.kernels.sampling import draw_tokens, find_best
from lmdserve.kernels.sampling_thresholds import limit_tokens
from lmdserve.kernels.sampling_weights import (
    NUM_PARAMETERS,
    PENALTY_ROW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    sampling_scratch,
)
from lmdserve.kernels.swiglu import swiglu
from lmdserve.kernels.w8a16 import quantize_rows, w8a16_matmul, w8a16_scratch

HIDDEN, INTERMEDIATE, QKV, PAIRS, VOCAB = 4096, 14336, 6144, 64, 92544
ROTATED_BYTES = 150e6
NUM_REPLAYS = 7
MOST_COPIES = 64


def median_us(make: Callable[[], Callable[[], None]], num_bytes: float) -> float:
    """Return the median time of one call; `make` returns a call on fresh buffers of about num_bytes."""
    copies = int(min(MOST_COPIES, max(2, ROTATED_BYTES // max(num_bytes, 1))))
    calls = [make() for _ in range(copies)]
    rounds = max(1, MOST_COPIES // copies)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(NUM_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * copies))
    return statistics.median(times)


def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def norm(num_rows: int, clears: bool) -> Callable[[], None]:
    x, weight, out = new(num_rows, HIDDEN), new(HIDDEN, dtype=torch.half), new(num_rows, HIDDEN, dtype=torch.half)
    zero = new(num_rows, QKV) if clears else None
    return lambda: rms_norm(x, weight, 1e-5, out, zero=zero)


def embedding(num_rows: int) -> Callable[[], None]:
    table, out = new(1000, HIDDEN, dtype=torch.half), new(num_rows, HIDDEN)
    token_ids = torch.randint(0, 1000, (num_rows,), dtype=torch.int32, device="cuda")
    slots = torch.zeros_like(token_ids)
    return lambda: embed(table, token_ids, token_ids, slots, out)


def tables(num_rows: int) -> Callable[[], None]:
    positions, rows = torch.randint(0, 256, (2, num_rows), dtype=torch.int32, device="cuda")
    frequencies, cosines, sines = new(256, PAIRS), new(num_rows, PAIRS), new(num_rows, PAIRS)
    return lambda: rope_tables(positions, frequencies, rows, cosines, sines)


def activation(num_rows: int) -> Callable[[], None]:
    gate_up, out = new(num_rows, 2 * INTERMEDIATE, dtype=torch.half), new(num_rows, INTERMEDIATE, dtype=torch.half)
    return lambda: swiglu(gate_up, out)


def sampling(num_rows: int, scale: float, temperature: float, top_k: int, top_p: float) -> Callable[[], None]:
    logits = new(num_rows, VOCAB) * scale
    parameters = torch.zeros(num_rows, NUM_PARAMETERS.value, dtype=torch.float64, device="cuda")
    columns = {TEMPERATURE: temperature, TOP_K: top_k, TOP_P: top_p, PENALTY_ROW: -1}
    for column, value in columns.items():
        parameters[:, column.value] = value
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    samples, scratch = ints(*[0] * (2 * num_rows)).view(2, -1), sampling_scratch(num_rows, VOCAB, logits.device)

    def call() -> None:
        find_best(logits, slots, parameters, samples, scratch)
        if top_k or top_p < 1.0:
            limit_tokens(logits, slots, parameters, scratch)
        if temperature:
            draw_tokens(logits, slots, slots, parameters, samples, scratch)

    return call


def head(num_rows: int, bits: int) -> Callable[[], None]:
    weight = new(VOCAB, HIDDEN, dtype=torch.half)
    x, out = new(num_rows, HIDDEN, dtype=torch.half), new(num_rows, VOCAB)
    if bits == 16:
        return lambda: torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
    quantized, scratch = quantize_rows(weight), w8a16_scratch(HIDDEN, weight.dtype, weight.device)
    return lambda: w8a16_matmul(x, quantized, out, scratch)


def rows() -> Iterator[tuple[str, int, float]]:
    """Yield the name, the number of rows and the time of everything."""
    for num_rows in (1, 16, 64, 256, 4096):
        row_bytes = num_rows * HIDDEN * 6
        yield "rms_norm", num_rows, median_us(lambda n=num_rows: norm(n, False), row_bytes)
        if num_rows <= 64:
            yield "rms_norm, clears qkv", num_rows, median_us(lambda n=num_rows: norm(n, True), row_bytes)
        yield "embedding", num_rows, median_us(lambda n=num_rows: embedding(n), row_bytes)
        yield "rope_tables", num_rows, median_us(lambda n=num_rows: tables(n), num_rows * PAIRS * 8)
        yield "swiglu", num_rows, median_us(lambda n=num_rows: activation(n), num_rows * INTERMEDIATE * 6)
    for num_rows in (1, 16, 64, 128, 256):
        for bits in (16, 8):
            time_us = median_us(lambda n=num_rows, b=bits: head(n, b), VOCAB * HIDDEN * bits / 8)
            yield f"head, {bits} bits", num_rows, time_us
    kinds = {
        "greedy": (2.5, 0.0, 0, 1.0),
        "temperature": (2.5, 1.0, 0, 1.0),
        "top_k 40, top_p 0.8": (2.5, 0.8, 40, 0.8),
        "top_p 0.95": (2.5, 1.0, 0, 0.95),
        "top_p 0.95, flat": (1.0, 1.0, 0, 0.95),
    }
    for num_rows in (1, 16, 64, 256):
        for name, kind in kinds.items():
            time_us = median_us(lambda n=num_rows, k=kind: sampling(n, *k), num_rows * VOCAB * 4)
            yield f"sampling, {name}", num_rows, time_us


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; vocabulary {VOCAB}, hidden size {HIDDEN}")
    print("| kernel | rows | us |\n|---|---|---|")
    for name, num_rows, time_us in rows():
        print(f"| {name} | {num_rows} | {time_us:.2f} |", flush=True)


if __name__ == "__main__":
    main()
