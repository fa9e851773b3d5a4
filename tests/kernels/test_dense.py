"""The fixed-tile 16-bit product: its values, its reach, and that a row's bits do not depend on its company."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels.dense import _dense_kernel, dense_add, dense_matmul


def _random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "out_features", "in_features"), [(1, 33, 127), (65, 32, 128), (127, 70, 300)])
def test_products_are_those_of_torch(
    dtype: torch.dtype, num_rows: int, out_features: int, in_features: int, device: torch.device
) -> None:
    x = _random(num_rows, in_features, dtype=dtype, device=device)
    weight = _random(out_features, in_features, dtype=dtype, device=device, seed=1)
    bias = _random(out_features, dtype=dtype, device=device, seed=2)
    expected = x.float() @ weight.float().t()
    out = torch.full((num_rows, out_features), math.nan, device=device)
    dense_matmul(x, weight, out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)  # fp32 sums of up to 300 terms, in another order
    dense_add(x, weight, out, bias=bias)
    torch.testing.assert_close(out, 2 * expected + bias.float(), rtol=1e-4, atol=2e-3)
    narrow = torch.full((num_rows, out_features), math.nan, dtype=dtype, device=device)
    dense_matmul(x, weight, narrow, bias=bias)
    torch.testing.assert_close(narrow.float(), expected + bias.float(), rtol=1.6e-2, atol=1e-2)  # one rounding of bf16


def test_rows_have_the_same_bits_in_every_company(device: torch.device) -> None:
    x = _random(130, 200, dtype=torch.bfloat16, device=device)
    weight = _random(48, 200, dtype=torch.bfloat16, device=device, seed=1)
    together = torch.empty(130, 48, device=device)
    dense_matmul(x, weight, together)
    for first, last in ((0, 1), (129, 130), (60, 70)):
        part = torch.full((last - first, 48), math.nan, device=device)
        dense_matmul(x[first:last], weight, part)
        assert torch.equal(part, together[first:last])


def test_shapes_and_types_that_do_not_fit_are_named(device: torch.device) -> None:
    x, weight = (_random(4, 64, dtype=torch.float16, device=device, seed=seed) for seed in (0, 1))
    out = torch.empty(4, 4, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        dense_matmul(x, weight, out[:2])
    with pytest.raises(ValueError, match="both have to be"):
        dense_matmul(x.float(), weight, out)
    with pytest.raises(ValueError, match="adjacent"):
        dense_matmul(x, weight, out.t())
    with pytest.raises(ValueError, match="into float32"):
        dense_add(x, weight, out.half())
    dense_matmul(x[:0], weight, out[:0])


@pytest.mark.parametrize("adds", [False, True])
def test_the_kernel_compiles_for_every_architecture(adds: bool) -> None:
    integers = ("num_rows", "out_features", "in_features", "x_stride", "weight_stride", "out_stride")
    signature = {"x": "*bf16", "weight": "*bf16", "out": "*fp32", "bias": "*bf16", **dict.fromkeys(integers, "i32:16")}
    constexprs = {
        "BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_K": 128, "NUM_STAGES": 3, "ADDS": adds, "HAS_BIAS": True,
        "INTERPRETED": False,
    }  # fmt: skip
    for compiled in compile_for_all(_dense_kernel, signature, constexprs, num_warps=4, num_stages=3).values():
        assert_fits(compiled)
