"""W4A16 products against the plain-torch truth: every tile's kernel, every scale group size, odd sizes and layouts."""

import math

import pytest
import torch

from lmdserve.kernels import layout, reference
from lmdserve.kernels.w4a16 import (
    PackedWeight,
    Workspace,
    can_pack,
    launch_tile,
    pack_weight,
    w4a16_add,
    w4a16_matmul,
    w4a16_swiglu,
)
from lmdserve.kernels.w4a16_dequantize import dequantize
from lmdserve.kernels.w4a16_plan import DEQUANTIZE, Operation, Tile

# Of the root mean square of the result: the output's own rounding, and for scales before the product the weights'.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
NARROWEST = Tile(block_n=64, block_m=8, num_warps=2, num_stages=3)
NARROW = Tile(block_n=64, block_m=16, num_warps=4, num_stages=3)
WIDE = Tile(block_n=128, block_m=32, num_warps=4, num_stages=3, scales_after=False, grouped_rows=2)
SPLIT = Tile(block_n=64, block_m=16, num_warps=4, num_stages=3, num_splits=3)


class Case:
    """A random weight, packed, with its dequantized truth in fp32."""

    def __init__(
        self, out_features: int, in_features: int, group_size: int, dtype: torch.dtype, device: torch.device,
        *, interleave: bool = False, fragment_width: int | None = None, largest_zero: int = 15,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(out_features + in_features)
        groups = 1 if group_size == -1 else in_features // group_size
        values = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=random)
        zeros = torch.randint(0, largest_zero + 1, (out_features, groups), generator=random).to(dtype)
        scales = (torch.rand(out_features, groups, generator=random) * 0.01 + 0.005).to(dtype)
        codes = layout.pack_rows(values)
        self.truth = reference.w4a16_weight(codes, zeros.float(), scales.float(), torch.float32).to(device)
        self.rounded = reference.w4a16_weight(codes, zeros, scales, dtype).to(device)
        self.weight = pack_weight(
            codes.to(device), zeros.to(device), scales.to(device), dtype,
            interleave_halves=interleave, fragment_width=fragment_width,
        )  # fmt: skip
        self.workspace = Workspace(device, scratch_bytes=1 << 22)
        self.dtype, self.device, self.random = dtype, device, random

    def rows(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.weight.in_features, generator=self.random).to(self.device, self.dtype)

    def poisoned(self, rows: int, columns: int) -> torch.Tensor:
        return torch.full((rows, columns), math.nan, dtype=self.dtype, device=self.device)


