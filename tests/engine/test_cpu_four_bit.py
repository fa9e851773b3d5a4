"""The CPU's 4-bit linears compute x W^T + b; in float32 a row's bits depend on that row alone, tiles or not."""

import pytest
import torch

from lmdserve.engine import cpu_four_bit
from lmdserve.engine.cpu_four_bit import Int4Linear, TiledFourBitLinear, build_four_bit_linear
from lmdserve.engine.linear import FourBitLinear, Linear
from lmdserve.kernels import layout, reference

ROW_COUNTS = (1, 2, 3, 8, 17, 33, 63, 64, 65, 100)
GROUP_SIZE = 64
HAS_INT4_PRODUCT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def random_weight(
    out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    groups = in_features // GROUP_SIZE
    codes = torch.randint(16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (out_features, groups), generator=generator).to(dtype)
    scales = (torch.rand(out_features, groups, generator=generator) * 0.01 + 0.001).to(dtype)
    return codes, zeros, scales


def exact_product(
    x: torch.Tensor, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    grouped = codes.double().view(len(codes), zeros.shape[1], -1)
    weight = (grouped - zeros.double().unsqueeze(-1)) * scales.double().unsqueeze(-1)
    return x.double() @ weight.flatten(1).t() + bias.double()


def kept_bytes(owner: object) -> int:
    """Return the size of all tensors that an object or its parts hold."""
    parts = list(vars(owner).values())
    own = sum(part.numel() * part.element_size() for part in parts if torch.is_tensor(part))
    return own + sum(kept_bytes(part) for part in parts if type(part).__module__ == cpu_four_bit.__name__)


@pytest.mark.parametrize("tile_weights", [2**18, 128 * 50], ids=["one tile", "tiles with a remainder"])
def test_float32_rows_do_not_see_each_other(tile_weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_four_bit, "TILE_WEIGHTS", tile_weights)
    codes, zeros, scales = random_weight(192, 128, torch.float32)
    bias = torch.randn(192)
    linear = build_four_bit_linear(codes, zeros, scales, bias)
    assert isinstance(linear, TiledFourBitLinear)
    x = torch.randn(105, 128)
    everything = linear(x)
    assert (everything - exact_product(x, codes, zeros, scales, bias)).abs().max() <= 1e-5 * everything.abs().max()
    for count in ROW_COUNTS:
        for start in (0, 5):
            assert torch.equal(linear(x[start : start + count]), everything[start : start + count]), (count, start)


def test_tiles_do_not_change_a_bit_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_four_bit, "TILE_WEIGHTS", 128 * 32)
    codes, zeros, scales = random_weight(192, 128, torch.float32)
    x = torch.randn(9, 128)
    whole = FourBitLinear(layout.pack_rows(codes), zeros, scales, None)
    assert torch.equal(build_four_bit_linear(codes, zeros, scales, None)(x), whole(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out_features", "in_features"), [(192, 128), (64, 64), (48, 192), (8, 64)])
def test_half_types_round_as_their_type_does(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    """Weights, offsets and sums are rounded, each at most as the type rounds the largest of them."""
    codes, zeros, scales = random_weight(out_features, in_features, dtype)
    bias = torch.randn(out_features).to(dtype)
    linear = build_four_bit_linear(codes, zeros, scales, bias)
    assert (linear.in_features, linear.out_features) == (in_features, out_features)
    for count in ROW_COUNTS:
        x = torch.randn(count, in_features).to(dtype)
        out, expected = linear(x), exact_product(x, codes, zeros, scales, bias)
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max(), count


@pytest.mark.skipif(not HAS_INT4_PRODUCT, reason="needs AVX2 or AVX-512")
def test_bfloat16_takes_the_int4_product_and_its_tiles_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_four_bit, "TILE_WEIGHTS", 128 * 64)
    codes, zeros, scales = random_weight(192, 128, torch.bfloat16)
    linear = build_four_bit_linear(codes, zeros, scales, None)
    assert isinstance(linear, Int4Linear)
    x = torch.randn(200, 128).bfloat16()
    in_tiles, in_one_product = linear(x), torch.cat([linear(row) for row in x.split(16)])
    assert (in_tiles - in_one_product).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * in_tiles.abs().max()


def test_an_order_that_torch_changed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes read back from torch's packed weight are compared when it is made: another order means another path."""
    monkeypatch.setattr(cpu_four_bit, "_BLOCK_ROWS", {"AVX512": 32, "AVX2": 64, "DEFAULT": 64})
    monkeypatch.setattr(cpu_four_bit, "INT4_PRODUCT_MAX_ROWS", {"AVX512": 64, "AVX2": 64, "DEFAULT": 64})
    codes, zeros, scales = random_weight(192, 128, torch.bfloat16)
    assert isinstance(build_four_bit_linear(codes, zeros, scales, None), TiledFourBitLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_packed(dtype: torch.dtype) -> None:
    """Nothing a layer keeps grows with a float copy of the weight: half a byte each, and the groups' numbers."""
    codes, zeros, scales = random_weight(192, 128, dtype)
    linear: Linear = build_four_bit_linear(codes, zeros, scales, None)
    linear(torch.randn(3, 128).to(dtype))
    assert kept_bytes(linear) == 192 * 128 // 2 + 2 * scales.numel() * dtype.itemsize


def test_the_reference_dequantizes_what_is_packed() -> None:
    codes, zeros, scales = random_weight(16, 64, torch.float32)
    weight = reference.w4a16_weight(layout.pack_rows(codes), zeros, scales, torch.float32)
    x = torch.eye(64)
    assert torch.allclose(build_four_bit_linear(codes, zeros, scales, None)(x), weight.t(), atol=1e-6)
