"""The 8-bit weight: how it is quantized, and its product against float64."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels import w8a16
from lmdserve.kernels.w8a16 import (
    MOST_FUSED_ROWS,
    _dequantize_kernel,
    _w8a16_kernel,
    quantize_rows,
    w8a16_matmul,
    w8a16_scratch,
)

# Of the largest output: fp32 sums of products of 16-bit numbers; more rows go through a 16-bit weight.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _assert_product(x: torch.Tensor, weight: torch.Tensor, tolerance: float) -> None:
    quantized = quantize_rows(weight)
    out = torch.full((len(x), len(weight)), math.nan, device=x.device)
    scratch = w8a16_scratch(weight.shape[1], x.dtype, x.device)
    w8a16_matmul(x, quantized, out, scratch)
    wanted = x.double() @ (quantized.codes.double() * quantized.scales.double()[:, None]).T
    assert (out.double() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_codes_are_the_nearest_of_their_row() -> None:
    weight = _random(9000, 64, dtype=torch.bfloat16, device=torch.device("cpu")) * torch.logspace(-3, 3, 9000)[:, None]
    weight[17] = 0.0
    quantized = quantize_rows(weight)
    assert quantized.codes.dtype == torch.int8
    restored = quantized.codes.float() * quantized.scales[:, None]
    assert ((restored - weight.float()).abs() <= quantized.scales[:, None] * 0.5001).all()
    assert quantized.codes.abs().amax(-1).unique().tolist() == [0, 127]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"), [(1, 130, 256), (3, 64, 200), (9, 333, 128), (41, 17, 64)]
)
def test_few_rows(dtype: torch.dtype, num_rows: int, out_features: int, in_features: int, device: torch.device) -> None:
    x = _random(num_rows, in_features, dtype=dtype, device=device)
    weight = _random(out_features, in_features, dtype=dtype, device=device, seed=1)
    _assert_product(x, weight, 1e-5)


def test_columns_of_a_wider_tensor(device: torch.device) -> None:
    """Logits past the vocabulary, and the other half of x, stay out of it."""
    x = _random(2, 256, dtype=torch.float16, device=device)[:, 128:]
    quantized = quantize_rows(_random(70, 128, dtype=torch.float16, device=device, seed=1))
    wide = torch.full((2, 80), math.nan, device=device)
    w8a16_matmul(x, quantized, wide[:, :70], None)
    torch.testing.assert_close(wide[:, :70], x.float() @ (quantized.codes.float() * quantized.scales[:, None]).T)
    assert wide[:, 70:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_rows_go_in_parts(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # torch has products of 16-bit matrices with fp32 results on CUDA only
        monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype, out: out.copy_(x.float() @ y.float()))
    monkeypatch.setattr(w8a16, "DEQUANTIZED_ROWS", 96)
    x = _random(MOST_FUSED_ROWS + 1, 72, dtype=dtype, device=device)
    _assert_product(x, _random(200, 72, dtype=dtype, device=device, seed=1), TOLERANCE[dtype])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    quantized = quantize_rows(torch.ones(16, 64, device=device))
    x = torch.ones(MOST_FUSED_ROWS + 1, 64, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="needs its scratch memory for 65 rows"):
        w8a16_matmul(x, quantized, torch.empty(65, 16, device=device), None)
    with pytest.raises(ValueError, match=r"out \(65, 16\)"):
        w8a16_matmul(x, quantized, torch.empty(65, 17, device=device), None)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("block_m", [8, 32])
def test_it_compiles_for_every_architecture(dtype: str, block_m: int) -> None:
    signature = {
        "x": f"*{dtype}", "codes": "*i8", "scales": "*fp32", "out": "*fp32", "num_rows": "i32",
        "out_features": "i32:16", "features_per_program": "i32:16", "x_stride": "i32:16", "out_stride": "i32:16",
    }  # fmt: skip
    block_k, num_stages = w8a16._BLOCK_K_AND_STAGES[block_m]
    constexprs = {
        "IN_FEATURES": 4096, "BLOCK_N": w8a16._BLOCK_N, "BLOCK_M": block_m, "BLOCK_K": block_k,
        "NUM_STAGES": num_stages, "INTERPRETED": False,
    }  # fmt: skip
    compiled = compile_for_all(_w8a16_kernel, signature, constexprs, num_warps=w8a16._NUM_WARPS, wants_sass=True)
    for kernel in compiled.values():
        assert_fits(kernel)
        assert kernel.count("HMMA") > 0
        assert kernel.count("HGMMA") == 0, "wgmma with the weight in registers gave wrong results"
        assert dtype == "bf16" or kernel.count("I2F") == 0


def test_the_other_path_compiles_for_every_architecture() -> None:
    signature = {"codes": "*i8", "scales": "*fp32", "out": "*fp16", "in_features": "i32:16"}
    for kernel in compile_for_all(_dequantize_kernel, signature, {"BLOCK": 4096}).values():
        assert_fits(kernel)
