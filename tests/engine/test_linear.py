"""Every linear computes x W^T + b, and in float32 on a CPU gives a row the same bits among any other rows."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from lmdserve.engine import linear
from lmdserve.engine.linear import DenseLinear, FourBitLinear, Linear, SharedLinear
from lmdserve.kernels import layout, reference

ROW_COUNTS = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 100, 200)
SIZES = ((256, 512), (768, 256), (33, 47), (2048, 2048))  # the last one's single-row kernel rounds differently


def dense(in_features: int, out_features: int) -> tuple[Linear, torch.Tensor]:
    weight = torch.randn(out_features, in_features)
    return DenseLinear(weight, None), weight


def shared(in_features: int, out_features: int) -> tuple[Linear, torch.Tensor]:
    weight = torch.randn(out_features, in_features)
    return SharedLinear(weight), weight


def four_bit(in_features: int, out_features: int) -> tuple[Linear, torch.Tensor]:
    in_features += in_features % 2
    codes = layout.pack_rows(torch.randint(16, (out_features, in_features)).to(torch.uint8))
    zeros = torch.randint(16, (out_features, 2)).float()
    scales = torch.rand(out_features, 2) * 0.1
    return FourBitLinear(codes, zeros, scales, None), reference.w4a16_weight(codes, zeros, scales, torch.float32)


@pytest.fixture(params=["oneDNN", "fixed tiles"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "fixed tiles":
        monkeypatch.setattr(linear, "_has_onednn", lambda dtype: False)
    return request.param


@pytest.mark.parametrize("kind", [dense, shared, four_bit])
@pytest.mark.parametrize("size", SIZES)
def test_rows_do_not_see_each_other(
    kind: Callable[..., tuple[Linear, torch.Tensor]], size: tuple[int, int], product: str
) -> None:
    torch.manual_seed(5)
    layer, weight = kind(*size)
    assert (layer.in_features, layer.out_features) == (weight.shape[1], weight.shape[0])
    x = torch.randn(max(ROW_COUNTS) + 5, layer.in_features)
    everything = layer(x)
    expected = x.double() @ weight.double().t()
    assert (everything - expected).abs().max() <= 1e-5 * expected.abs().max()
    for count in ROW_COUNTS:
        for start in (0, 5):
            assert torch.equal(layer(x[start : start + count]), everything[start : start + count]), (count, start)


def test_a_bias_is_added_once() -> None:
    weight, bias = torch.randn(6, 4), torch.randn(6)
    x = torch.randn(3, 4)
    assert torch.allclose(DenseLinear(weight, bias)(x), x @ weight.t() + bias, atol=1e-6)
    codes = layout.pack_rows(torch.randint(16, (6, 4)).to(torch.uint8))
    quantized = FourBitLinear(codes, torch.zeros(6, 1), torch.ones(6, 1), bias)
    unpacked = layout.unpack_rows(codes, torch.empty(6, 4))
    assert torch.allclose(quantized(x), x @ unpacked.t() + bias, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_too(dtype: torch.dtype) -> None:
    weight, x = torch.randn(32, 64).to(dtype), torch.randn(5, 64).to(dtype)
    out = DenseLinear(weight, None)(x)
    assert out.dtype == dtype
    expected = functional.linear(x.double(), weight.double())
    assert (out.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_four_bit_weights_stay_packed() -> None:
    """Nothing the layer keeps grows with a float copy of the weight: half a byte each, and the groups' numbers."""
    layer, weight = four_bit(256, 512)
    layer(torch.randn(3, 256))
    kept = sum(value.numel() * value.element_size() for value in vars(layer).values() if torch.is_tensor(value))
    assert kept == weight.numel() // 2 + 512 * 2 * 2 * 4
