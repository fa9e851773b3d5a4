"""RMS normalization against torch's own, part by part and row by row; the clearing of the next buffer."""

import math
import re

import pytest
import torch
from offline_compile import CompiledKernel, assert_fits, compile_for_all

from lmdserve.kernels import reference
from lmdserve.kernels.rms_norm import _rms_norm_kernel, rms_norm

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}  # two roundings of the type


def _poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def _values(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 4096), (3, 1000), (17, 63), (70, 128), (130, 96)])
def test_rows_are_normalized(dtype: torch.dtype, num_rows: int, num_columns: int, device: torch.device) -> None:
    x = _values(num_rows, num_columns, device=device) * 50
    weight = _values(num_columns, device=device, seed=1).to(dtype)
    out = _poisoned(num_rows, num_columns, dtype=dtype, device=device)
    rms_norm(x, weight, 1e-5, out)
    wanted = reference.rms_norm(x, weight.float(), 1e-5)
    torch.testing.assert_close(out.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_sixteen_bit_rows_are_summed_in_float32(device: torch.device) -> None:
    """The sum of squares, 2e9, is far beyond the largest float16."""
    x = _values(5, 256, device=device).mul(3000).half()
    weight = torch.ones(256, dtype=torch.float16, device=device)
    out = _poisoned(5, 256, dtype=torch.float16, device=device)
    rms_norm(x, weight, 1e-6, out)
    wanted = reference.rms_norm(x.float(), weight.float(), 1e-6)
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_a_row_has_the_same_bits_in_any_company(num_rows: int, device: torch.device) -> None:
    """One row is shared by eight programs, many rows have one each."""
    x = _values(200, 1000, device=device)
    weight = _values(1000, device=device, seed=1).half()
    together = _poisoned(200, 1000, dtype=torch.float16, device=device)
    rms_norm(x, weight, 1e-5, together)
    some = _poisoned(num_rows, 1000, dtype=torch.float16, device=device)
    rms_norm(x[:num_rows], weight, 1e-5, some)
    assert torch.equal(some, together[:num_rows])


def test_rows_are_gathered_from_a_strided_tensor(device: torch.device) -> None:
    x = _values(9, 300, device=device)[:, :200]
    weight = _values(200, device=device, seed=1)
    rows = torch.tensor([8, 0, 8, 3], dtype=torch.int32, device=device)
    wide = _poisoned(4, 333, dtype=torch.float32, device=device)
    rms_norm(x, weight, 1e-5, wide[:, :200], rows=rows)
    torch.testing.assert_close(wide[:, :200], reference.rms_norm(x[rows.long()], weight, 1e-5))
    assert wide[:, 200:].isnan().all(), "columns past the end stay as they are"


@pytest.mark.parametrize("num_rows", [1, 3, 150])
def test_columns_may_come_in_another_order(num_rows: int, device: torch.device) -> None:
    """The same bits as in order, elsewhere; one row is shared by eight programs, 150 rows have one each."""
    x, weight = _values(num_rows, 1000, device=device), _values(1000, device=device, seed=1).half()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(2)).to(device)
    in_order, reordered = (_poisoned(num_rows, 1000, dtype=torch.float16, device=device) for _ in range(2))
    rms_norm(x, weight, 1e-5, in_order)
    rms_norm(x, weight, 1e-5, reordered, order=order.int())
    assert torch.equal(reordered, in_order[:, order])
    with pytest.raises(ValueError, match="order of"):
        rms_norm(x, weight, 1e-5, reordered, order=order[:-1].int())


@pytest.mark.parametrize(("num_rows", "zero_size"), [(1, 6144), (1, 20001), (3, 1), (150, 70_000), (2, 0)])
def test_the_next_buffer_is_cleared(num_rows: int, zero_size: int, device: torch.device) -> None:
    x, weight = _values(num_rows, 64, device=device), torch.ones(64, device=device)
    out = _poisoned(num_rows, 64, dtype=torch.float32, device=device)
    guarded = _poisoned(zero_size + 1, dtype=torch.float32, device=device)
    rms_norm(x, weight, 1e-5, out, zero=guarded[:zero_size])
    assert not guarded[:zero_size].any()
    assert guarded[-1].isnan(), "nothing past the end is touched"
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-5))


def test_no_rows_are_fine(device: torch.device) -> None:
    rms_norm(torch.empty(0, 64, device=device), torch.ones(64, device=device), 1e-5, torch.empty(0, 64, device=device))


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"out has to be \(2, 64\)"):
        rms_norm(x, weight, 1e-5, torch.empty(3, 64, device=device))
    with pytest.raises(ValueError, match="adjacent"):
        rms_norm(x, weight, 1e-5, torch.empty(64, 2, device=device).T)


def _compiled(num_columns: int, num_parts: int, *, has_order: bool = False) -> dict[int, CompiledKernel]:
    return compile_for_all(
        _rms_norm_kernel,
        {
            "x": "*fp32", "weight": "*fp16", "out": "*fp16", "rows": "*i32", "zero": "*fp32", "order": "*i32",
            "x_stride": "i32:16", "out_stride": "i32:16", "num_columns": "i32:16", "part_columns": "i32:16",
            "zero_size": "i32:16", "eps": "fp32",
        },
        {
            "HAS_ROWS": True, "HAS_ZERO": True, "HAS_ORDER": has_order, "RELEASES_FIRST": True,
            "BLOCK": num_columns, "PART_BLOCK": num_columns // num_parts, "ZERO_BLOCK": 1024,
        },
        num_warps=8,
        wants_sass=True,
    )  # fmt: skip


def _layout_of_the_sum(kernel: CompiledKernel) -> str:
    """Return which lane and register has which number, and with it the order that they are added in."""
    summed = re.search(r'"tt\.reduce"\(.*?\}\) : \(tensor<\w+, (#\w+)>\)', kernel.ttgir, re.DOTALL)
    assert summed is not None
    layout = re.search(rf"^{summed[1]} = (.*)$", kernel.ttgir, re.MULTILINE)
    assert layout is not None
    return layout[1]


def test_it_compiles_for_every_architecture() -> None:
    for kernel in _compiled(8192, 1).values():
        assert_fits(kernel)


@pytest.mark.parametrize("has_order", [False, True])
def test_a_row_is_summed_in_one_order_however_many_programs_share_it(has_order: bool) -> None:
    alone, shared = (_compiled(4096, num_parts, has_order=has_order) for num_parts in (1, 8))
    for arch, kernel in alone.items():
        assert_fits(kernel)
        assert_fits(shared[arch])
        assert _layout_of_the_sum(kernel) == _layout_of_the_sum(shared[arch])
