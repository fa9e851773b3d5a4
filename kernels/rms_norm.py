"""Root-mean-square normalization of rows of the residual stream, for one token or many thousands.

y = x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich, 2019), in fp32, rounded once at the store. A decode step
has fewer rows than the GPU has processors, so a row is shared by several programs: each sums the whole row, which is in
the L2 cache, and writes its part. On the way the kernel can clear the fp32 buffer that the next product adds into.

A row's bits depend on nothing but the row: every program sums in the same order, however many share the row.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, release_next_kernel, wait_for_previous_kernel

_NUM_WARPS = 8
# Programs that share a row, and how many programs are enough: past one a processor they only read the row again. On an
# H200, in a graph, with clearing: 1 row in 4, 8 and 16 parts 1.26, 1.27 and 1.28 us (4 warps, 2 parts: 1.77 us),
# 64 rows in 1, 2 and 8 parts 2.39, 2.33 and 2.77 us; without clearing 256 rows in 1 and 2 parts 3.03 and 3.20 us.
_MOST_PARTS = 8
_ENOUGH_PROGRAMS = 128
_ZERO_BLOCK = 1024
# Up to here the next kernel may start as soon as this one has its input, to fetch its weights meanwhile: a decode step
# of InternLM2.5-7B takes 1.80 ms instead of 1.82 for one row, on an H200, but 2.09 instead of 1.90 for four.
_MOST_ROWS_TO_RELEASE_FIRST = 1


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    rows,
    zero,
    order,
    x_stride,
    out_stride,
    num_columns,
    part_columns,
    zero_size,
    eps,
    HAS_ROWS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    RELEASES_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    ZERO_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * part_columns
    part = first + tl.arange(0, PART_BLOCK)
    is_ours = (part < first + part_columns) & (part < num_columns)
    sources = part
    if HAS_ORDER:
        sources = tl.load(order + part, mask=is_ours, other=0)
    scale = tl.load(weight + sources, mask=is_ours, other=0.0).to(tl.float32)

    wait_for_previous_kernel(PDL)
    if RELEASES_FIRST:
        release_next_kernel(PDL)
    source = row
    if HAS_ROWS:
        source = tl.load(rows + row).to(tl.int64)
    source_row = x + source * x_stride
    # A second axis keeps the layout of the sum, and so the order of its additions, apart from how parts are written.
    columns = tl.arange(0, BLOCK)[None, :]
    values = tl.load(source_row + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / num_columns + eps)
    if PART_BLOCK == BLOCK and not HAS_ORDER:
        normalized = values.reshape(BLOCK) * inverse
    else:
        normalized = tl.load(source_row + sources, mask=is_ours, other=0.0).to(tl.float32) * inverse
    tl.store(out + row * out_stride + part, (normalized * scale).to(out.dtype.element_ty), mask=is_ours)
    if HAS_ZERO:
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        program = row * tl.num_programs(1) + tl.program_id(1)
        offsets = program * ZERO_BLOCK + tl.arange(0, ZERO_BLOCK)
        for _ in range(tl.cdiv(zero_size, num_programs * ZERO_BLOCK)):
            tl.store(zero + offsets, tl.zeros((ZERO_BLOCK,), tl.float32), mask=offsets < zero_size)
            offsets += num_programs * ZERO_BLOCK
    if not RELEASES_FIRST:
        release_next_kernel(PDL)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> None:
    """Write the normalized rows of x [num_rows, D], times weight [D], to out [M, D].

    x is fp32 (the residual stream) or 16-bit, weight and out are 16-bit or fp32; rows of x and out are contiguous.
    rows, integers [M], says which row of x each row of out is made of; without it M = num_rows. zero, a contiguous fp32
    tensor of any shape, is set to zeros. order, int32 [D], says which column of the result each column of out is (for
    weights whose inputs were sorted). Raises ValueError when shapes do not fit.
    """
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    num_columns = weight.shape[0]
    if x.shape[1] != num_columns or out.shape != (num_rows, num_columns):
        raise ValueError(
            f"rms_norm got x {tuple(x.shape)}, weight {tuple(weight.shape)} and out {tuple(out.shape)}; "
            f"out has to be {(num_rows, num_columns)} and x to have {num_columns} columns"
        )
    if order is not None and order.shape != (num_columns,):
        raise ValueError(f"rms_norm got an order of {tuple(order.shape)} for {num_columns} columns")
    if x.stride(1) != 1 or out.stride(1) != 1 or (zero is not None and not zero.is_contiguous()):
        raise ValueError("rms_norm needs rows of x and out whose columns are adjacent, and a contiguous `zero`")
    if num_rows == 0:
        return
    block = triton.next_power_of_2(num_columns)
    num_parts = _MOST_PARTS
    while num_parts > 1 and num_parts * num_rows > _ENOUGH_PROGRAMS:
        num_parts //= 2
    part_columns = triton.cdiv(num_columns, num_parts)
    launch(
        _rms_norm_kernel,
        (num_rows, num_parts),
        x.device,
        x,
        weight,
        out,
        out if rows is None else rows,
        out if zero is None else zero,
        out if order is None else order,
        x.stride(0),
        out.stride(0),
        num_columns,
        part_columns,
        0 if zero is None else zero.numel(),
        eps,
        HAS_ROWS=rows is not None,
        HAS_ZERO=zero is not None,
        HAS_ORDER=order is not None,
        RELEASES_FIRST=num_rows <= _MOST_ROWS_TO_RELEASE_FIRST,
        BLOCK=block,
        PART_BLOCK=triton.next_power_of_2(part_columns),
        ZERO_BLOCK=_ZERO_BLOCK,
        num_warps=_NUM_WARPS,
    )
