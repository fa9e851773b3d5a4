"""Products of 16-bit activations with packed 4-bit weights: the kernel for any number of rows, and its launchers.

Operands are swapped, out^T = W x^T, so that the weight is the tensor core's left operand, which it may take from
registers: a weight is loaded, unpacked by a few register instructions (see w4a16_tiles.py) and multiplied without going
through shared memory (the design of Machete, vllm-project/vllm, csrc/quantization/machete, and of TurboMind's Hopper
kernels). The zero point is taken off each value, the scale multiplies each group's product in fp32, or in wide tiles
each weight. Few rows leave few tiles, so programs also share the inputs (split-K: Hoque et al., arXiv:2402.00025): into
an fp32 accumulator they add atomically, otherwise the last program of a tile to finish sums the others' parts in
order. On an H200 the ordered sum costs 1.3 to 2.7 us more at one row and 8 us at 64.

From some hundreds of rows on it is faster to unpack the weight and multiply with the vendor's library:
w4a16_dequantize.py. The tile of each case is w4a16_plan.py's.
"""

import torch
import triton
import triton.language as tl

from .launch import is_interpreted, launch, release_next_kernel, wait_for_previous_kernel
from .w4a16_dequantize import add_dequantized, store_dequantized, swiglu_dequantized
from .w4a16_hopper import launch_hopper
from .w4a16_plan import DEQUANTIZE, HopperTile, Operation, Tile, bucket_of, choose_tile, deterministic_tile
from .w4a16_tiles import (
    RECORD_INPUTS,
    PackedWeight,
    can_pack,
    has_wgmma,
    input_order,
    mma_sync_width,
    pack_weight,
    scales_of,
    unpack_tile,
    weight_row_order,
)
from .w4a16_workspace import Workspace, workspace_bytes

__all__ = [
    "PackedWeight",
    "Workspace",
    "can_pack",
    "pack_weight",
    "w4a16_add",
    "w4a16_matmul",
    "w4a16_swiglu",
    "workspace_bytes",
]

