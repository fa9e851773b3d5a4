"""The product with packed 4-bit weights for Hopper: one warp fetches, groups of four warps unpack and multiply.

What w4a16.py's kernel cannot do in plain Triton: the fetching warp runs ahead through a ring of shared memory (TMA),
and each group waits for its own data alone, so that one group unpacks while another one multiplies. In plain Triton all
warps pass one barrier a round, and tensor cores stand still while weights are unpacked.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import launch
from .w4a16_plan import HopperTile, Operation
from .w4a16_tiles import (
    BF16_ASM,
    BF16_SCALED_ASM,
    FP16_ASM,
    FP16_SCALED_ASM,
    ONE_ARGUMENT,
    RECORD_INPUTS,
    RECORD_ROWS,
    THREE_ARGUMENTS,
    TWO_ARGUMENTS,
    WORDS_PER_RECORD,
    PackedWeight,
)

_REGISTERS = 65536  # of a processor
_FETCHING_REGISTERS = gl.constexpr(24)
_MOST_REGISTERS = 240
# Products of up to 8 rows whose programs take so many rounds are mma.sync's, which nobody waits for: a decode step of
# InternLM2.5-7B takes 1.82 ms instead of 1.85 on an H200 with gate and up, 32 rounds, and 1.83 with queries, keys and
# values, 6 rounds, too. They let the next kernel start halfway: some processors hold fewer programs, are done a third
# earlier, and there the next product's fetch their weights meanwhile: 1.73 ms instead of 1.77, for four rows 1.80
# instead of 1.83.
_FEW_ROWS = 8
_FEWEST_SYNCHRONOUS_ROUNDS = 8
_RECORD_WORDS = WORDS_PER_RECORD + RECORD_ROWS
_X_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)
_WORD_LAYOUT = gl.NVMMASharedLayout(0, 32, rank=1)
# Names that changed after Triton 3.7 and 3.8.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


# Register, lane and warp that hold each word of a record, so that its values are wgmma's left operand where they are.
_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [512]],
        lane_bases=[[4], [8], [16], [32], [64]],
        warp_bases=[[128], [256]],
        block_bases=[],
        shape=[1024],
    )
)
_TABLE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [32, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)


@gluon.jit
def _wait_for_previous_kernel(PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _release_next_kernel(PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _fetch_weights(source, rings, i, stage, BYTES: gl.constexpr, GROUPS: gl.constexpr):  # type: ignore[no-untyped-def]
    _, word_ring, scale_ring, full, _, _ = rings
    _, records, scales, _, first_record, records_per_tile, _ = source
    mbarrier.expect(full.index(stage), BYTES)
    for group in gl.static_range(GROUPS):
        word = (first_record + group * records_per_tile + i) * 1088
        _copy(records, [word], full.index(stage), word_ring.index(stage * GROUPS + group))
        _copy(scales, [word + 1024], full.index(stage), scale_ring.index(stage * GROUPS + group))


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    source, rings, num_rounds, BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr
):
    """Keep the ring full: for each round the records of all groups and the rows' next 128 inputs."""
    x_ring, _, _, full, empty, _ = rings
    x_rows, _, _, first_row, _, _, first_block = source
    BYTES: gl.constexpr = BLOCK_M * 256 + GROUPS * 4352
    for early in gl.static_range(STAGES):  # weights are no kernel's output: fetched before the previous one ends
        if early < num_rounds:
            _fetch_weights(source, rings, early, early, BYTES, GROUPS)
    _wait_for_previous_kernel(PDL)
    for early in gl.static_range(STAGES):
        if early < num_rounds:
            _copy(x_rows, [first_row, (first_block + early) * 128], full.index(early), x_ring.index(early))
    for i in range(STAGES, num_rounds):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES - 1) & 1)
        _fetch_weights(source, rings, i, stage, BYTES, GROUPS)
        _copy(x_rows, [first_row, (first_block + i) * 128], full.index(stage), x_ring.index(stage))


