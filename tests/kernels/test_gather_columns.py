"""Gathered columns against torch's indexing."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels.gather_columns import _gather_columns_kernel, gather_columns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (3, 1000), (5, 2049), (0, 8)])
def test_columns_come_in_order(dtype: torch.dtype, num_rows: int, num_columns: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, num_columns + 3, generator=generator).to(device, dtype)[:, 1:]
    order = torch.randperm(num_columns, generator=generator).to(device, torch.int32)
    out = torch.full((num_rows, num_columns + 1), math.nan, dtype=dtype, device=device)
    gather_columns(x, order, out[:, :num_columns])
    assert torch.equal(out[:, :num_columns], x[:, order.long()])
    assert out[:, num_columns:].isnan().all()


def test_wrong_shapes_and_types_are_refused(device: torch.device) -> None:
    x, order = torch.zeros(2, 6, device=device), torch.zeros(6, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="a column for each of order"):
        gather_columns(x, order, torch.zeros(2, 4, device=device))
    with pytest.raises(ValueError, match="in x's type"):
        gather_columns(x, order, torch.zeros(2, 6, device=device, dtype=torch.float16))
    with pytest.raises(ValueError, match="adjacent"):
        gather_columns(x, order, torch.zeros(6, 2, device=device).t())


def test_it_compiles_for_every_architecture() -> None:
    signature = {
        "x": "*fp16", "order": "*i32", "out": "*fp16", "num_columns": "i32:16", "x_stride": "i32:16",
        "out_stride": "i32:16",
    }  # fmt: skip
    for kernel in compile_for_all(_gather_columns_kernel, signature, {"BLOCK": 1024}).values():
        assert_fits(kernel)
