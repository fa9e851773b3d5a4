"""Times the attention kernels on a GPU: decoding against the bytes it must read, prefill against cuDNN.

    python benchmarks/kernels_attention.py [decode] [prefill]

Launches are captured into one CUDA graph that walks over copies of the cache larger than the L2, as the layers of a
model do; a time is the median of several replays over the launches of one. Floors are bytes over 4.3 TB/s (device copy
of an H200) and flops over 790 TFLOP/s (its bfloat16 product).
"""

import datetime
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmdserve.kernels.attention_workspace import AttentionWorkspace
from lmdserve.kernels.paged_attention import decode_attention
from lmdserve.kernels.prefill_attention import prefill_attention

_FLOOR_BYTES_PER_S = 4.3e12
_FLOOR_FLOPS_PER_S = 790e12
_CACHE_BYTES = 150 << 20  # read between two uses of the same copy; the L2 holds 60 MB
_LEAST_LAUNCHES = 8
_NUM_REPLAYS = 7
_BLOCK_SIZE = 64
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Model:
    """The attention of a model, head_dim 128."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128


MODELS = (Model("InternLM2.5-7B", 32, 8), Model("Llama-2-7B", 32, 32))
DECODE_SHAPES = ((1, 1024), (1, 4096), (16, 1024), (16, 4096), (64, 1024), (64, 4096), (256, 1024), (1, 131072))
PREFILL_LENS = (512, 4096, 32768)


def time_us(launches: list[Callable[[], None]]) -> float:
    """Return the median time of a launch in a graph of all of them, microseconds."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(_NUM_REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return statistics.median(times)


def random_layer(model: Model, num_blocks: int, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer of the cache with random contents."""
    places = (2, num_blocks, model.num_kv_heads, _BLOCK_SIZE)
    if bits == 16:
        return torch.randn(*places, model.head_dim, dtype=torch.float16, device=DEVICE), None
    data = torch.randint(0, 256, (*places, model.head_dim * bits // 8), dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(*places, 2, device=DEVICE).mul_(4 / 2**bits).bfloat16()
    return data, scales


def decode_launches(model: Model, num_rows: int, context_len: int, bits: int) -> tuple[list[Callable[[], None]], int]:
    """Return launches over as many copies of the cache as outgrow the L2, and the bytes of KV that each reads."""
    blocks_per_row = -(-context_len // _BLOCK_SIZE)
    num_blocks = num_rows * blocks_per_row
    row_bytes = model.head_dim * bits // 8 + (0 if bits == 16 else 4)
    num_bytes = num_rows * context_len * model.num_kv_heads * row_bytes * 2
    copies = [random_layer(model, num_blocks, bits) for _ in range(max(1, -(-_CACHE_BYTES // num_bytes)))]
    tables = torch.randperm(num_blocks, device=DEVICE).int().view(num_rows, blocks_per_row)
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    qkv = torch.randn(num_rows, width, device=DEVICE)
    angles = torch.rand(num_rows, model.head_dim // 2, device=DEVICE)
    table_rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    context_lens = torch.full((num_rows,), context_len, dtype=torch.int32, device=DEVICE)
    out = torch.empty(num_rows, model.num_heads * model.head_dim, dtype=torch.float16, device=DEVICE)
    workspace = AttentionWorkspace.allocate(
        max_rows=num_rows, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim,
        device=DEVICE, scratch_bytes=0,
    )  # fmt: skip

    cosines, sines = angles.cos(), angles.sin()

    def launch(data: torch.Tensor, scales: torch.Tensor | None) -> Callable[[], None]:
        return lambda: decode_attention(
            qkv, cosines, sines, data, scales, tables, table_rows, context_lens, out, workspace, bits=bits,
            softmax_scale=model.head_dim**-0.5, num_heads=model.num_heads,
        )  # fmt: skip

    num_launches = max(_LEAST_LAUNCHES, len(copies))
    return [launch(*copies[index % len(copies)]) for index in range(num_launches)], num_bytes


def time_decode() -> None:
    """Print a table of decode launches for each model."""
    for model in MODELS:
        heads = f"{model.num_heads} heads over {model.num_kv_heads}"
        print(f"\n{model.name}, {heads}, decoding: us, TB/s of KV, share of floor\n")
        print("| rows x context | KV 16 bits | KV 8 bits | KV 4 bits |\n|---|---|---|---|")
        for num_rows, context_len in DECODE_SHAPES:
            cells = []
            for bits in (16, 8, 4):
                launches, num_bytes = decode_launches(model, num_rows, context_len, bits)
                time = time_us(launches)
                rate = num_bytes / time * 1e6
                cells.append(f"{time:.1f} us, {rate / 1e12:.2f}, {rate / _FLOOR_BYTES_PER_S:.0%}")
            print(f"| {num_rows} x {context_len} | " + " | ".join(cells) + " |", flush=True)


def prefill_launch(model: Model, num_tokens: int, bits: int) -> Callable[[], None]:
    """Return a launch for one prompt of which nothing is cached."""
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    data, scales = random_layer(model, num_blocks, bits)
    query = torch.randn(num_tokens, model.num_heads, model.head_dim, dtype=torch.float16, device=DEVICE)
    out = torch.empty(num_tokens, model.num_heads * model.head_dim, dtype=torch.float16, device=DEVICE)
    tables = torch.randperm(num_blocks, device=DEVICE).int().view(1, num_blocks)
    table_rows = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=DEVICE)
    workspace = AttentionWorkspace.allocate(
        max_rows=1, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, device=DEVICE
    )
    return lambda: prefill_attention(
        query, data, scales, tables, table_rows, starts, starts[1:], out, workspace, max_query_len=num_tokens,
        max_context_len=num_tokens, bits=bits, softmax_scale=model.head_dim**-0.5,
    )  # fmt: skip


def cudnn_launch(model: Model, num_tokens: int) -> Callable[[], None]:
    """Return cuDNN's causal attention over contiguous keys and values of all heads."""
    shape = (3, 1, model.num_heads, num_tokens, model.head_dim)
    query, key, value = torch.randn(shape, dtype=torch.float16, device=DEVICE)

    def launch() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return launch


def time_prefill() -> None:
    """Print a table of prefill launches."""
    model = MODELS[0]
    print(f"\n{model.name}, one prompt of which nothing is cached: us, TFLOP/s, share of floor\n")
    print("| tokens | KV 16 bits | KV 8 bits | KV 4 bits | cuDNN |\n|---|---|---|---|---|")
    for num_tokens in PREFILL_LENS:
        flops = 2 * model.num_heads * num_tokens**2 * model.head_dim  # half of 4 n^2 d: causal
        launches = [*(prefill_launch(model, num_tokens, bits) for bits in (16, 8, 4)), cudnn_launch(model, num_tokens)]
        cells = []
        for launch in launches:
            time = time_us([launch] * (2 if num_tokens > 8192 else 6))
            rate = flops / time * 1e6
            cells.append(f"{time:.1f} us, {rate / 1e12:.0f}, {rate / _FLOOR_FLOPS_PER_S:.0%}")
        print(f"| {num_tokens} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the tables asked for; both without arguments."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{datetime.date.today()}, {versions}, {torch.cuda.get_device_name()}")
    wanted = sys.argv[1:] or ["decode", "prefill"]
    if "decode" in wanted:
        time_decode()
    if "prefill" in wanted:
        time_prefill()


if __name__ == "__main__":
    main()
