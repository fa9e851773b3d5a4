"""Decode attention against float64 attention over what the cache holds, and what it appends against the reference."""

import math
from collections.abc import Sequence

import pytest
import torch
from attention_cases import PagedCase, attended, random_case, rotated, rotation
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels import layout, reference
from lmdserve.kernels.attention_workspace import AttentionWorkspace
from lmdserve.kernels.paged_attention import (
    _NUM_STAGES,
    _NUM_WARPS,
    _OLDER_TILE_TOKENS,
    _TILE_TOKENS,
    _decode_kernel,
    decode_attention,
)

EPS = 1e-6
# Queries, weights and the output are rounded to 16 bits (to float16 inside, when the cache is quantized).
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


def decode(
    case: PagedCase,
    *,
    num_heads: int,
    dtype: torch.dtype,
    qkv_dtype: torch.dtype = torch.float32,
    window: int | None = None,
    has_norm: bool = False,
    num_splits: int = 3,
    seed: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode one token of each sequence; return its output, what float64 makes of it, and the new keys and values."""
    device = case.data.device
    num_rows, num_kv_heads = len(case.lens), case.data.shape[2]
    head_dim = case.data.shape[-1] * 16 // case.bits if case.bits == 16 else case.data.shape[-1] * 8 // case.bits
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).mul(2).to(qkv_dtype)
    norms = [torch.rand(head_dim, generator=generator).add(0.5).to(dtype).to(device) for _ in range(2)]
    q_norm, k_norm = norms if has_norm else (None, None)
    qkv = qkv.to(device)
    cosines, sines = rotation((case.context_lens - 1).clamp(min=0), head_dim)
    out = torch.full((num_rows, num_heads * head_dim), math.nan, dtype=dtype, device=device)
    workspace = AttentionWorkspace.allocate(
        max_rows=num_rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device=device,
        scratch_bytes=0, num_splits=num_splits,
    )  # fmt: skip
    workspace.partial_outputs.fill_(math.nan)
    workspace.partial_weights.fill_(math.nan)
    decode_attention(
        qkv, cosines, sines, case.data, case.scales, case.block_tables, case.table_rows, case.context_lens, out,
        workspace, bits=case.bits, softmax_scale=head_dim**-0.5, num_heads=num_heads, sliding_window=window,
        q_norm=q_norm, k_norm=k_norm, norm_eps=EPS,
    )  # fmt: skip
    assert not workspace.counters.any()
    heads = qkv.view(num_rows, -1, head_dim)
    query = rotated(heads[:, :num_heads], cosines, sines, q_norm, EPS)
    keys = rotated(heads[:, num_heads : num_heads + num_kv_heads], cosines, sines, k_norm, EPS)
    new = torch.stack((keys, heads[:, num_heads + num_kv_heads :].double()), 1)  # [rows, 2, kv_heads, D]
    expected = torch.zeros(num_rows, num_heads * head_dim, dtype=torch.float64, device=device)
    for row, length in enumerate(case.lens):
        if length > 0:
            expected[row] = attended(query[row : row + 1], *case.stored(row), head_dim**-0.5, window)[0]
    return out, expected, new


def assert_appended(case: PagedCase, new: torch.Tensor, dtype: torch.dtype) -> None:
    """The cache holds the reference's codes of new keys and values, or a neighbour where rotation rounds otherwise."""
    for row, length in enumerate(case.lens):
        if length == 0:
            continue
        block = int(case.block_tables[case.table_rows[row].long(), (length - 1) // case.block_size])
        data = case.data[:, block, :, (length - 1) % case.block_size]
        if case.scales is None:
            torch.testing.assert_close(data.double(), new[row], rtol=TOLERANCE[dtype], atol=1e-4)
            continue
        scales = case.scales[:, block, :, (length - 1) % case.block_size]
        codes, wanted_scales = reference.quantize_kv(new[row].float(), case.bits)
        torch.testing.assert_close(scales.float(), wanted_scales.float(), rtol=2.0**-7, atol=0)
        difference = unpacked(data, case.bits) - unpacked(codes, case.bits)
        assert difference.abs().max() <= 1
        assert torch.equal(scales[1], wanted_scales[1]), "values are not rotated"
        assert torch.equal(data[1], codes[1]), "values are not rotated"


def unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes.int()
    return layout.unpack_rows(codes, codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=torch.int32))


HEADS = ((2, 2), (4, 2), (6, 2), (8, 2), (8, 1))
LENS = ((1, 63, 64, 65, 0), (1000,), (130, 0, 17, 2))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_token_attends_to_its_context(bits: int, head_dim: int, heads: tuple[int, int], device: torch.device) -> None:
    num_heads, num_kv_heads = heads
    index = HEADS.index(heads)
    dtype = (torch.float16, torch.bfloat16)[index % 2]
    case = random_case(
        LENS[index % 3], num_kv_heads=num_kv_heads, head_dim=head_dim, bits=bits, dtype=dtype, device=device,
        num_unwritten=1,
    )  # fmt: skip
    out, expected, new = decode(case, num_heads=num_heads, dtype=dtype)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_appended(case, new, dtype)


@pytest.mark.parametrize(("bits", "block_size"), [(4, 16), (8, 32), (16, 16), (4, 128)])
@pytest.mark.parametrize("window", [None, 1, 70, 100])
def test_block_sizes_and_windows(bits: int, block_size: int, window: int | None, device: torch.device) -> None:
    case = random_case(
        (150, 33, 1), num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device,
        block_size=block_size, num_unwritten=1,
    )  # fmt: skip
    out, expected, new = decode(case, num_heads=4, dtype=torch.float16, window=window)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
    assert_appended(case, new, torch.float16)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("qkv_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_are_normalized_before_rotation(bits: int, qkv_dtype: torch.dtype, device: torch.device) -> None:
    dtype = torch.bfloat16
    case = random_case((70, 3), num_kv_heads=2, head_dim=64, bits=bits, dtype=dtype, device=device, num_unwritten=1)
    out, expected, new = decode(case, num_heads=4, dtype=dtype, qkv_dtype=qkv_dtype, has_norm=True)
    torch.testing.assert_close(out.double(), expected, rtol=2.5e-2, atol=2.5e-2)
    assert_appended(case, new, dtype)


@pytest.mark.parametrize("num_splits", [1, 2, 40])
@pytest.mark.parametrize("lens", [(1000, 5), (129,)], ids=str)
def test_any_number_of_parts_gives_the_same(num_splits: int, lens: Sequence[int], device: torch.device) -> None:
    case = random_case(
        lens, num_kv_heads=1, head_dim=64, bits=8, dtype=torch.float16, device=device, num_unwritten=1
    )  # fmt: skip
    out, expected, _ = decode(case, num_heads=2, dtype=torch.float16, num_splits=num_splits)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_values_of_very_different_size(bits: int, device: torch.device) -> None:
    """A token of great weight whose value is tiny or zero, as first tokens have, beside values of 1e4."""
    case = random_case(
        (100, 70), num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device, num_unwritten=1
    )  # fmt: skip
    table = case.block_tables[case.table_rows.long()].long()
    for row, size in ((0, 0.0), (1, 1e-3)):
        values = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)) * torch.tensor([[size], [3e3], [1e-4]])
        keys = torch.tensor([[6.0], [-1.0], [0.0]]).expand(3, 64)
        rows = torch.stack((keys, values)).to(device)
        if case.scales is None:
            case.data[:, table[row, 0], 0, :3] = rows.half()
        else:
            case.data[:, table[row, 0], 0, :3], case.scales[:, table[row, 0], 0, :3] = reference.quantize_kv(rows, bits)
    out, expected, _ = decode(case, num_heads=8, dtype=torch.float16)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=2e-2)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sequence_that_overflowed_sees_it_and_others_do_not(bits: int, bad: float, device: torch.device) -> None:
    case = random_case(
        (100, 70), num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device, num_unwritten=1
    )  # fmt: skip
    table = case.block_tables[case.table_rows.long()].long()
    rows = torch.randn(2, 64)
    rows[1, 5] = bad
    if case.scales is None:
        case.data[:, table[0, 0], 0, 7] = rows.half().to(device)
    else:
        case.scales[1, table[0, 0], 0, 7] = math.nan
    out, expected, _ = decode(case, num_heads=2, dtype=torch.float16)
    assert not out[0].isfinite().all()
    torch.testing.assert_close(out[1].double(), expected[1], rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rows_of_one_sequence_without_appending(bits: int, device: torch.device) -> None:
    """Rotated queries of a sequence's last tokens, each seeing one token more than the one before."""
    head_dim, num_heads, length = 64, 4, 131
    case = random_case(
        (length,), num_kv_heads=2, head_dim=head_dim, bits=bits, dtype=torch.float16, device=device
    )  # fmt: skip
    query = torch.randn(4, num_heads, head_dim, generator=torch.Generator().manual_seed(3)).to(device)
    out = torch.full((4, num_heads * head_dim), math.nan, dtype=torch.float16, device=device)
    workspace = AttentionWorkspace.allocate(
        max_rows=4, num_heads=num_heads, num_kv_heads=2, head_dim=head_dim, device=device, scratch_bytes=0
    )
    before = case.data.clone()
    decode_attention(
        query.flatten(1), query, query, case.data, case.scales, case.block_tables,
        case.table_rows.expand(4).contiguous(),
        torch.arange(length - 3, length + 1, dtype=torch.int32, device=device), out, workspace, bits=bits,
        softmax_scale=head_dim**-0.5, num_heads=num_heads, appends=False,
    )  # fmt: skip
    assert torch.equal(case.data.view(torch.uint8), before.view(torch.uint8))
    expected = attended(query, *case.stored(0), head_dim**-0.5, None)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)


