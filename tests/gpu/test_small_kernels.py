"""Norm, embedding, rotary tables and SwiGLU at a model's sizes, compiled."""

import math

import pytest
import torch

from lmdserve.kernels import reference
from lmdserve.kernels.embedding import embed
from lmdserve.kernels.rms_norm import rms_norm
from lmdserve.kernels.rope_tables import rope_tables
from lmdserve.kernels.swiglu import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # one rounding of the type


def _poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 64, 1000])
@pytest.mark.parametrize("num_columns", [2048, 4096, 6144, 8192])
def test_rms_norm_and_clearing(dtype: torch.dtype, num_rows: int, num_columns: int) -> None:
    x = torch.randn(num_rows, num_columns, device="cuda") * 30
    weight = torch.randn(num_columns, device="cuda").to(dtype)
    out, zero = _poisoned(num_rows, num_columns, dtype=dtype), _poisoned(num_rows, 6144)
    rms_norm(x, weight, 1e-5, out, zero=zero)
    wanted = reference.rms_norm(x, weight.float(), 1e-5)
    torch.testing.assert_close(out.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not zero.any()


@pytest.mark.parametrize("num_columns", [384, 2048, 4096, 5120, 6144, 8192])
def test_rms_norm_gives_a_row_the_same_bits_in_any_company(num_columns: int) -> None:
    """However many programs share a row. The layout of the sum once followed that of what was written: a unit in the
    last place of the sum, which one output in some thousands shows."""
    x = torch.randn(400, num_columns, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) * 30
    weight = torch.randn(num_columns, device="cuda").half()
    together = _poisoned(400, num_columns, dtype=torch.float16)
    rms_norm(x, weight, 1e-5, together)
    for num_rows in (1, 10, 30, 60, 100):  # 8, 8, 4, 2 and 1 programs a row
        rows = torch.arange(400, dtype=torch.int32, device="cuda").split(num_rows)
        apart = [_poisoned(len(part), num_columns, dtype=torch.float16) for part in rows]
        for part, out in zip(rows, apart, strict=True):
            rms_norm(x, weight, 1e-5, out, rows=part)
        assert torch.equal(torch.cat(apart), together)


def test_rotary_tables_far_out() -> None:
    positions = torch.arange(0, 262_144, 37)
    frequencies = 1.0 / 1e6 ** (torch.arange(64) / 64)
    angles = (positions.float()[:, None] * frequencies).double()
    cosines, sines = _poisoned(len(positions), 64), _poisoned(len(positions), 64)
    rope_tables(positions.int().cuda(), frequencies[None].cuda(), None, cosines, sines)
    assert (cosines.cpu().double() - angles.cos()).abs().max() < 1.5e-7
    assert (sines.cpu().double() - angles.sin()).abs().max() < 1.5e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_embedding_and_swiglu(dtype: torch.dtype) -> None:
    table = torch.randn(92544, 4096, device="cuda").to(dtype)
    token_ids = torch.randint(0, 92544, (333,), dtype=torch.int32, device="cuda")
    slots = torch.arange(333, dtype=torch.int32, device="cuda")
    out = _poisoned(333, 4096)
    embed(table, torch.where(slots % 2 == 0, token_ids, -1), token_ids, slots, out)
    assert torch.equal(out, table[token_ids].float())
    gate_up = torch.randn(333, 28672, device="cuda").to(dtype) * 3
    activated = _poisoned(333, 14336, dtype=dtype)
    swiglu(gate_up, activated)
    wanted = reference.swiglu(gate_up.float())
    torch.testing.assert_close(activated.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
