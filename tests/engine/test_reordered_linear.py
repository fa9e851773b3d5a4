"""Weights quantized in the order of activations, in the fused decoder's linears, against float64 products."""

import pytest
import torch
from torch.nn import functional

from lmdserve.engine.build_linear import Outputs, build_linear
from lmdserve.engine.formats import FourBitWeight
from lmdserve.engine.fused_linear import FusedLinear, PackedLinear
from lmdserve.engine.linear import JoinedLinear as PlainJoinedLinear
from lmdserve.engine.linear import ReorderedLinear
from lmdserve.engine.memory_sizes import GATHERED_ROWS
from lmdserve.engine.reordered_linear import GatheredLinear, JoinedLinear, gather_scratch
from lmdserve.kernels import layout
from lmdserve.kernels.w4a16_tiles import pack_weight
from lmdserve.kernels.w4a16_workspace import Workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INPUTS, OUTPUTS, GROUP_SIZE = 256, 128, 32
GROUPS = INPUTS // GROUP_SIZE


class Case:
    """A weight with groups out of order, and what it is in float64."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = FourBitWeight(
            codes=torch.randint(16, (OUTPUTS, INPUTS), generator=generator, dtype=torch.uint8),
            zeros=torch.randint(16, (OUTPUTS, GROUPS), generator=generator, dtype=torch.uint8),
            scales=(torch.rand(OUTPUTS, GROUPS, generator=generator) * 0.02 + 0.01).half(),
        )
        self.group_index = (torch.arange(INPUTS) // GROUP_SIZE)[torch.randperm(INPUTS, generator=generator)]
        self.order = self.group_index.argsort(stable=True)
        self.truth = self.weight.dequantize(self.group_index).double()
        self.bias = torch.randn(OUTPUTS, generator=generator).half()

    def fused(self, scratch: torch.Tensor, *, is_gate_up: bool = False) -> GatheredLinear:
        """Return the linear as `FusedAssembly` makes it."""
        codes = layout.pack_rows(self.weight.codes[:, self.order]).to(DEVICE)
        zeros, scales = self.weight.zeros.half().to(DEVICE), self.weight.scales.to(DEVICE)
        packed = pack_weight(codes, zeros, scales, torch.float16, interleave_halves=is_gate_up)
        inner = PackedLinear(packed, self.bias.to(DEVICE), Workspace(DEVICE, scratch_bytes=4 << 20))
        return GatheredLinear(inner, self.order.to(DEVICE, torch.int32), scratch)


@pytest.fixture
def scratch() -> torch.Tensor:
    return gather_scratch(INPUTS, torch.float16, DEVICE).fill_(torch.nan)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(count)).half().to(DEVICE)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert (ours.double().cpu() - expected).norm() <= 2e-3 * expected.norm()


def check_products(linear: FusedLinear, truth: torch.Tensor, bias: torch.Tensor, *, deterministic: bool) -> None:
    for count in (1, 5, 70):
        x = rows(count)
        expected = functional.linear(x.double().cpu(), truth, bias.double())
        out = torch.full((count, len(truth)), torch.nan, dtype=torch.float16, device=DEVICE)
        linear.store(x, out, deterministic=deterministic)
        assert_close(out, expected)
        accumulator = torch.full((count, len(truth)), 0.5, device=DEVICE)
        linear.add(x, accumulator, deterministic=deterministic)
        assert_close(accumulator - 0.5, expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gathered_products(deterministic: bool, scratch: torch.Tensor) -> None:
    case = Case(1)
    check_products(case.fused(scratch), case.truth, case.bias, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_joined_products_of_different_orders(deterministic: bool, scratch: torch.Tensor) -> None:
    cases = [Case(seed) for seed in (1, 2, 3)]
    joined = JoinedLinear([case.fused(scratch) for case in cases])
    truth, bias = torch.cat([case.truth for case in cases]), torch.cat([case.bias for case in cases])
    check_products(joined, truth, bias, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_swiglu(deterministic: bool, scratch: torch.Tensor) -> None:
    one, gate, up = Case(1), Case(2), Case(3)
    x = rows(3)
    joined = JoinedLinear([gate.fused(scratch), up.fused(scratch)])
    for linear, truth, bias in (
        (one.fused(scratch, is_gate_up=True), one.truth, one.bias),
        (joined, torch.cat((gate.truth, up.truth)), torch.cat((gate.bias, up.bias))),
    ):
        halves = functional.linear(x.double().cpu(), truth, bias.double()).chunk(2, -1)
        out = torch.full((3, len(truth) // 2), torch.nan, dtype=torch.float16, device=DEVICE)
        linear.swiglu(x, out, deterministic=deterministic)
        assert_close(out, functional.silu(halves[0]) * halves[1])


def test_more_rows_than_are_gathered_at_once(scratch: torch.Tensor) -> None:
    """A stand-in for the product shows which rows it is given, and in which order their values are."""
    case = Case(1)

    class Recorder:
        in_features, out_features = INPUTS, INPUTS

        def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
            out.copy_(x)

    linear = GatheredLinear(Recorder(), case.order.to(DEVICE, torch.int32), scratch)  # type: ignore[arg-type]
    x = rows(2 * GATHERED_ROWS + 3)
    out = torch.full_like(x, torch.nan)
    linear.store(x, out, deterministic=False)
    assert torch.equal(out, x[:, case.order.to(DEVICE)])


@pytest.mark.parametrize("differs", [False, True])
def test_outputs_in_another_order_and_parts_with_their_own(differs: bool) -> None:
    """What is built at load: rows moved within their parts, inputs sorted part by part."""
    gate, up = Case(1), Case(2)
    up_order, up_index = (up.order, up.group_index) if differs else (gate.order, gate.group_index)
    weight = FourBitWeight(
        codes=torch.cat((gate.weight.codes, up.weight.codes)),
        zeros=torch.cat((gate.weight.zeros, up.weight.zeros)),
        scales=torch.cat((gate.weight.scales, up.weight.scales)),
    )
    inner = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(5))
    output_order = torch.cat((inner, inner + OUTPUTS))
    bias = torch.cat((gate.bias, up.bias)).float()
    parts = [Outputs(OUTPUTS, gate.order), Outputs(OUTPUTS, up_order)]
    linear = build_linear(weight, bias, parts, output_order=output_order, dtype=torch.float32)
    assert isinstance(linear, PlainJoinedLinear) == differs
    truth = torch.cat((gate.truth, up.weight.dequantize(up_index).double()))
    x = rows(4).float().cpu()
    expected = functional.linear(x.double(), truth, bias.double())[:, output_order]
    assert (linear(x).double() - expected).norm() <= 1e-5 * expected.norm()


def test_without_an_order_nothing_is_gathered() -> None:
    weight = Case(1).weight
    linear = build_linear(weight, None, [Outputs(OUTPUTS, None)], output_order=None, dtype=torch.float32)
    assert not isinstance(linear, ReorderedLinear)
