"""Prefill attention against float64 attention over what the cache holds, and its indifference to chunks and company."""

import math
from collections.abc import Sequence

import pytest
import torch
from attention_cases import PagedCase, attended, random_case
from offline_compile import assert_fits, compile_for_all, compile_kernel

from lmdserve.kernels.attention_scratch import _dequantize_kernel
from lmdserve.kernels.attention_workspace import AttentionWorkspace
from lmdserve.kernels.prefill_attention import (
    _HOPPER_TILE,
    _NUM_WARPS,
    _TILE,
    _prefill_kernel,
    prefill_attention,
)
from lmdserve.kernels.prefill_hopper import (
    _LAYOUT,
    _NUM_STAGES,
    _REGISTERS_AT_LAUNCH,
    _STEP_TOKENS,
    TILE_ROWS,
    TILE_TOKENS,
    _hopper_prefill_kernel,
)

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2.5e-2}  # weights and values are rounded to the type


def prefill(
    case: PagedCase,
    queries: Sequence[torch.Tensor],
    rows: Sequence[int],
    context_lens: Sequence[int],
    *,
    window: int | None = None,
    scratch_bytes: int = 1 << 20,
    deterministic: bool = True,
) -> torch.Tensor:
    """Attend for these queries [t, heads, D], the last of their contexts; rows name the case's sequences."""
    device = case.data.device
    query = torch.cat(list(queries))
    num_tokens, num_heads, head_dim = query.shape
    lens = [len(part) for part in queries]
    out = torch.full((num_tokens, num_heads * head_dim), math.nan, dtype=query.dtype, device=device)
    workspace = AttentionWorkspace.allocate(
        max_rows=1, num_heads=num_heads, num_kv_heads=case.data.shape[2], head_dim=head_dim, device=device,
        scratch_bytes=scratch_bytes,
    )  # fmt: skip
    workspace.scratch.fill_(255)  # NaN in every 16-bit type
    prefill_attention(
        query, case.data, case.scales, case.block_tables, case.table_rows[list(rows)],
        torch.tensor([0, *lens], dtype=torch.int32, device=device).cumsum(0).int(),
        torch.tensor(context_lens, dtype=torch.int32, device=device), out, workspace, max_query_len=max(lens),
        max_context_len=max(context_lens), bits=case.bits, softmax_scale=head_dim**-0.5, sliding_window=window,
        deterministic=deterministic,
    )  # fmt: skip
    return out


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits from a GPU; the interpreter multiplies with a BLAS, which rounds rows of a tile differently."""
    if actual.is_cuda:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def random_queries(case: PagedCase, lens: Sequence[int], num_heads: int, head_dim: int, dtype: torch.dtype) -> list:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, num_heads, head_dim, generator=generator).to(dtype).to(case.data.device) for n in lens]


HEADS = ((2, 2), (4, 2), (6, 2), (8, 2), (8, 1))
LENS = (((1, 1), (5, 63), (64, 64), (65, 130)), ((140, 300),), ((3, 200), (66, 66)))  # new tokens, context


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunks_attend_to_their_contexts(
    bits: int, head_dim: int, heads: tuple[int, int], device: torch.device
) -> None:
    num_heads, num_kv_heads = heads
    index = HEADS.index(heads)
    dtype = (torch.float16, torch.bfloat16)[index % 2]
    query_lens, context_lens = zip(*LENS[index % 3], strict=True)
    case = random_case(
        context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, bits=bits, dtype=dtype, device=device
    )
    queries = random_queries(case, query_lens, num_heads, head_dim, dtype)
    out = prefill(case, queries, range(len(queries)), context_lens)
    expected = [
        attended(query, *case.stored(row), head_dim**-0.5, None) for row, query in enumerate(queries)
    ]  # fmt: skip
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("bits", "block_size"), [(4, 16), (8, 32), (16, 16), (4, 128)])
@pytest.mark.parametrize("window", [None, 1, 70])
def test_block_sizes_and_windows(bits: int, block_size: int, window: int | None, device: torch.device) -> None:
    lens = (150, 33)
    case = random_case(
        lens, num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device, block_size=block_size
    )
    queries = random_queries(case, (100, 33), 4, 64, torch.float16)
    out = prefill(case, queries, (0, 1), lens, window=window)
    expected = [attended(query, *case.stored(row), 64**-0.5, window) for row, query in enumerate(queries)]
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("window", [None, 50])
def test_a_token_has_the_same_bits_in_any_chunk_and_company(
    bits: int, window: int | None, device: torch.device
) -> None:
    lens = (150, 90)
    case = random_case(lens, num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device)
    queries = random_queries(case, lens, 4, 64, torch.float16)
    together = prefill(case, queries, (0, 1), lens, window=window)
    for start, stop in ((0, 1), (1, 64), (64, 149), (149, 150)):
        alone = prefill(case, [queries[0][start:stop]], (0,), (stop,), window=window)
        assert_same(alone, together[start:stop])
    mixed = prefill(
        case, [queries[1][20:21], queries[0][70:150], queries[1][89:]], (1, 0, 1), (21, 150, 90), window=window
    )  # fmt: skip
    assert_same(mixed, torch.cat((together[170:171], together[70:150], together[239:])))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_sequence_that_overflowed_sees_it_and_others_do_not(bits: int, device: torch.device) -> None:
    lens = (70, 65)
    case = random_case(lens, num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device)
    block = case.block_tables[case.table_rows[0].long(), 0].long()
    (case.data if case.scales is None else case.scales)[1, block, 0, 3] = math.nan
    queries = random_queries(case, lens, 2, 64, torch.float16)
    out = prefill(case, queries, (0, 1), lens)
    assert out[3:70].isnan().all()
    expected = attended(queries[1], *case.stored(1), 64**-0.5, None)
    torch.testing.assert_close(out[70:].double(), expected, rtol=4e-3, atol=4e-3)


def test_no_tokens_are_fine(device: torch.device) -> None:
    case = random_case((3,), num_kv_heads=1, head_dim=64, bits=16, dtype=torch.float16, device=device)
    prefill(case, [torch.empty(0, 2, 64, dtype=torch.float16, device=device)], (0,), (3,))


def test_sizes_without_a_kernel_are_refused(device: torch.device) -> None:
    case = random_case((3,), num_kv_heads=1, head_dim=32, bits=16, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="head_dim"):
        prefill(case, random_queries(case, (3,), 1, 32, torch.float16), (0,), (3,))


@pytest.mark.parametrize(("bits", "head_dim", "is_dense"), [(16, 64, False), (16, 128, False), (16, 128, True),
                                                            (4, 128, False), (8, 64, False)])  # fmt: skip
def test_it_compiles_for_every_architecture(bits: int, head_dim: int, is_dense: bool) -> None:
    for options, architectures in ((_HOPPER_TILE, (90,)), (_TILE, (80, 86, 89))):
        compiled = compile_for_all(
            _prefill_kernel,
            dict.fromkeys(("data", "scales"), "*fp16" if bits == 16 else "*i32")
            | dict.fromkeys(("block_tables", "table_rows", "query_starts", "context_lens"), "*i32")
            | dict.fromkeys(("query", "out"), "*fp16")
            | dict.fromkeys(("num_sequences", "num_blocks", "table_stride"), "i32")
            | {"scale_log2": "fp32"},
            {
                "KV_HEADS": 8, "GROUP": 4, "GROUP_ROWS": 4, "HEAD_DIM": head_dim, "BLOCK_SIZE": 64, "BITS": bits,
                "WINDOW": 0, "SEQUENCES": 16, "ROWS": 128, "TILE": options["TILE"], "DENSE": is_dense,
                "COMPILED": True,
            },
            architectures=architectures, num_warps=_NUM_WARPS, num_stages=options["num_stages"], wants_sass=True,
        )  # fmt: skip
        for kernel in compiled.values():
            assert_fits(kernel)
            # On Hopper the assembler waits for each product when it loses sight of the sums' registers.
            assert kernel.count("WARPGROUP.DEPBAR") <= 6


@pytest.mark.parametrize(("head_dim", "group", "dtype"), [(128, 4, "fp16"), (64, 7, "bf16")])
def test_the_kernel_for_hopper_compiles(head_dim: int, group: int, dtype: str) -> None:
    compiled = compile_kernel(
        _hopper_prefill_kernel,
        {"keys": f"tensordesc<{dtype}[{_STEP_TOKENS}, {head_dim}],{_LAYOUT!r}>"}
        | {"values": f"tensordesc<{dtype}[{TILE_TOKENS}, {head_dim}],{_LAYOUT!r}>"}
        | dict.fromkeys(("query", "out"), f"*{dtype}")
        | dict.fromkeys(("query_starts", "context_lens"), "*i32")
        | {"num_sequences": "i32", "num_blocks": "i32", "scale_log2": "fp32"},
        {
            "KV_HEADS": 8, "GROUP": group, "GROUP_ROWS": 2 ** (group - 1).bit_length(), "HEAD_DIM": head_dim,
            "BLOCK_SIZE": 64, "SEQUENCES": 16, "ROWS": TILE_ROWS, "STEP": _STEP_TOKENS, "TILE": TILE_TOKENS,
            "STAGES": _NUM_STAGES, "PDL": True,
        },
        90, num_warps=4, maxnreg=_REGISTERS_AT_LAUNCH, wants_sass=True,
    )  # fmt: skip
    assert_fits(compiled)
    # Two groups, two loops, two waits a round: where the assembler loses sight of registers, it waits for each product.
    assert compiled.count("WARPGROUP.DEPBAR") <= 8


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (4, 128), (8, 128)])
def test_dequantizing_compiles_for_every_architecture(bits: int, head_dim: int) -> None:
    compiled = compile_for_all(
        _dequantize_kernel,
        dict.fromkeys(("data", "scales", "block_tables", "table_rows", "context_lens"), "*i32")
        | dict.fromkeys(("num_sequences", "num_blocks", "num_scratch_blocks", "table_stride"), "i32")
        | {"scratch": "*fp16"},
        {"KV_HEADS": 8, "HEAD_DIM": head_dim, "BLOCK_SIZE": 64, "BITS": bits, "SEQUENCES": 16},
    )
    for kernel in compiled.values():
        assert_fits(kernel)
