"""Launches that remember what Triton found out: a kernel compiled for some arguments never runs on others."""

import pytest
import torch

from lmdserve.kernels.launch import compile_ahead
from lmdserve.kernels.swiglu import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Columns and offset decide what Triton may assume of strides and addresses: multiples of 16, one, or nothing.
CASES = ((64, 0), (64, 1), (63, 0), (1, 0), (1, 3), (64, 8), (64, 0))


def activated(columns: int, offset: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel makes of random rows that lie `offset` elements past an allocation's start, and torch."""
    rows = torch.randn(3 * 2 * columns + offset, device="cuda").to(dtype)[offset:].view(3, 2 * columns)
    out = torch.full((3 * columns + offset,), torch.nan, device="cuda", dtype=dtype)[offset:].view(3, columns)
    swiglu(rows, out)
    gate, up = rows.float().chunk(2, -1)
    return out.float(), torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_arguments_of_every_kind_take_turns(dtype: torch.dtype) -> None:
    for _ in range(2):
        for columns, offset in CASES:
            torch.testing.assert_close(*activated(columns, offset, dtype), rtol=2e-3, atol=2e-3)


def test_nothing_runs_while_kernels_are_compiled_ahead() -> None:
    """Also a kernel that ran before is left alone."""
    rows, out = torch.randn(2, 128, device="cuda"), torch.full((2, 64), torch.nan, device="cuda")
    swiglu(rows, torch.empty_like(out))
    with compile_ahead(2):
        swiglu(rows, out)
    assert out.isnan().all()
    swiglu(rows, out)
    assert out.isfinite().all()
