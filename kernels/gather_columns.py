"""Columns of a matrix in another order: activations for weights whose inputs were sorted (engine/input_order.py)."""

import torch
import triton
import triton.language as tl

from .launch import launch_options, release_next_kernel, wait_for_previous_kernel

_BLOCK = 1024


@triton.jit
def _gather_columns_kernel(  # type: ignore[no-untyped-def]
    x,
    order,
    out,
    num_columns,
    x_stride,
    out_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < num_columns
    sources = tl.load(order + columns, mask=is_inside, other=0)
    wait_for_previous_kernel(PDL)
    values = tl.load(x + row * x_stride + sources, mask=is_inside, other=0.0)
    tl.store(out + row * out_stride + columns, values, mask=is_inside)
    release_next_kernel(PDL)


def gather_columns(x: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """Write x[:, order] to out; x [M, D] and out [M, K] of one type, order int32 [K] with values 0 .. D - 1.

    Columns of x and out are adjacent. Raises ValueError when shapes or types do not fit.
    """
    num_rows, num_columns = out.shape
    if x.shape[0] != num_rows or order.shape != (num_columns,) or x.dtype != out.dtype:
        raise ValueError(
            f"gather_columns got x {tuple(x.shape)} {x.dtype}, order {tuple(order.shape)} and out {tuple(out.shape)} "
            f"{out.dtype}; out has a row for each of x and a column for each of order, in x's type"
        )
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the columns of x and out have to be adjacent in memory")
    if num_rows == 0:
        return
    _gather_columns_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK))](
        x, order, out, num_columns, x.stride(0), out.stride(0), BLOCK=_BLOCK, num_warps=4, **launch_options(x.device)
    )