def test_sizes_without_a_kernel_are_refused(device: torch.device) -> None:
    case = random_case((3,), num_kv_heads=1, head_dim=64, bits=8, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="groups of 1 to 8 heads"):
        decode(case, num_heads=9, dtype=torch.float16)


@pytest.mark.parametrize(("bits", "head_dim", "num_rows"), [(4, 128, 1), (4, 64, 64), (8, 128, 64), (16, 128, 64)])
def test_it_compiles_for_every_architecture(bits: int, head_dim: int, num_rows: int) -> None:
    for tile_tokens, architectures in ((_TILE_TOKENS[bits], (90,)), (_OLDER_TILE_TOKENS[bits], (80, 86, 89))):
        compiled = compile_for_all(
            _decode_kernel,
            dict.fromkeys(("data", "scales"), "*fp16" if bits == 16 else "*i32")
            | dict.fromkeys(("block_tables", "table_rows", "context_lens", "counters"), "*i32")
            | dict.fromkeys(("qkv", "cosines", "sines", "partial_outputs", "partial_weights"), "*fp32")
            | dict.fromkeys(("q_norm", "k_norm", "out"), "*fp16")
            | dict.fromkeys(("num_rows", "num_splits", "num_blocks", "table_stride"), "i32")
            | {"qkv_stride": "i32:16", "softmax_scale_log2": "fp32", "norm_eps": "fp32"},
            {
                "KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_SIZE": 64, "BITS": bits, "WINDOW": 0,
                "ROWS": num_rows, "TILES": _NUM_WARPS[bits], "TILE": tile_tokens, "COLUMNS": 8, "PARTS": 8,
                "APPENDS": True, "HAS_NORM": False, "ASSEMBLY": True,
            },
            architectures=architectures,
            num_warps=_NUM_WARPS[bits],
            num_stages=_NUM_STAGES[bits],
        )  # fmt: skip
        for kernel in compiled.values():
            assert_fits(kernel)
