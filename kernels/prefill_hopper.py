"""Causal attention of long prompt chunks for Hopper: one warp fetches the context, two groups of four warps attend.

What prefill_attention.py's kernel cannot do in plain Triton (FlashAttention-3, Shah et al. 2024): the fetching warp
runs ahead through a ring of shared memory (TMA), and each group of warps waits for its own data alone, so that one
group's softmax runs while the other one multiplies. Takes contexts that were dequantized into scratch, whose places
past a context's end are zeros; a row's bits are not those of the other kernel.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import launch
from .w4a16_tiles import has_wgmma

TILE_ROWS = 128  # tokens times query heads of a group
# Context tokens that a step takes. On an H200 the first 4096 tokens of InternLM2.5-7B take 303 us a layer, 320 us with
# two products of 64 keys instead of one of 128, and 394 us in plain Triton; more stages change nothing.
_STEP_TOKENS = 128
# Values come in tiles: those places of a context's last tile that are past its end have to be zeros.
TILE_TOKENS = 64
_NUM_STAGES = 2
_FETCHING_REGISTERS = gl.constexpr(24)
_ATTENDING_REGISTERS = gl.constexpr(240)
_REGISTERS_AT_LAUNCH = 168  # of 384 threads: two attending groups and the fetching warp's
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)
# The name changed after Triton 3.7.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _wait_for_previous_kernel():  # type: ignore[no-untyped-def]
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _release_next_kernel():  # type: ignore[no-untyped-def]
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _exp2(x):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit
def _find_tile(  # type: ignore[no-untyped-def]
    query_starts,
    context_lens,
    num_sequences,
    tile,
    SEQUENCES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Return the tile's sequence, its number there from the end, query start and length, context length, first block.

    A tile past the last one has sequence num_sequences.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    sequences = gl.arange(0, SEQUENCES, LAYOUT)
    is_real = sequences < num_sequences
    starts = gl.load(query_starts + sequences, mask=is_real, other=0)
    lens = gl.load(query_starts + 1 + sequences, mask=is_real, other=0) - starts
    contexts = gl.load(context_lens + sequences, mask=is_real, other=0)
    past = gl.associative_scan((lens + TOKENS - 1) // TOKENS, 0, _add)
    sequence = gl.minimum(gl.sum((past <= tile).to(gl.int32), axis=0), num_sequences)
    is_sequence = sequences == sequence
    number = gl.sum(gl.where(is_sequence, past, 0), axis=0) - 1 - tile
    query_start = gl.sum(gl.where(is_sequence, starts, 0), axis=0)
    query_len = gl.sum(gl.where(is_sequence, lens, 0), axis=0)
    context_len = gl.sum(gl.where(is_sequence, contexts, 0), axis=0)
    blocks = (contexts + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_block = gl.sum(gl.where(sequences < sequence, blocks, 0), axis=0)
    return sequence, number, query_start, query_len, context_len, first_block


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    sources,
    rings,
    num_steps,
    context_len,
    first_key,
    first_value,
    STEP: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Keep both rings full: for each step STEP keys, then as many values."""
    keys, values = sources
    key_ring, value_ring, keys_full, keys_empty, values_full, values_empty = rings
    BYTES: gl.constexpr = STEP * key_ring.shape[2] * 2
    last_tile = (context_len - 1) // TILE
    for i in range(num_steps):
        stage = i % STAGES
        parity = (i // STAGES - 1) & 1
        if i >= STAGES:
            mbarrier.wait(keys_empty.index(stage), parity)
        mbarrier.expect(keys_full.index(stage), BYTES)
        _copy(keys, [first_key + i * STEP, 0], keys_full.index(stage), key_ring.index(stage))
        if i >= STAGES:
            mbarrier.wait(values_empty.index(stage), parity)
        mbarrier.expect(values_full.index(stage), BYTES)
        for part in gl.static_range(STEP // TILE):
            # Past the context's end its last tile comes again: the weights are zeros there, the values must be numbers.
            tile = gl.minimum(i * (STEP // TILE) + part, last_tile)
            room = value_ring.index(stage * (STEP // TILE) + part)
            _copy(values, [first_value + tile * TILE, 0], values_full.index(stage), room)


@gluon.jit
def _step(  # type: ignore[no-untyped-def]
    i,
    state,
    queries,
    rings,
    position,
    scale_log2,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Take a step of the context into the rows' softmax state (largest raw score, denominator, total)."""
    key_ring, value_ring, keys_full, keys_empty, values_full, values_empty = rings
    largest, denominator, total = state
    STEP: gl.constexpr = key_ring.shape[1]
    HALF: gl.constexpr = STEP // 2
    SCORES: gl.constexpr = queries.type.layout.parent
    OUT: gl.constexpr = total.type.layout
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    DTYPE: gl.constexpr = key_ring.dtype
    stage = i % STAGES
    parity = (i // STAGES) & 1
    nothing = gl.zeros([64, STEP], gl.float32, SCORES)
    mbarrier.wait(keys_full.index(stage), parity)
    scores = hopper.warpgroup_mma(queries, key_ring.index(stage).permute([1, 0]), nothing, use_acc=False, is_async=True)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(keys_empty.index(stage), count=1)
    if MASKED:
        token = i * STEP + gl.arange(0, STEP, gl.SliceLayout(0, SCORES))
        scores = gl.where(gl.expand_dims(token, 0) <= gl.expand_dims(position, 1), scores, float("-inf"))
    new_largest = gl.maximum(largest, gl.max(scores, axis=1))
    weights = _exp2(scores * scale_log2 - gl.expand_dims(new_largest * scale_log2, 1))
    rescale = _exp2((largest - new_largest) * scale_log2)
    denominator = denominator * rescale + gl.sum(weights, axis=1)
    total *= gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT)), 1)
    first, second = gl.split(weights.to(DTYPE).reshape([64, 2, HALF]).permute([0, 2, 1]))
    first = gl.convert_layout(first, WEIGHTS)
    second = gl.convert_layout(second, WEIGHTS)
    mbarrier.wait(values_full.index(stage), parity)
    total = hopper.warpgroup_mma(first, value_ring.index(2 * stage), total, is_async=True)
    total = hopper.warpgroup_mma(second, value_ring.index(2 * stage + 1), total, is_async=True)
    total = hopper.warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(values_empty.index(stage), count=1)
    return new_largest, denominator, total


@gluon.jit
def _places(  # type: ignore[no-untyped-def]
    group,
    first_row,
    num_tokens,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Return where the group's rows are among [tokens * HEADS, HEAD_DIM], and which of them there are."""
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    is_row = (row // GROUP_ROWS < num_tokens) & (row % GROUP_ROWS < GROUP)
    first = (first_row + row // GROUP_ROWS * HEADS + row % GROUP_ROWS).to(gl.int64) * HEAD_DIM
    elements = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    return gl.expand_dims(first, 1) + gl.expand_dims(elements, 0), gl.expand_dims(is_row, 1)


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    group,
    task,
    rings,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend for 64 rows of the tile: the work of one group of four warps."""
    query, out, first_row, num_tokens, first_position, num_full, num_steps, scale_log2 = task
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    places, is_row = _places(group, first_row, num_tokens, HEADS, GROUP, GROUP_ROWS, HEAD_DIM, ROWS)
    queries = gl.load(query + places, mask=is_row, other=0.0)
    queries = gl.convert_layout(queries, gl.DotOperandLayout(0, SCORES, 2))
    position = first_position + (group * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))) // GROUP_ROWS

    largest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    denominator = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64, HEAD_DIM], gl.float32, OUT)
    state = (largest, denominator, total)
    for i in range(num_full):
        state = _step(i, state, queries, rings, position, scale_log2, STAGES, False)
    for i in range(num_full, num_steps):
        state = _step(i, state, queries, rings, position, scale_log2, STAGES, True)
    largest, denominator, total = state
    _release_next_kernel()
    total /= gl.expand_dims(gl.convert_layout(denominator, gl.SliceLayout(1, OUT)), 1)
    places, is_row = _places(group, first_row, num_tokens, HEADS, GROUP, GROUP_ROWS, HEAD_DIM, OUT)
    gl.store(out + places, total.to(out.dtype.element_ty), mask=is_row)


@gluon.jit(do_not_specialize=["num_sequences", "num_blocks"])
def _hopper_prefill_kernel(  # type: ignore[no-untyped-def]
    keys,
    values,
    query,
    query_starts,
    context_lens,
    out,
    num_sequences,
    num_blocks,
    scale_log2,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr,
    ROWS: gl.constexpr,
    STEP: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    HEADS: gl.constexpr = KV_HEADS * GROUP
    TOKENS: gl.constexpr = ROWS // GROUP_ROWS
    key_ring = gl.allocate_shared_memory(keys.dtype, [STAGES, STEP, HEAD_DIM], keys.layout)
    value_ring = gl.allocate_shared_memory(keys.dtype, [STAGES * (STEP // TILE), TILE, HEAD_DIM], values.layout)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(values_empty.index(stage), count=2)
    hopper.fence_async_shared()
    if PDL:
        _wait_for_previous_kernel()
    kv_head = gl.program_id(0)
    sequence, number, query_start, query_len, context_len, first_block = _find_tile(
        query_starts, context_lens, num_sequences, gl.program_id(1), SEQUENCES, BLOCK_SIZE, TOKENS
    )
    is_tile = sequence < num_sequences
    first_token = number * TOKENS
    num_tokens = gl.where(is_tile, query_len - first_token, 0)
    first_position = context_len - query_len + first_token
    end = gl.minimum(first_position + TOKENS, context_len)
    # Programs past the last tile take no step: what they found of a sequence means nothing.
    num_steps = gl.where(is_tile, (end + STEP - 1) // STEP, 0)
    num_full = gl.where(is_tile, gl.minimum((first_position + 1) // STEP, num_steps), 0)
    first_key = (kv_head * num_blocks + first_block) * BLOCK_SIZE
    first_value = first_key + num_blocks * (KV_HEADS * BLOCK_SIZE)
    rings = (key_ring, value_ring, keys_full, keys_empty, values_full, values_empty)
    query_row = (query_start + first_token) * HEADS + kv_head * GROUP
    task = (query, out, query_row, num_tokens, first_position, num_full, num_steps, scale_log2)
    sources = (keys, values)
    # fmt: off
    gl.warp_specialize([
        (_attend, (0, task, rings, HEADS, GROUP, GROUP_ROWS, HEAD_DIM, STEP, STAGES)),
        (_attend, (1, task, rings, HEADS, GROUP, GROUP_ROWS, HEAD_DIM, STEP, STAGES)),
        (_fetch, (sources, rings, num_steps, context_len, first_key, first_value, STEP, TILE, STAGES)),
    ], [4, 1], [_ATTENDING_REGISTERS, _FETCHING_REGISTERS])
    # fmt: on


def can_attend_dense(device: torch.device, block_size: int, sliding_window: int | None) -> bool:
    """Say whether `attend_dense` takes such contexts."""
    return has_wgmma(device) and block_size % TILE_TOKENS == 0 and sliding_window is None


def attend_dense(
    query: torch.Tensor,
    contexts: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    num_tiles: int,
    group_rows: int,
    num_sequence_places: int,
    scale_log2: float,
) -> None:
    """Attend over `contexts`, as `attention_scratch.dequantize_contexts` returns them; else see `prefill_attention`.

    num_tiles bounds the tiles of TILE_ROWS rows, group_rows to a token; num_sequence_places is a power of two.
    """
    _, num_kv_heads, num_blocks, block_size, head_dim = contexts.shape
    num_heads = query.shape[1]
    places = contexts.view(-1, head_dim)
    launch(
        _hopper_prefill_kernel,
        (num_kv_heads, num_tiles),
        query.device,
        _describe(places, _STEP_TOKENS),
        _describe(places, TILE_TOKENS),
        query,
        query_starts,
        context_lens,
        out,
        context_lens.shape[0],
        num_blocks,
        scale_log2,
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        GROUP_ROWS=group_rows,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SEQUENCES=num_sequence_places,
        ROWS=TILE_ROWS,
        STEP=_STEP_TOKENS,
        TILE=TILE_TOKENS,
        STAGES=_NUM_STAGES,
        num_warps=4,
        maxnreg=_REGISTERS_AT_LAUNCH,
    )


def _describe(places: torch.Tensor, num_tokens: int) -> TensorDescriptor:
    """Return a descriptor of places [n, head_dim] that so many are copied of at once."""
    shape, strides = list(places.shape), list(places.stride())
    return TensorDescriptor(places, shape, strides, [num_tokens, places.shape[1]], _LAYOUT)
