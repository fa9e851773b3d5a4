"""Every kind of the fused decoder's linears against a float64 product of the weight it was made from."""

import pytest
import torch
from torch.nn import functional

from lmdserve.engine.fused_linear import CublasLinear, FusedLinear, Int8Head, PackedLinear, UnpackedLinear
from lmdserve.engine.linear import FourBitLinear
from lmdserve.kernels import layout
from lmdserve.kernels.reference import w4a16_weight
from lmdserve.kernels.w4a16_tiles import pack_weight
from lmdserve.kernels.w4a16_workspace import Workspace

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
IN_FEATURES, OUT_FEATURES = 256, 128
KINDS = ["packed", "unpacked", "cublas"]


def four_bit_parts(group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(group_size)
    groups = IN_FEATURES // group_size
    codes = torch.randint(0, 16, (OUT_FEATURES, IN_FEATURES), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (OUT_FEATURES, groups), generator=generator).half()
    scales = (torch.rand(OUT_FEATURES, groups, generator=generator) * 0.02 + 0.01).half()
    return layout.pack_rows(codes).to(DEVICE), zeros.to(DEVICE), scales.to(DEVICE)


def make(kind: str, *, is_gate_up: bool = False) -> tuple[FusedLinear, torch.Tensor, torch.Tensor]:
    """Return a linear, and its weight and bias in float64."""
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(OUT_FEATURES, generator=generator).half().to(DEVICE)
    codes, zeros, scales = four_bit_parts(128 if kind == "packed" else 16)
    weight = w4a16_weight(codes, zeros, scales, torch.float32)
    if kind == "packed":
        packed = pack_weight(codes, zeros, scales, torch.float16, interleave_halves=is_gate_up)
        workspace = Workspace(DEVICE, scratch_bytes=4 << 20)
        return PackedLinear(packed, bias, workspace), weight.double(), bias.double()
    if kind == "unpacked":
        return UnpackedLinear(FourBitLinear(codes, zeros, scales, bias)), weight.double(), bias.double()
    weight = weight.half()
    return CublasLinear(weight, bias), weight.double(), bias.double()


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, IN_FEATURES, generator=torch.Generator().manual_seed(count)).half().to(DEVICE)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert (ours.double() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_bias(kind: str, deterministic: bool) -> None:
    if kind != "packed" and not deterministic and not HAS_GPU:
        pytest.skip("cuBLAS needs a GPU")
    linear, weight, bias = make(kind)
    for count in (1, 5, 70):
        x = rows(count)
        expected = functional.linear(x.double(), weight, bias)
        out = torch.full((count, OUT_FEATURES), torch.nan, dtype=torch.float16, device=DEVICE)
        linear.store(x, out, deterministic=deterministic)
        assert_close(out, expected)
        accumulator = torch.full((count, OUT_FEATURES), 0.5, device=DEVICE)
        linear.add(x, accumulator, deterministic=deterministic)
        assert_close(accumulator - 0.5, expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_takes_the_first_half_as_gates(kind: str, deterministic: bool) -> None:
    if kind != "packed" and not deterministic and not HAS_GPU:
        pytest.skip("cuBLAS needs a GPU")
    linear, weight, bias = make(kind, is_gate_up=True)
    x = rows(3)
    gate, up = functional.linear(x.double(), weight, bias).chunk(2, -1)
    out = torch.full((3, OUT_FEATURES // 2), torch.nan, dtype=torch.float16, device=DEVICE)
    linear.swiglu(x, out, deterministic=deterministic)
    assert_close(out, functional.silu(gate) * up)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deterministic_row_has_the_same_bits_alone_and_among_others(kind: str) -> None:
    linear, _, _ = make(kind)
    x = rows(70)
    together = torch.full((70, OUT_FEATURES), torch.nan, device=DEVICE, dtype=torch.float16)
    linear.store(x, together, deterministic=True)
    for row in (0, 33, 69):
        alone = torch.full((1, OUT_FEATURES), torch.nan, device=DEVICE, dtype=torch.float16)
        linear.store(x[row : row + 1], alone, deterministic=True)
        assert torch.equal(alone[0], together[row])


def test_the_8_bit_head_is_close_and_its_deterministic_rows_independent() -> None:
    """Codes of 127 steps a row: the product of normal inputs errs by less than a hundredth of its norm."""
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    head, x = Int8Head(weight), rows(20)
    together = torch.full((20, OUT_FEATURES), torch.nan, device=DEVICE)
    head.store(x, together, deterministic=True)
    expected = x.double() @ weight.double().t()
    assert (together.double() - expected).norm() <= 1e-2 * expected.norm()
    alone = torch.full((1, OUT_FEATURES), torch.nan, device=DEVICE)
    head.store(x[17:18], alone, deterministic=True)
    assert torch.equal(alone[0], together[17])
