"""Attention kernels at sizes that only a GPU reaches: long contexts, full batches, caches past 2**31 elements."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from attention_cases import attended, random_case
from test_paged_attention import assert_appended, decode
from test_prefill_attention import prefill, random_queries

from lmdserve.kernels import paged_attention
from lmdserve.kernels.attention_workspace import AttentionWorkspace
from lmdserve.kernels.paged_attention import decode_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (16, 8), (14, 2), (40, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decoding_a_ragged_batch(bits: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    lens = (1, 63, 64, 65, 0, 1000, 2049, 17, 5000, 512, 511, 513)
    case = random_case(
        lens, num_kv_heads=heads[1], head_dim=128, bits=bits, dtype=dtype, device=DEVICE, num_unwritten=1
    )
    for num_splits in (132, 8):
        out, expected, new = decode(case, num_heads=heads[0], dtype=dtype, num_splits=num_splits)
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert_appended(case, new, dtype)


@pytest.mark.parametrize(
    ("bits", "tile_tokens", "num_warps", "num_stages"),
    [(4, 64, 2, 2), (8, 64, 2, 2), (16, 32, 2, 2), (4, 64, 1, 3), (8, 64, 1, 2), (16, 32, 1, 4)],
)
@pytest.mark.parametrize("num_rows", [1, 12])
def test_decoding_with_other_tiles(
    bits: int, tile_tokens: int, num_warps: int, num_stages: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a part is walked changes no result beyond rounding."""
    monkeypatch.setitem(paged_attention._TILE_TOKENS, bits, tile_tokens)
    monkeypatch.setitem(paged_attention._NUM_WARPS, bits, num_warps)
    monkeypatch.setitem(paged_attention._NUM_STAGES, bits, num_stages)
    lens = (5000, 1, 63, 64, 65, 0, 1000, 2049, 17, 512, 511, 513)[:num_rows]
    case = random_case(
        lens, num_kv_heads=8, head_dim=128, bits=bits, dtype=torch.float16, device=DEVICE, num_unwritten=1
    )
    for num_splits in (132, 8):
        out, expected, new = decode(case, num_heads=32, dtype=torch.float16, num_splits=num_splits)
        torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
        assert_appended(case, new, torch.float16)


@pytest.mark.parametrize("bits", [4, 16])
def test_decoding_a_full_batch(bits: int) -> None:
    lens = tuple(1 + (37 * row) % 700 for row in range(256))
    case = random_case(
        lens, num_kv_heads=8, head_dim=128, bits=bits, dtype=torch.float16, device=DEVICE, num_unwritten=1
    )
    out, expected, new = decode(case, num_heads=32, dtype=torch.float16, num_splits=132)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
    assert_appended(case, new, torch.float16)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_decoding_repeats_bit_for_bit(bits: int) -> None:
    """Parts are added in their own order, whichever program comes last."""
    case = random_case((20_000, 3000), num_kv_heads=8, head_dim=128, bits=bits, dtype=torch.float16, device=DEVICE)
    first, *others = [decode(case, num_heads=32, dtype=torch.float16, num_splits=132)[0] for _ in range(4)]
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("length", [131_072, 262_144])
def test_decoding_a_long_context(bits: int, length: int) -> None:
    case = random_case(
        (length, 100), num_kv_heads=2, head_dim=128, bits=bits, dtype=torch.float16, device=DEVICE, num_unwritten=1
    )
    out, expected, _ = decode(case, num_heads=8, dtype=torch.float16, num_splits=132)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_addresses_past_the_range_of_int32(bits: int) -> None:
    """A sequence whose blocks are the last ones of a cache of more than 2**31 elements a side."""
    num_kv_heads, head_dim, block_size, num_heads = 8, 128, 64, 32
    width = head_dim if bits == 16 else head_dim * bits // 8
    num_blocks = 2**31 // (num_kv_heads * block_size * width) + 10
    small = random_case(
        (300,), num_kv_heads=num_kv_heads, head_dim=head_dim, bits=bits, dtype=torch.float16, device=DEVICE,
        num_unwritten=1,
    )  # fmt: skip
    shape = (2, num_blocks, num_kv_heads, block_size)
    data = torch.zeros(*shape, width, dtype=small.data.dtype, device=DEVICE)
    scales = None if small.scales is None else torch.zeros(*shape, 2, dtype=torch.bfloat16, device=DEVICE)
    table = small.block_tables[small.table_rows[0].long(), :5].long()
    moved = torch.arange(num_blocks - 5, num_blocks, device=DEVICE)
    data[:, moved] = small.data[:, table]
    if scales is not None and small.scales is not None:
        scales[:, moved] = small.scales[:, table]
    small.data, small.scales = data, scales
    small.block_tables[small.table_rows[0].long(), :5] = moved.int()
    out, expected, new = decode(small, num_heads=num_heads, dtype=torch.float16, num_splits=132)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
    assert_appended(small, new, torch.float16)
    queries = random_queries(small, (130,), num_heads, head_dim, torch.float16)
    prefilled = prefill(small, queries, (0,), (300,), scratch_bytes=1 << 24)
    wanted = attended(queries[0], *small.stored(0), head_dim**-0.5, None)
    torch.testing.assert_close(prefilled.double(), wanted, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 16])
