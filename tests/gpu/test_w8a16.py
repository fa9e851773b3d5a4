"""The 8-bit head at a model's size, compiled: against the product of the same codes in fp32."""

import math

import pytest
import torch

from lmdserve.kernels.w8a16 import Int8Weight, quantize_rows, w8a16_matmul, w8a16_scratch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB_SIZE, HIDDEN_SIZE = 92544, 4096


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=str)
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, HIDDEN_SIZE, device="cuda", dtype=request.param)


@pytest.fixture(scope="module")
def quantized(weight: torch.Tensor) -> Int8Weight:
    return quantize_rows(weight)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 31, 64, 65, 256])
def test_logits_are_those_of_the_codes(weight: torch.Tensor, quantized: Int8Weight, num_rows: int) -> None:
    """More than 64 rows go through a weight that is rounded to 16 bits once more."""
    x = torch.randn(num_rows, HIDDEN_SIZE, device="cuda").to(weight.dtype)
    out = torch.full((num_rows, VOCAB_SIZE), math.nan, device="cuda")
    w8a16_matmul(x, quantized, out, w8a16_scratch(HIDDEN_SIZE, x.dtype, x.device))
    wanted = torch.cat(
        [
            x.float() @ (quantized.codes[part : part + 8192].float() * quantized.scales[part : part + 8192, None]).T
            for part in range(0, VOCAB_SIZE, 8192)
        ],
        dim=1,
    )
    tolerance = 2e-4 if num_rows <= 64 else {torch.float16: 1e-3, torch.bfloat16: 8e-3}[weight.dtype]
    assert (out - wanted).abs().max() < tolerance * wanted.abs().max()


def test_quantizing_changes_logits_little(weight: torch.Tensor, quantized: Int8Weight) -> None:
    x = torch.randn(4, HIDDEN_SIZE, device="cuda").to(weight.dtype)
    out = torch.empty(4, VOCAB_SIZE, device="cuda")
    w8a16_matmul(x, quantized, out, None)
    wanted = torch.mm(x, weight.T, out_dtype=torch.float32)
    assert (out - wanted).norm() < 0.012 * wanted.norm(), "a step of 1/127 of four deviations, spread evenly, is 0.9 %"
