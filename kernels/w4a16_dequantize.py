"""Products with packed 4-bit weights for many rows: unpack a slice of the weight to 16 bits, multiply, next slice.

Unpacking costs the same for any number of rows, and the vendor's library (cuBLAS) multiplies 16-bit matrices faster
than a fused kernel unpacks and multiplies them. A slice lives in the workspace, small enough to stay in the L2 cache.
The values are those of `reference.w4a16_weight`, rounded to the 16-bit type.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .launch import is_interpreted, launch, release_next_kernel, wait_for_previous_kernel
from .swiglu import swiglu
from .w4a16_tiles import RECORD_INPUTS, RECORD_ROWS, PackedWeight, unpack_tile
from .w4a16_workspace import Workspace

_BLOCKS_PER_PROGRAM = 4
_NUM_WARPS = 4
# SwiGLU needs the product of a slice, which bounds the rows that a slice's height leaves room for.
_SWIGLU_ROWS_AT_ONCE = 8192


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    records,
    out,
    num_blocks,
    num_rows,
    in_features,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    RECORD: tl.constexpr = 1024 + 64 * GROUPS
    DTYPE: tl.constexpr = out.dtype.element_ty
    tile = tl.program_id(0)
    first_block = tl.program_id(1) * BLOCKS
    row = tl.arange(0, 64)
    word = tl.arange(0, 16)
    word_offsets = row[:, None] * 16 + word[None, :]
    scale_offsets = (1024 + row * GROUPS)[:, None] + (word % 4 * GROUPS // 4)[None, :]
    n = tile * 64 + row
    is_row = (n < num_rows)[:, None]
    if INTERLEAVED:
        n = n // 8 % 2 * (num_rows // 2) + n // 16 * 8 + n % 8
    out_rows = out + n.to(tl.int64)[:, None] * in_features + tl.arange(0, 128)[None, :]
    tile_records = records + tile.to(tl.int64) * num_blocks * RECORD
    wait_for_previous_kernel(PDL)
    for block in range(first_block, tl.minimum(first_block + BLOCKS, num_blocks)):
        words = tl.load(tile_records + block * RECORD + word_offsets)
        scale_words = tl.load(tile_records + block * RECORD + scale_offsets)
        values = unpack_tile(words, scale_words, 64, DTYPE, True, WIDTH, INTERPRETED)
        tl.store(out_rows + block * 128, values, mask=is_row)
    release_next_kernel(PDL)


def dequantize(weight: PackedWeight, first_row: int, out: torch.Tensor) -> None:
    """Unpack rows first_row .. first_row + R of the packed order to out [R, in_features], contiguous.

    first_row is a multiple of 64. Of an interleaved weight, whose packed order is gate and up in turns of eight rows,
    the gates come out as the first half and the ups as the second.
    """
    num_rows = out.shape[0]
    num_blocks = weight.in_features // RECORD_INPUTS
    launch(
        _dequantize_kernel,
        (triton.cdiv(num_rows, RECORD_ROWS), triton.cdiv(num_blocks, _BLOCKS_PER_PROGRAM)),
        out.device,
        weight.records[first_row // RECORD_ROWS :],
        out,
        num_blocks,
        num_rows,
        weight.in_features,
        GROUPS=RECORD_INPUTS // weight.group_size,
        WIDTH=weight.fragment_width,
        INTERLEAVED=weight.interleaved,
        BLOCKS=_BLOCKS_PER_PROGRAM,
        INTERPRETED=is_interpreted(),
        num_warps=_NUM_WARPS,
    )


def store_dequantized(
    x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, workspace: Workspace, bias: torch.Tensor | None
) -> None:
    """Write x W^T + bias to out; arguments as in `w4a16.w4a16_matmul`."""
    for start, matrix in _slices(weight, workspace):
        stop = start + matrix.shape[0]
        _store_product(x, matrix, out[:, start:stop], None if bias is None else bias[start:stop])


def add_dequantized(
    x: torch.Tensor, weight: PackedWeight, accumulator: torch.Tensor, workspace: Workspace, bias: torch.Tensor | None
) -> None:
    """Add x W^T + bias to the fp32 accumulator; arguments as in `w4a16.w4a16_add`."""
    for start, matrix in _slices(weight, workspace):
        columns = accumulator[:, start : start + matrix.shape[0]]
        if x.is_cuda:
            torch.addmm(columns, x, matrix.t(), out_dtype=torch.float32, out=columns)
        else:  # there torch has no product of 16-bit matrices with a result of 32
            columns.addmm_(x.float(), matrix.t().float())
    if bias is not None:
        accumulator += bias


def swiglu_dequantized(
    x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, workspace: Workspace, bias: torch.Tensor | None
) -> None:
    """Write silu(gate) * up to out; arguments as in `w4a16.w4a16_swiglu`."""
    numbers = workspace.numbers(x.dtype)
    for first in range(0, x.shape[0], _SWIGLU_ROWS_AT_ONCE):
        rows, rows_out = x[first : first + _SWIGLU_ROWS_AT_ONCE], out[first : first + _SWIGLU_ROWS_AT_ONCE]
        for start, matrix in _slices(weight, workspace, num_products=rows.shape[0]):
            height = matrix.shape[0]
            products = numbers[matrix.numel() :][: rows.shape[0] * height].view(rows.shape[0], height)
            columns = slice(start // 2, (start + height) // 2)
            _store_product(rows, matrix, products, None if bias is None else bias.view(2, -1)[:, columns].reshape(-1))
            swiglu(products, rows_out[:, columns])


def _store_product(x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, matrix.t(), out=out)


def _slices(weight: PackedWeight, workspace: Workspace, *, num_products: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, matrix [rows, in_features]) over the weight; each matrix overwrites the one before it.

    num_products: so many numbers a row of the matrix stay free behind it.
    """
    numbers = workspace.numbers(weight.dtype)
    most = numbers.numel() // ((weight.in_features + num_products) * RECORD_ROWS)
    if most == 0:
        raise ValueError(
            f"a workspace of {numbers.numel() * 2} bytes has no room for {RECORD_ROWS} rows of {weight.in_features} "
            f"weights and {num_products} products each"
        )
    num_tiles = -(-weight.out_features // RECORD_ROWS)
    height = -(-num_tiles // -(-num_tiles // most)) * RECORD_ROWS
    for start in range(0, weight.out_features, height):
        rows = min(height, weight.out_features - start)
        matrix = numbers[: rows * weight.in_features].view(rows, weight.in_features)
        dequantize(weight, start, matrix)
        yield start, matrix