# wgmma takes 64 rows of the left operand, so four warps, and at least 16 columns is what Triton gives it.
_WGMMA_WARPS = 4
_WGMMA_LEAST_COLUMNS = 16


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_splits"])
def _w4a16_kernel(  # type: ignore[no-untyped-def]
    x,
    records,
    out,
    bias,
    partials,
    counters,
    num_rows,
    out_features,
    num_blocks,
    x_stride,
    out_stride,
    num_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    GROUPS: tl.constexpr,  # scale groups of a record
    SCALES_AFTER: tl.constexpr,
    PACKED_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPED_ROWS: tl.constexpr,
    OPERATION: tl.constexpr,
    IS_ORDERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WAITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    RECORD: tl.constexpr = 1024 + 64 * GROUPS
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    if GROUPED_ROWS == 1:
        tile_n = tile % tiles_n
        tile_m = tile // tiles_n
    else:
        first = tile // (GROUPED_ROWS * tiles_n) * GROUPED_ROWS
        size = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first, GROUPED_ROWS)
        within = tile % (GROUPED_ROWS * tiles_n)
        tile_m = first + within % size
        tile_n = within // size
    first_block = split * num_blocks // num_splits
    last_block = (split + 1) * num_blocks // num_splits

    tile_records = records + (tile_n * (BLOCK_N // 64)).to(tl.int64) * num_blocks * RECORD
    row = tl.arange(0, BLOCK_N)
    word = tl.arange(0, 16)
    record_of_row = row // 64 * num_blocks * RECORD
    word_offsets = (record_of_row + row % 64 * 16)[:, None] + word[None, :]
    if GROUPS == 1:
        scale_offsets = record_of_row + 1024 + row % 64
    else:
        scale_offsets = (record_of_row + 1024 + row % 64 * GROUPS)[:, None] + (word % 4 * GROUPS // 4)[None, :]
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = m < num_rows
    x_rows = x + m.to(tl.int64)[None, :] * x_stride + input_order(PACKED_WIDTH, WIDTH)[:, None]

    wait_for_previous_kernel(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        block_records = tile_records + block * RECORD
        words = tl.load(block_records + word_offsets)
        scale_words = tl.load(block_records + scale_offsets)
        right = tl.load(x_rows + block * 128, mask=is_row[None, :], other=0.0)
        unpack_words = scale_words
        if GROUPS == 1:
            unpack_words = scale_words[:, None]
        left = unpack_tile(words, unpack_words, BLOCK_N, DTYPE, not SCALES_AFTER, WIDTH, INTERPRETED)
        if INTERPRETED:  # it would multiply the bits of bf16 numbers as integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        if SCALES_AFTER:
            scales = weight_row_order(scales_of(scale_words, DTYPE), BLOCK_N)
            acc += tl.dot(left, right) * scales[:, None]
        elif WAITS:
            # Triton 3.6 lets the next round unpack into registers that a wgmma still reads when nothing here uses its
            # result: errors of 25 to 79 times the values were seen. A use, even an empty one, makes it wait.
            acc = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tl.dot(left, right, acc)], dtype=tl.float32, is_pure=False, pack=1
            )
        else:
            acc = tl.dot(left, right, acc)
    release_next_kernel(PDL)

    is_last = True
    if IS_ORDERED:
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        is_kept = is_row[None, :] & (place >= 0)
        parts = partials + (tile * num_splits).to(tl.int64) * (BLOCK_N * BLOCK_M) + place
        tl.store(parts + split * (BLOCK_N * BLOCK_M), acc, mask=is_kept)
        tl.debug_barrier()  # all threads' stores are made before one thread announces them
        is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1
        if is_last:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.range(0, num_splits, num_stages=1):
                acc += tl.load(parts + part * (BLOCK_N * BLOCK_M), mask=is_kept, other=0.0, cache_modifier=".cg")
            tl.store(counters + tile, 0)
    if is_last:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_BIAS and (IS_ORDERED or split == 0):
            source = n
            if OPERATION == "swiglu":
                source = n // 8 % 2 * (out_features // 2) + n // 16 * 8 + n % 8
            acc += tl.load(bias + source, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
        out_rows = out + m.to(tl.int64)[None, :] * out_stride
        if OPERATION == "swiglu":
            turns = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
            gate, up = tl.split(turns.reshape(BLOCK_N // 2, BLOCK_M, 2))
            half = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            is_written = is_row[None, :] & (half < out_features // 2)[:, None]
            result = gate / (1.0 + tl.exp(-gate)) * up
            tl.store(out_rows + half[:, None], result.to(out.dtype.element_ty), mask=is_written)
        else:
            is_written = is_row[None, :] & (n < out_features)[:, None]
            if OPERATION == "store":
                tl.store(out_rows + n[:, None], acc.to(out.dtype.element_ty), mask=is_written)
            elif IS_ORDERED:
                acc += tl.load(out_rows + n[:, None], mask=is_written, other=0.0)
                tl.store(out_rows + n[:, None], acc, mask=is_written)
            else:
                tl.atomic_add(out_rows + n[:, None], acc, mask=is_written, sem="relaxed")


def w4a16_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    workspace: Workspace,
    *,
    bias: torch.Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Write x W^T + bias to out.

    x [M, in_features] and out [M, out_features] of the weight's type, rows of any stride with adjacent columns; bias
    16-bit or fp32 [out_features]. deterministic: a row's result is the same bits whatever M is and wherever the row
    stands, at the cost of speed. Raises ValueError when shapes, types or devices do not fit.
    """
    _check(x, weight, out, weight.out_features, weight.dtype, is_interleaved=False)
    _multiply(Operation.STORE, x, weight, out, workspace, bias, deterministic)


def w4a16_add(
    x: torch.Tensor,
    weight: PackedWeight,
    accumulator: torch.Tensor,
    workspace: Workspace,
    *,
    bias: torch.Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Add x W^T + bias to the fp32 accumulator [M, out_features]; arguments as in `w4a16_matmul`.

    Unless deterministic, the order in which programs add their parts is left open, and with it the last bits.
    """
    _check(x, weight, accumulator, weight.out_features, torch.float32, is_interleaved=False)
    _multiply(Operation.ADD, x, weight, accumulator, workspace, bias, deterministic)


def w4a16_swiglu(
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    workspace: Workspace,
    *,
    bias: torch.Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Write silu(gate) * up to out [M, out_features / 2], where [gate, up] = x W^T + bias (Shazeer, arXiv:2002.05202).

    The weight was packed with interleave_halves; bias is in the order before that, gate then up. Else as in
    `w4a16_matmul`.
    """
    _check(x, weight, out, weight.out_features // 2, weight.dtype, is_interleaved=True)
    _multiply(Operation.SWIGLU, x, weight, out, workspace, bias, deterministic)


def _check(
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    out_columns: int,
    out_dtype: torch.dtype,
    *,
    is_interleaved: bool,
) -> None:
    if x.shape[1] != weight.in_features or out.shape[0] != x.shape[0] or out.shape[1] != out_columns:
        raise ValueError(
            f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight that takes {weight.in_features} inputs "
            f"and here gives {out_columns} outputs"
        )
    if x.dtype != weight.dtype or out.dtype != out_dtype:
        raise ValueError(f"x is {x.dtype} and out {out.dtype}; this product wants {weight.dtype} and {out_dtype}")
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the columns of x and out have to be adjacent in memory")
    if weight.interleaved != is_interleaved:
        packed = "interleaved halves, for w4a16_swiglu" if weight.interleaved else "rows in order"
        raise ValueError(f"the weight was packed with {packed}; pack it the other way for this product")


def _multiply(
    operation: Operation,
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    workspace: Workspace,
    bias: torch.Tensor | None,
    deterministic: bool,
) -> None:
    num_rows = x.shape[0]
    if num_rows == 0:
        return
    key = (operation, 0 if deterministic else bucket_of(num_rows))
    if key not in weight.cache:
        weight.cache[key] = deterministic_tile(weight) if deterministic else choose_tile(*key, weight)
    tile = weight.cache[key]
    if tile is not DEQUANTIZE:
        launch_tile(operation, x, weight, out, workspace, bias, tile, is_ordered=deterministic)
    elif operation is Operation.ADD:
        add_dequantized(x, weight, out, workspace, bias)
    elif operation is Operation.STORE:
        store_dequantized(x, weight, out, workspace, bias)
    else:
        swiglu_dequantized(x, weight, out, workspace, bias)


def launch_tile(
    operation: Operation,
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    workspace: Workspace,
    bias: torch.Tensor | None,
    tile: Tile | HopperTile,
    *,
    is_ordered: bool = False,
) -> None:
    """Launch the kernel with this tile; is_ordered: sum the parts in order where atomic additions would do."""
    if isinstance(tile, HopperTile):
        launch_hopper(operation, x, weight, out, bias, tile)
        return
    is_ordered = is_ordered or (operation is not Operation.ADD and tile.num_splits > 1)
    num_rows = x.shape[0]
    rows_at_once = num_rows
    if is_ordered:
        rows_at_once = workspace.rows_at_once(tile, weight.padded_out_features)
    uses_wgmma = has_wgmma(x.device) and tile.num_warps >= _WGMMA_WARPS and tile.block_m >= _WGMMA_LEAST_COLUMNS
    interpreted = is_interpreted()
    for start in range(0, num_rows, rows_at_once):
        stop = min(start + rows_at_once, num_rows)
        grid = (
            triton.cdiv(weight.out_features, tile.block_n) * triton.cdiv(stop - start, tile.block_m),
            tile.num_splits,
        )
        launch(
            _w4a16_kernel,
            grid,
            x.device,
            x[start:stop] if rows_at_once < num_rows else x,
            weight.records,
            out[start:stop] if rows_at_once < num_rows else out,
            x if bias is None else bias,
            workspace.partials,
            workspace.counters,
            stop - start,
            weight.out_features,
            weight.in_features // RECORD_INPUTS,
            x.stride(0),
            out.stride(0),
            tile.num_splits,
            BLOCK_N=tile.block_n,
            BLOCK_M=tile.block_m,
            NUM_STAGES=tile.num_stages,
            GROUPS=RECORD_INPUTS // weight.group_size,
            SCALES_AFTER=tile.scales_after,
            PACKED_WIDTH=weight.fragment_width,
            WIDTH=2 if uses_wgmma else mma_sync_width(),
            GROUPED_ROWS=tile.grouped_rows,
            OPERATION=operation.value,
            IS_ORDERED=is_ordered,
            HAS_BIAS=bias is not None,
            WAITS=uses_wgmma,
            INTERPRETED=interpreted,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
