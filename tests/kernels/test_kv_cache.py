"""What append_kv writes: rotated queries, and codes that equal the reference's bit for bit."""

import math

import pytest
import torch
from attention_cases import PagedCase, random_case, rotated, rotation
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels import reference
from lmdserve.kernels.kv_cache import _append_kernel, append_kv

LENS = (100, 1, 65, 30)
CHUNKS = (65, 1, 2, 0)  # last tokens of each sequence


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 64), ((6, 2), 128), ((8, 1), 64)], ids=str)
@pytest.mark.parametrize(
    ("qkv_dtype", "has_norm", "is_rotated"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.float16, False, True)],
    ids=str,
)
def test_tokens_are_rotated_quantized_and_stored(
    bits: int,
    heads: tuple[int, int],
    head_dim: int,
    qkv_dtype: torch.dtype,
    has_norm: bool,
    is_rotated: bool,
    device: torch.device,
) -> None:
    """Without rotation, codes and scales are the reference's own; rotated, a code may be its neighbour."""
    num_heads, num_kv_heads = heads
    case = random_case(
        LENS, num_kv_heads=num_kv_heads, head_dim=head_dim, bits=bits, dtype=torch.float16, device=device
    )
    generator = torch.Generator().manual_seed(9)
    num_tokens = sum(CHUNKS)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
    qkv = (qkv * torch.rand(num_tokens, 1, generator=generator) * 9).to(qkv_dtype).to(device)
    sequences = torch.tensor([row for row, count in enumerate(CHUNKS) for _ in range(count)])
    positions = torch.cat([torch.arange(n - count, n) for n, count in zip(LENS, CHUNKS, strict=True)]).int().to(device)
    norms = [torch.rand(head_dim, generator=generator).add(0.5).half().to(device) for _ in range(2)]
    q_norm, k_norm = norms if has_norm else (None, None)
    cosines, sines = rotation(positions if is_rotated else positions * 0, head_dim)
    query_out = torch.full((num_tokens, num_heads, head_dim), math.nan, dtype=torch.float16, device=device)
    data_before, scales_before = case.data.clone(), None if case.scales is None else case.scales.clone()
    table_rows = case.table_rows[sequences]
    append_kv(
        qkv, cosines, sines, case.data, case.scales, case.block_tables, table_rows, positions, query_out, bits=bits,
        num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, norm_eps=1e-6,
    )  # fmt: skip

    parts = qkv.view(num_tokens, -1, head_dim)
    keys = rotated(parts[:, num_heads : num_heads + num_kv_heads], cosines, sines, k_norm, 1e-6)
    values = parts[:, num_heads + num_kv_heads :]
    wanted_query = rotated(parts[:, :num_heads], cosines, sines, q_norm, 1e-6)
    torch.testing.assert_close(query_out.double(), wanted_query, rtol=1e-3, atol=1e-4)
    blocks = case.block_tables[table_rows.long(), positions.long() // 64].long()
    new = torch.stack((keys.float(), values.float()))  # [2, tokens, kv_heads, D]
    if case.scales is None:
        data_before[:, blocks, :, positions.long() % 64] = new.half().transpose(0, 1)
        torch.testing.assert_close(case.data, data_before, rtol=1e-3, atol=1e-4, equal_nan=True)
        return
    codes, scales = reference.quantize_kv(new, bits)
    data_before[:, blocks, :, positions.long() % 64] = codes.transpose(0, 1)
    scales_before[:, blocks, :, positions.long() % 64] = scales.transpose(0, 1)
    if is_rotated:
        torch.testing.assert_close(case.scales, scales_before, rtol=2.0**-7, atol=1e-6, equal_nan=True)
        assert (nibbles(case.data, bits) - nibbles(data_before, bits)).abs().max() <= 1
        return
    assert torch.equal(case.scales.view(torch.int16), scales_before.view(torch.int16))
    assert torch.equal(case.data, data_before)


def nibbles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return codes.int() if bits == 8 else torch.stack((codes.int() & 15, codes.int() >> 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-20, 6e4, -1e30])
def test_constant_rows_are_the_references(bits: int, value: float, device: torch.device) -> None:
    case = random_case((1,), num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device)
    qkv = torch.zeros(1, 3 * 64, device=device)
    qkv[0, 2 * 64 :] = value
    append(case, qkv)
    codes, scales = reference.quantize_kv(torch.full((64,), value), bits)
    block = case.block_tables[case.table_rows.long(), 0].long()
    assert torch.equal(case.data[1, block, 0, 0].cpu(), codes[None])
    assert torch.equal(case.scales[1, block, 0, 0].cpu(), scales[None])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so(bits: int, bad: float, device: torch.device) -> None:
    case = random_case((1,), num_kv_heads=1, head_dim=64, bits=bits, dtype=torch.float16, device=device)
    qkv = torch.ones(1, 3 * 64, device=device)
    qkv[0, 2 * 64 + 5] = bad
    append(case, qkv)
    block = case.block_tables[case.table_rows.long(), 0].long()
    if case.scales is None:
        assert torch.equal(case.data[1, block, 0, 0].float().isfinite(), qkv[:, 128:].isfinite())
    else:
        assert case.scales[1, block, 0, 0].isnan().all()
        assert case.scales[0, block, 0, 0].isfinite().all()


def append(case: PagedCase, qkv: torch.Tensor) -> None:
    """Append the one token of a case with one head of 64 elements, without rotation."""
    positions = torch.zeros(1, dtype=torch.int32, device=qkv.device)
    cosines, sines = rotation(positions, 64)
    query_out = torch.empty(1, 1, 64, dtype=torch.float16, device=qkv.device)
    append_kv(
        qkv, cosines, sines, case.data, case.scales, case.block_tables, case.table_rows, positions, query_out,
        bits=case.bits, num_heads=1,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 16])