def assert_near(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (result.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("width", [2, 4])
def test_unpacking_gives_the_reference_weight_bit_for_bit(
    dtype: torch.dtype, group_size: int, width: int, device: torch.device
) -> None:
    case = Case(80, 256, group_size, dtype, device, fragment_width=width, largest_zero=16)
    out = case.poisoned(80, 256)
    dequantize(case.weight, 0, out)
    if device.type == "cpu" and dtype == torch.bfloat16:  # Triton's interpreter cuts where the hardware rounds
        torch.testing.assert_close(out, case.rounded, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, case.rounded)


def test_halves_of_an_interleaved_weight_are_unpacked_apart(device: torch.device) -> None:
    case = Case(176, 128, 128, torch.float16, device, interleave=True)
    out = case.poisoned(48, 128)
    dequantize(case.weight, 128, out)
    assert torch.equal(out, torch.cat((case.rounded[64:88], case.rounded[152:176])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(
    ("tile", "group_size", "num_rows"),
    [(NARROWEST, 128, 1), (NARROWEST, 128, 3), (NARROW, -1, 17), (WIDE, 128, 67), (WIDE, 32, 33)],
)
def test_each_form_of_the_kernel_multiplies(
    dtype: torch.dtype, width: int, tile: Tile, group_size: int, num_rows: int, device: torch.device
) -> None:
    case = Case(144, 256, group_size, dtype, device, fragment_width=width)
    x, out = case.rows(num_rows), case.poisoned(num_rows, 144)
    launch_tile(Operation.STORE, x, case.weight, out, case.workspace, None, tile)
    assert_near(out, x.float() @ case.truth.t(), dtype)


@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("is_ordered", [False, True])
def test_split_inputs_are_summed_and_counters_go_back_to_zero(
    operation: Operation, is_ordered: bool, device: torch.device
) -> None:
    case = Case(192, 640, 128, torch.float16, device, interleave=operation is Operation.SWIGLU)
    x, bias = case.rows(19), torch.randn(192, generator=case.random).to(device, torch.float16)
    expected = x.float() @ case.truth.t() + bias.float()
    out = case.poisoned(19, 192)
    if operation is Operation.ADD:
        out = torch.randn(19, 192, generator=case.random).to(device)
        expected = expected + out
    elif operation is Operation.SWIGLU:
        out, expected = case.poisoned(19, 96), swiglu(expected)
    launch_tile(operation, x, case.weight, out, case.workspace, bias, SPLIT, is_ordered=is_ordered)
    assert_near(out, expected, torch.float16)
    assert not case.workspace.counters.any()


def test_sums_too_large_for_the_workspace_are_made_in_parts(device: torch.device) -> None:
    case = Case(128, 384, 128, torch.float16, device)
    small = Workspace(device, scratch_bytes=2 * 16 * 128 * 3 * 4)  # two tiles of 16 rows
    x, out = case.rows(41), case.poisoned(41, 128)
    launch_tile(Operation.STORE, x, case.weight, out, small, None, SPLIT)
    assert_near(out, x.float() @ case.truth.t(), torch.float16)
    with pytest.raises(ValueError, match="too small"):
        launch_tile(Operation.STORE, x, case.weight, out, Workspace(device, scratch_bytes=1024), None, SPLIT)


@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("has_bias", [False, True])
def test_many_rows_go_through_the_unpacked_weight(operation: Operation, has_bias: bool, device: torch.device) -> None:
    case = Case(208, 128, 64, torch.bfloat16, device, interleave=operation is Operation.SWIGLU)
    case.workspace = Workspace(device, scratch_bytes=64 * (128 + 5) * 2)  # one tile at a time
    case.weight.cache[(operation, 8)] = DEQUANTIZE
    x = case.rows(5)
    bias = torch.randn(208, generator=case.random).to(device, torch.bfloat16) if has_bias else None
    expected = x.float() @ case.truth.t() + (0 if bias is None else bias.float())
    if operation is Operation.ADD:
        out = torch.ones(5, 208, device=device)
        w4a16_add(x, case.weight, out, case.workspace, bias=bias)
        expected = expected + 1
    elif operation is Operation.STORE:
        out = case.poisoned(5, 208)
        w4a16_matmul(x, case.weight, out, case.workspace, bias=bias)
    else:
        out = case.poisoned(5, 104)
        w4a16_swiglu(x, case.weight, out, case.workspace, bias=bias)
        expected = swiglu(expected)
    assert_near(out, expected, torch.bfloat16)


def test_strided_rows_are_read_and_written_in_place(device: torch.device) -> None:
    case = Case(64, 128, 128, torch.float16, device)
    x, wide = case.rows(6).view(3, 256), case.poisoned(3, 96)
    w4a16_matmul(x[:, 128:], case.weight, wide[:, 16:80], case.workspace)
    assert_near(wide[:, 16:80], x[:, 128:].float() @ case.truth.t(), torch.float16)
    assert wide[:, :16].isnan().all()
    assert wide[:, 80:].isnan().all()


@pytest.mark.parametrize("operation", list(Operation))
def test_deterministic_rows_have_the_same_bits_in_every_company(operation: Operation, device: torch.device) -> None:
    case = Case(128, 512, 128, torch.float16, device, interleave=operation is Operation.SWIGLU)
    multiply = {Operation.ADD: w4a16_add, Operation.STORE: w4a16_matmul, Operation.SWIGLU: w4a16_swiglu}[operation]
    columns = 64 if operation is Operation.SWIGLU else 128
    dtype = torch.float32 if operation is Operation.ADD else torch.float16
    x = case.rows(67)
    together = torch.zeros(67, columns, dtype=dtype, device=device)
    multiply(x, case.weight, together, case.workspace, deterministic=True)
    for first, last in ((0, 1), (66, 67), (5, 14), (30, 63)):
        part = torch.zeros(last - first, columns, dtype=dtype, device=device)
        multiply(x[first:last], case.weight, part, case.workspace, deterministic=True)
        assert torch.equal(part, together[first:last])


def test_no_rows_are_no_work(device: torch.device) -> None:
    case = Case(64, 128, 128, torch.float16, device)
    w4a16_matmul(case.rows(0), case.weight, case.poisoned(0, 64), case.workspace)


def test_shapes_that_do_not_fit_are_named(device: torch.device) -> None:
    assert can_pack(4096, 11008, 128)
    assert can_pack(64, 256, -1)
    assert not can_pack(64, 192, 64)
    assert not can_pack(72, 256, 128)
    assert not can_pack(64, 256, 48)
    with pytest.raises(ValueError, match="multiple of 128"):
        Case(64, 192, 64, torch.float16, device)
    with pytest.raises(ValueError, match="0 to 16"):
        Case(64, 128, 128, torch.float16, device, largest_zero=40)
    case = Case(64, 128, 128, torch.float16, device)
    x = case.rows(2)
    with pytest.raises(ValueError, match="128 inputs"):
        w4a16_matmul(x[:, :64], case.weight, case.poisoned(2, 64), case.workspace)
    with pytest.raises(ValueError, match="float32"):
        w4a16_add(x, case.weight, case.poisoned(2, 64), case.workspace)
    with pytest.raises(ValueError, match="adjacent"):
        w4a16_matmul(x, case.weight, case.poisoned(64, 2).t(), case.workspace)
    with pytest.raises(ValueError, match="packed with rows in order"):
        w4a16_swiglu(x, case.weight, case.poisoned(2, 32), case.workspace)
    assert isinstance(case.weight, PackedWeight)