def test_decoding_in_a_graph_follows_the_lengths_on_the_device(bits: int) -> None:
    """One captured launch serves growing contexts: each replay appends a token and sees all before it."""
    num_heads, num_kv_heads, head_dim, lens = 32, 8, 128, (62, 129, 0, 700)
    case = random_case(
        tuple(n + 40 if n else 0 for n in lens), num_kv_heads=num_kv_heads, head_dim=head_dim, bits=bits,
        dtype=torch.float16, device=DEVICE, num_unwritten=41,
    )  # fmt: skip
    qkv = torch.randn(4, (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE)
    cosines, sines = torch.ones(4, 64, device=DEVICE), torch.zeros(4, 64, device=DEVICE)
    context_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    out = torch.full((4, num_heads * head_dim), math.nan, dtype=torch.float16, device=DEVICE)
    workspace = AttentionWorkspace.allocate(
        max_rows=4, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device=DEVICE, scratch_bytes=0
    )

    def launch() -> None:
        decode_attention(
            qkv, cosines, sines, case.data, case.scales, case.block_tables, case.table_rows, context_lens, out,
            workspace, bits=bits, softmax_scale=head_dim**-0.5, num_heads=num_heads,
        )  # fmt: skip

    context_lens -= 1
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for step in range(30):
        qkv.normal_()
        current = [n + step if n else 0 for n in lens]
        context_lens.copy_(torch.tensor(current, dtype=torch.int32))
        graph.replay()
        case.lens = current
        query = qkv.view(4, -1, head_dim)[:, :num_heads]
        for row, length in enumerate(current):
            if length > 0:
                wanted = attended(query[row : row + 1], *case.stored(row), head_dim**-0.5, None)
                torch.testing.assert_close(out[row : row + 1].double(), wanted, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((32, 32), 128), ((14, 2), 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prefill_of_unequal_chunks(bits: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    query_lens, context_lens = (1, 700, 64, 2, 1000), (1, 700, 1500, 2049, 1000)
    case = random_case(context_lens, num_kv_heads=heads[1], head_dim=head_dim, bits=bits, dtype=dtype, device=DEVICE)
    queries = random_queries(case, query_lens, heads[0], head_dim, dtype)
    for scratch_bytes, deterministic in ((1 << 27, True), (1 << 27, False), (0, True)):
        out = prefill(
            case, queries, range(5), context_lens, scratch_bytes=scratch_bytes, deterministic=deterministic
        )  # fmt: skip
        expected = [attended(query, *case.stored(row), head_dim**-0.5, None) for row, query in enumerate(queries)]
        torch.testing.assert_close(out.double(), torch.cat(expected), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [((1000,), (1500,)), ((4096,), (4096,)), ((33,) * 17, (65,) * 17), ((300,) * 16, (1100,) * 16)],
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("heads", [(32, 8), (32, 32)], ids=str)
def test_prefill_of_one_chunk_and_of_many(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], bits: int, heads: tuple[int, int]
) -> None:
    """A launch has as many programs past the last tile as it has sequences; sixteen once read and waited at random."""
    dtype = torch.float16
    case = random_case(context_lens, num_kv_heads=heads[1], head_dim=128, bits=bits, dtype=dtype, device=DEVICE)
    queries = random_queries(case, query_lens, heads[0], 128, dtype)
    out = prefill(
        case, queries, range(len(queries)), context_lens, scratch_bytes=1 << 28, deterministic=False
    )  # fmt: skip
    expected = [attended(query, *case.stored(row), 128**-0.5, None) for row, query in enumerate(queries)]
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (16, 8)], ids=str)
def test_prefill_bits_depend_on_the_token_alone(bits: int, window: int | None, heads: tuple[int, int]) -> None:
    lens = (2000, 777)
    case = random_case(lens, num_kv_heads=heads[1], head_dim=128, bits=bits, dtype=torch.bfloat16, device=DEVICE)
    queries = random_queries(case, lens, heads[0], 128, torch.bfloat16)
    together = prefill(case, queries, (0, 1), lens, window=window, scratch_bytes=1 << 26)
    for scratch_bytes in (1 << 26, 0):
        for start, stop in ((0, 1), (1, 64), (64, 900), (900, 1999), (1999, 2000)):
            alone = prefill(case, [queries[0][start:stop]], (0,), (stop,), window=window, scratch_bytes=scratch_bytes)
            assert torch.equal(alone, together[start:stop])
        rows = [queries[1][5:6], queries[0][70:150], queries[1][500:777], queries[0][1001:1002]]
        mixed = prefill(case, rows, (1, 0, 1, 0), (6, 150, 777, 1002), window=window, scratch_bytes=scratch_bytes)
        wanted = (together[2005:2006], together[70:150], together[2500:2777], together[1001:1002])
        assert torch.equal(mixed, torch.cat(wanted))