@gluon.jit
def _unpack(words, scale_words, SCALED: gl.constexpr, DTYPE: gl.constexpr, LEFT: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return a record's values [64, 128] as wgmma's left operand; words [64, 16], scale_words [64, 1]."""
    zeros = scale_words >> 16
    scales = (scale_words & 0xFFFF) * 0x00010001
    if DTYPE.is_bf16():
        negative = zeros * 0x00010001 - 0x3CFF3D00
        if SCALED:
            v = gl.inline_asm_elementwise(
                BF16_SCALED_ASM, TWO_ARGUMENTS, [words, negative, scales], (gl.bfloat16,) * 8, is_pure=True, pack=1
            )
        else:
            v = gl.inline_asm_elementwise(
                BF16_ASM, ONE_ARGUMENT, [words, negative], (gl.bfloat16,) * 8, is_pure=True, pack=1
            )
    else:
        low = zeros * 0x00010001 + 0x64006400
        high = zeros * 0x00100010 - 0x2BFF2C00
        if SCALED:
            v = gl.inline_asm_elementwise(
                FP16_SCALED_ASM, THREE_ARGUMENTS, [words, low, high, scales], (gl.float16,) * 8, is_pure=True, pack=1
            )
        else:
            v = gl.inline_asm_elementwise(
                FP16_ASM, TWO_ARGUMENTS, [words, low, high], (gl.float16,) * 8, is_pure=True, pack=1
            )
    even = gl.join(gl.join(v[0], v[4]), gl.join(v[2], v[6]))
    odd = gl.join(gl.join(v[1], v[5]), gl.join(v[3], v[7]))
    values = gl.join(even, odd).reshape([2, 4, 8, 4, 4, 2, 2, 2]).permute([1, 0, 2, 4, 5, 6, 3, 7]).reshape([64, 128])
    return gl.convert_layout(values, LEFT, assert_trivial=True)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    group,
    task,
    BLOCK_M: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    SCALES_AFTER: gl.constexpr,
    OPERATION: gl.constexpr,
    IS_SYNCHRONOUS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Take records of 64 outputs from the ring, multiply, and write the sums: the work of one group of four warps."""
    out, bias, rings, shape = task
    x_ring, word_ring, scale_ring, full, empty, done = rings
    first_row, first_column, first_block, num_rounds, num_rows, out_features, out_stride = shape
    DTYPE: gl.constexpr = x_ring.dtype
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0] if IS_SYNCHRONOUS else [3, 0],
        warps_per_cta=[4, 1],
        instr_shape=[16, 8] if IS_SYNCHRONOUS else [16, BLOCK_M, 16],
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    acc = gl.zeros([64, BLOCK_M], gl.float32, RESULT)
    nothing = gl.zeros([64, BLOCK_M], gl.float32, RESULT)
    for i in range(num_rounds):
        stage = i % STAGES
        if IS_SYNCHRONOUS and i == num_rounds // 2:
            _release_next_kernel(PDL)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        words = word_ring.index(stage * GROUPS + group).load(_WORDS)
        words = gl.convert_layout(words.reshape([64, 16]), _TABLE, assert_trivial=True)
        scale_words = scale_ring.index(stage * GROUPS + group).load(gl.SliceLayout(1, _TABLE))
        left = _unpack(words, gl.expand_dims(scale_words, 1), not SCALES_AFTER, DTYPE, LEFT)
        right = x_ring.index(stage).permute([1, 0])
        start = nothing if SCALES_AFTER else acc
        if IS_SYNCHRONOUS:
            part = mma_v2(left, right.load(gl.DotOperandLayout(1, RESULT, 2)), start)
        else:
            part = hopper.warpgroup_mma(left, right, start, use_acc=not SCALES_AFTER, is_async=True)
            part = hopper.warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage), count=1)
        if SCALES_AFTER:
            if DTYPE.is_bf16():
                scale = (scale_words << 16).to(gl.float32, bitcast=True)
            else:
                scale = scale_words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
            scale = scale.reshape([2, 4, 8]).permute([1, 0, 2]).reshape([64])
            scale = gl.convert_layout(scale, gl.SliceLayout(1, RESULT), assert_trivial=True)
            acc += part * gl.expand_dims(scale, 1)
        else:
            acc = part
    _release_next_kernel(PDL)
    _wait_for_previous_kernel(PDL)
    if HAS_BIAS:
        n = first_column + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, RESULT))
        source = n
        if OPERATION == "swiglu":
            source = n // 8 % 2 * (out_features // 2) + n // 16 * 8 + n % 8
        is_added = (n < out_features) & (first_block == 0)
        acc += gl.expand_dims(gl.load(bias + source, mask=is_added, other=0.0).to(gl.float32), 1)
    if OPERATION == "swiglu":
        turns = acc.reshape([4, 2, 8, BLOCK_M]).permute([0, 2, 3, 1])
        gate, up = gl.split(turns.reshape([32, BLOCK_M, 2]))
        result = gate / (1.0 + gl.exp(-gate)) * up
        column = (first_column + group * 64) // 2
        num_columns = out_features // 2
    else:
        result = acc
        column = first_column + group * 64
        num_columns = out_features
    if BLOCK_M < 32:
        _write(result, out, first_row, column, num_rows, num_columns, out_stride, OPERATION)
    else:
        mbarrier.arrive(done, count=1)  # the ring's memory is free once every group is through its rounds
        mbarrier.wait(done, 0)
        COLUMNS: gl.constexpr = result.shape[0]
        ROOM: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])  # no two lanes of a store meet in a bank
        if _REINTERPRETS:
            room = x_ring.index(group).reinterpret(gl.float32, [BLOCK_M, COLUMNS], ROOM)
        else:
            room = x_ring.index(group)._reinterpret(gl.float32, [BLOCK_M, COLUMNS], ROOM)
        room.permute([1, 0]).store(result)
        WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // COLUMNS, COLUMNS // 4], [4, 1], [1, 0])
        for part in gl.static_range(BLOCK_M // 32):
            rows = room.slice(part * 32, 32).load(WIDE)
            _write_rows(rows, out, first_row + part * 32, column, num_rows, num_columns, out_stride, OPERATION)


@gluon.jit
def _write(  # type: ignore[no-untyped-def]
    result, out, first_row, first_column, num_rows, num_columns, out_stride, OPERATION: gl.constexpr
):
    """Write or add results [columns, rows] where the tensor cores left them."""
    LAYOUT: gl.constexpr = result.type.layout
    n = gl.expand_dims(first_column + gl.arange(0, result.shape[0], gl.SliceLayout(1, LAYOUT)), 1)
    m = gl.expand_dims(first_row + gl.arange(0, result.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    _put(out + m.to(gl.int64) * out_stride + n, result, (m < num_rows) & (n < num_columns), OPERATION)


@gluon.jit
def _write_rows(  # type: ignore[no-untyped-def]
    result, out, first_row, first_column, num_rows, num_columns, out_stride, OPERATION: gl.constexpr
):
    """Write or add results [rows, columns], neighbours of a row in one thread."""
    LAYOUT: gl.constexpr = result.type.layout
    m = gl.expand_dims(first_row + gl.arange(0, result.shape[0], gl.SliceLayout(1, LAYOUT)), 1)
    n = gl.expand_dims(first_column + gl.arange(0, result.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    _put(out + m.to(gl.int64) * out_stride + n, result, (m < num_rows) & (n < num_columns), OPERATION)


@gluon.jit
def _put(places, result, is_written, OPERATION: gl.constexpr):  # type: ignore[no-untyped-def]
    if OPERATION == "add":  # nobody waits for what was there: 2 to 7 % faster than loading on an H200
        gl.atomic_add(places, result, mask=is_written, sem="relaxed")
    else:
        gl.store(places, result.to(places.dtype.element_ty), mask=is_written)


@gluon.jit(do_not_specialize=["num_rows", "num_blocks", "num_splits"])
def _hopper_kernel(  # type: ignore[no-untyped-def]
    x_rows,
    records,
    scales,
    out,
    bias,
    num_rows,
    out_features,
    num_blocks,
    out_stride,
    num_splits,
    BLOCK_M: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    SCALES_AFTER: gl.constexpr,
    GROUPED_ROWS: gl.constexpr,
    OPERATION: gl.constexpr,
    IS_SYNCHRONOUS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    BLOCK_N: gl.constexpr = 64 * GROUPS
    tile = gl.program_id(0)
    split = gl.program_id(1)
    tiles_n = (out_features + BLOCK_N - 1) // BLOCK_N
    first = tile // (GROUPED_ROWS * tiles_n) * GROUPED_ROWS
    size = gl.minimum((num_rows + BLOCK_M - 1) // BLOCK_M - first, GROUPED_ROWS)
    within = tile % (GROUPED_ROWS * tiles_n)
    first_row = (first + within % size) * BLOCK_M
    tile_n = within // size
    first_block = split * num_blocks // num_splits
    num_rounds = (split + 1) * num_blocks // num_splits - first_block

    x_ring = gl.allocate_shared_memory(x_rows.dtype, [STAGES, BLOCK_M, 128], x_rows.layout)
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 1024], records.layout)
    scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 64], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    if BLOCK_M < 32:
        # Nobody waits for it. A barrier of its own would be dead at once and share its memory with what the groups are
        # told of their tile, over which its initialization may come late: programs then computed a tile past the end.
        done = full
    else:
        done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(done, count=GROUPS)
    hopper.fence_async_shared()

    rings = (x_ring, word_ring, scale_ring, full, empty, done)
    shape = (first_row, tile_n * BLOCK_N, first_block, num_rounds, num_rows, out_features, out_stride)
    task = (out, bias, rings, shape)
    source = (x_rows, records, scales, first_row, tile_n * GROUPS * num_blocks + first_block, num_blocks, first_block)
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize([
            (_multiply, (0, task, BLOCK_M, GROUPS, STAGES, SCALES_AFTER, OPERATION, IS_SYNCHRONOUS, HAS_BIAS, PDL)),
            (_fetch, (source, rings, num_rounds, BLOCK_M, GROUPS, STAGES, PDL)),
        ], [1], [_FETCHING_REGISTERS])
    else:
        gl.warp_specialize([
            (_multiply, (0, task, BLOCK_M, GROUPS, STAGES, SCALES_AFTER, OPERATION, IS_SYNCHRONOUS, HAS_BIAS, PDL)),
            (_multiply, (1, task, BLOCK_M, GROUPS, STAGES, SCALES_AFTER, OPERATION, IS_SYNCHRONOUS, HAS_BIAS, PDL)),
            (_fetch, (source, rings, num_rounds, BLOCK_M, GROUPS, STAGES, PDL)),
        ], [4, 1], [GROUP_REGISTERS, _FETCHING_REGISTERS])
    # fmt: on


def launch_hopper(
    operation: Operation,
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    tile: HopperTile,
) -> None:
    """Launch the kernel; arguments as in `w4a16.w4a16_matmul`.

    The weight's groups are of 128 inputs, and only sums into fp32, which are added atomically, may be split. The
    kernel reads the weight before the kernel that is launched just before it has ended, which must not write it.
    """
    if (_RECORD_WORDS, weight.fragment_width) != (weight.records.shape[2], 2):
        raise ValueError("Hopper's kernel takes weights in groups of 128 inputs, packed for its tensor cores")
    if tile.num_splits > 1 and operation is not Operation.ADD:
        raise ValueError(f"Hopper's kernel cannot split {operation}: only sums into fp32 can be added in parts")
    if "descriptors" not in weight.cache:
        weight.cache["descriptors"] = _describe(weight.records.view(-1))
    words, scales = weight.cache["descriptors"]
    rows = TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.block_m, RECORD_INPUTS], _X_LAYOUT)
    registers, group_registers = _registers(tile)
    grid = (
        triton.cdiv(weight.out_features, RECORD_ROWS * tile.num_groups) * triton.cdiv(x.shape[0], tile.block_m),
        tile.num_splits,
    )
    launch(
        _hopper_kernel,
        grid,
        x.device,
        rows,
        words,
        scales,
        out,
        out if bias is None else bias,
        x.shape[0],
        weight.out_features,
        weight.in_features // RECORD_INPUTS,
        out.stride(0),
        tile.num_splits,
        BLOCK_M=tile.block_m,
        GROUPS=tile.num_groups,
        STAGES=tile.num_stages,
        SCALES_AFTER=tile.scales_after,
        GROUPED_ROWS=tile.grouped_rows,
        OPERATION=operation.value,
        IS_SYNCHRONOUS=_is_synchronous(weight, tile),
        HAS_BIAS=bias is not None,
        GROUP_REGISTERS=group_registers,
        num_warps=4,
        maxnreg=registers,
    )


def _describe(records: torch.Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return TMA descriptors of the records' words and of their scales."""
    words = TensorDescriptor(records, [records.numel()], [1], [WORDS_PER_RECORD], _WORD_LAYOUT)
    return words, TensorDescriptor(records, [records.numel()], [1], [RECORD_ROWS], _WORD_LAYOUT)


def _is_synchronous(weight: PackedWeight, tile: HopperTile) -> bool:
    rounds = weight.in_features // RECORD_INPUTS // tile.num_splits
    return tile.block_m == _FEW_ROWS and rounds >= _FEWEST_SYNCHRONOUS_ROUNDS


def _registers(tile: HopperTile) -> tuple[int, int]:
    """Return a thread's registers at launch, so that the programs share a processor, and a multiplying thread's.

    The fetching warp, with the three idle ones that complete its group, gives its own away.
    """
    num_groups = tile.num_groups + 1
    at_launch = min(255, _REGISTERS // (tile.programs_per_processor * num_groups * 128)) // 8 * 8
    multiplying = (at_launch * num_groups - _FETCHING_REGISTERS.value) // tile.num_groups // 8 * 8
    return at_launch, min(_MOST_REGISTERS, multiplying)