def test_a_padding_row_writes_nothing_to_the_cache(bits: int, device: torch.device) -> None:
    case = random_case((70, 5), num_kv_heads=2, head_dim=64, bits=bits, dtype=torch.float16, device=device)
    before = [x.clone().view(torch.uint8) for x in (case.data, case.scales) if x is not None]
    positions = torch.full((2,), -1, dtype=torch.int32, device=device)
    cosines, sines = rotation(positions, 64)
    query_out = torch.full((2, 2, 64), math.nan, dtype=torch.float16, device=device)
    append_kv(
        torch.ones(2, 6 * 64, device=device), cosines, sines, case.data, case.scales, case.block_tables,
        case.table_rows, positions, query_out, bits=bits, num_heads=2,
    )  # fmt: skip
    after = [x.view(torch.uint8) for x in (case.data, case.scales) if x is not None]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert query_out.isfinite().all()


def test_no_tokens_are_fine(device: torch.device) -> None:
    case = random_case((1,), num_kv_heads=1, head_dim=64, bits=8, dtype=torch.float16, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    append_kv(
        torch.empty(0, 192, device=device), torch.empty(0, 32, device=device), torch.empty(0, 32, device=device),
        case.data, case.scales, case.block_tables, none, none,
        torch.empty(0, 1, 64, dtype=torch.float16, device=device), bits=8, num_heads=1,
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (4, 128), (8, 128), (16, 64)])
def test_it_compiles_for_every_architecture(bits: int, head_dim: int) -> None:
    compiled = compile_for_all(
        _append_kernel,
        dict.fromkeys(("qkv", "cosines", "sines"), "*fp32")
        | dict.fromkeys(("data", "scales"), "*fp16" if bits == 16 else "*i32")
        | dict.fromkeys(("block_tables", "token_table_rows", "positions"), "*i32")
        | dict.fromkeys(("query_out", "q_norm", "k_norm"), "*fp16")
        | dict.fromkeys(("num_tokens", "num_blocks", "table_stride"), "i32")
        | {"qkv_stride": "i32:16", "norm_eps": "fp32"},
        {
            "KV_HEADS": 8, "GROUP": 4, "GROUP_ROWS": 4, "HEAD_DIM": head_dim, "BLOCK_SIZE": 64, "BITS": bits,
            "TOKENS": 8, "HAS_NORM": True,
        },
    )  # fmt: skip
    for kernel in compiled.values():
        assert_fits(kernel)
