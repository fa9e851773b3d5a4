"""Causal attention of prompt chunks over their paged, possibly quantized contexts, for sequences of any lengths.

FlashAttention-2 (Dao 2023): a program takes one key-value head and a tile of rows, a few tokens times the query heads
of the head's group, walks the context's tiles with an online softmax in fp32, and masks only the tiles that need it.
Programs find their sequence by a running sum over the query lengths, so a batch of unequal chunks wastes nothing.

A row's result has the same bits whatever rows, chunks or sequences share the launch: context tiles start at multiples
of the tile's width from position 0, a tile that a row does not see changes nothing (its weights are exact zeros, its
rescaling an exact one), and masked and unmasked tiles run the same operations. Where that is not asked for, Hopper has
a faster kernel for long contexts: prefill_hopper.py.
"""

import math

import torch
import triton
import triton.language as tl

from .attention_codes import multiply
from .attention_scratch import dense_start, dequantize_contexts, dequantized_tile, scratch_blocks
from .attention_workspace import AttentionWorkspace
from .kv_cache import check_sizes, kv_words
from .launch import (
    has_programmatic_launch,
    is_interpreted,
    launch,
    release_next_kernel,
    wait_for_previous_kernel,
)
from .prefill_hopper import TILE_ROWS, attend_dense, can_attend_dense

_NUM_WARPS = 8
# Context tokens a tile, and tiles in flight; before Hopper larger ones spill registers.
_HOPPER_TILE = {"TILE": 64, "num_stages": 3}
_TILE = {"TILE": 32, "num_stages": 3}
# Rows of the longest chunk, tokens times heads of a group, from which dequantizing beforehand pays: four tiles.
_LEAST_ROWS_FOR_SCRATCH = 512
# Tokens of the longest context from which Hopper's kernel is faster, dequantizing included: 16 prompts of 512 tokens of
# InternLM2.5-7B take 225 us there and 200 us here, 8 of 1024 232 and 255, 64 of 128 156 and 130.
_LEAST_CONTEXT_FOR_HOPPER = 1024


@triton.jit
def _find_tile(query_starts, context_lens, num_sequences, tile, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the tile's sequence, its number there counted from the end, the query's start and length.

    A tile past the last one has sequence num_sequences.
    """
    sequences = tl.arange(0, SEQUENCES)
    is_real = sequences < num_sequences
    starts = tl.load(query_starts + sequences, mask=is_real, other=0)
    lens = tl.load(query_starts + 1 + sequences, mask=is_real, other=0) - starts
    tiles = tl.cdiv(lens, TOKENS)
    past = tl.cumsum(tiles, axis=0)
    sequence = tl.minimum(tl.sum((past <= tile).to(tl.int32), axis=0), num_sequences)
    is_sequence = sequences == sequence
    number = tl.sum(tl.where(is_sequence, past, 0), axis=0) - 1 - tile
    start = tl.sum(tl.where(is_sequence, starts, 0), axis=0)
    return sequence, number, start, tl.sum(tl.where(is_sequence, lens, 0), axis=0)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    data,
    scales,
    first_place,
    offsets,
    is_inside,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Load a tile of keys or values [tokens, HEAD_DIM] as OPERAND; tokens that are not inside are zeros.

    The tile's places are first_place (int64, one or one a token) + offsets (int32, the same for every tile).
    """
    if BITS != 16:
        return dequantized_tile(data, scales, first_place + offsets, is_inside, HEAD_DIM, BITS, OPERAND)
    else:
        elements = offsets[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        first = data + first_place * HEAD_DIM
        pointers = first[:, None] + elements if len(first_place.shape) == 1 else first + elements
        if MASKED:
            return tl.load(pointers, mask=is_inside[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def _block_of(  # type: ignore[no-untyped-def]
    table, dense, start, context_len, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, DENSE: tl.constexpr
):
    """Return the block of the tile that starts at `start`, or the block of each of its tokens if it spans several."""
    if TILE > BLOCK_SIZE:
        token = start + tl.arange(0, TILE)
        if DENSE:
            return dense + token // BLOCK_SIZE
        else:
            return tl.load(table + token // BLOCK_SIZE, mask=token < context_len, other=0)
    else:
        if DENSE:
            return dense + start // BLOCK_SIZE
        else:
            return tl.load(table + start // BLOCK_SIZE, mask=start < context_len, other=0)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    largest,
    denominator,
    total,
    data,
    scales,
    block,
    kv_head,
    value_places,
    start,
    position,
    context_len,
    scale_log2,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Take one tile of the context into the rows' softmax state (largest raw score, denominator, total)."""
    ROWS: tl.constexpr = query.shape[0]
    token = start + tl.arange(0, TILE)
    is_inside = token < context_len
    first_place = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
    offsets = tl.arange(0, TILE)
    if TILE > BLOCK_SIZE:
        offsets %= BLOCK_SIZE
    elif TILE < BLOCK_SIZE:
        first_place += start & (BLOCK_SIZE - 1)
    keys = _load_tile(data, scales, first_place, offsets, is_inside, HEAD_DIM, BITS, MASKED, query.dtype)
    scores = multiply(query, keys.T, tl.zeros((ROWS, TILE), tl.float32), COMPILED)
    if MASKED:
        is_seen = token[None, :] <= position[:, None]
        if WINDOW > 0:
            is_seen &= token[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    shift = tl.broadcast_to((-finite * scale_log2)[:, None], (ROWS, TILE))
    weights = tl.math.exp2(tl.math.fma(scores, tl.full((ROWS, TILE), 0.0, tl.float32) + scale_log2, shift))
    rescale = tl.math.exp2((largest - finite) * scale_log2)  # exactly one where the maximum stays
    denominator = tl.math.fma(denominator, rescale, tl.sum(weights, axis=1))
    first_place += value_places
    values = _load_tile(data, scales, first_place, offsets, is_inside, HEAD_DIM, BITS, MASKED, query.dtype)
    total = multiply(weights.to(query.dtype), values, total * rescale[:, None], COMPILED)
    return new_largest, denominator, total


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    query,
    data,
    scales,
    block_tables,
    table_rows,
    query_starts,
    context_lens,
    out,
    num_sequences,
    num_blocks,
    table_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DENSE: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP_ROWS
    HEADS: tl.constexpr = KV_HEADS * GROUP
    kv_head = tl.program_id(0)
    wait_for_previous_kernel(PDL)
    sequence, number, query_start, query_len = _find_tile(
        query_starts, context_lens, num_sequences, tl.program_id(1), SEQUENCES, TOKENS
    )
    if sequence >= num_sequences:
        return
    context_len = tl.load(context_lens + sequence)
    table = block_tables + tl.load(table_rows + sequence).to(tl.int64) * table_stride
    CACHE_HEADS: tl.constexpr = 1 if DENSE else KV_HEADS
    cache_head = 0 if DENSE else kv_head
    dense = 0
    if DENSE:  # like a cache of one head: each head's contexts begin num_blocks after those of the one before
        dense = kv_head * num_blocks + dense_start(context_lens, num_sequences, sequence, SEQUENCES, BLOCK_SIZE)
    value_places = num_blocks.to(tl.int64) * (KV_HEADS * BLOCK_SIZE)

    rows = tl.arange(0, ROWS)
    token = number * TOKENS + rows // GROUP_ROWS
    head = rows % GROUP_ROWS
    is_row = (token < query_len) & (head < GROUP)
    position = context_len - query_len + token
    cells = ((query_start + token).to(tl.int64) * HEADS + kv_head * GROUP + head) * HEAD_DIM
    cells = cells[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    queries = tl.load(query + cells, mask=is_row[:, None], other=0.0)

    first_position = context_len - query_len + number * TOKENS
    end = tl.minimum(first_position + TOKENS, context_len)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    first = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE if WINDOW > 0 else 0
    block = _block_of(table, dense, first, context_len, BLOCK_SIZE, TILE, DENSE)
    masked_start = first
    if WINDOW == 0:
        masked_start = (first_position + 1) // TILE * TILE
        for start in tl.range(0, masked_start, TILE):
            following = _block_of(table, dense, start + TILE, context_len, BLOCK_SIZE, TILE, DENSE)
            largest, denominator, total = _attend(
                queries, largest, denominator, total, data, scales, block, cache_head, value_places, start, position,
                context_len, scale_log2, CACHE_HEADS, HEAD_DIM, BLOCK_SIZE, BITS, WINDOW, TILE, False, COMPILED,
            )  # fmt: skip
            block = following
    for start in tl.range(masked_start, end, TILE):
        following = _block_of(table, dense, start + TILE, context_len, BLOCK_SIZE, TILE, DENSE)
        largest, denominator, total = _attend(
            queries, largest, denominator, total, data, scales, block, cache_head, value_places, start, position,
            context_len, scale_log2, CACHE_HEADS, HEAD_DIM, BLOCK_SIZE, BITS, WINDOW, TILE, True, COMPILED,
        )  # fmt: skip
        block = following
    release_next_kernel(PDL)
    total /= tl.where(denominator == 0.0, 1.0, denominator)[:, None]  # only rows past the end saw nothing
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=is_row[:, None])


def prefill_attention(
    query: torch.Tensor,
    kv_data: torch.Tensor,
    kv_scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
    *,
    max_query_len: int,
    max_context_len: int,
    bits: int,
    softmax_scale: float,
    sliding_window: int | None = None,
    max_total_context_len: int | None = None,
    deterministic: bool = True,
) -> None:
    """Attend for the last tokens of each sequence, whose keys and values are in the cache; out [T, H * D] is written.

    query 16-bit [T, H, D], rotated; kv_data [2, num_blocks, num_kv_heads, block_size, width] and kv_scales [..., 2] or
    None as `KVCache.layer` gives them; block_tables int32 [num_table_rows, max_blocks]; table_rows int32 [S];
    query_starts int32 [S + 1], where each sequence's queries begin, and T; context_lens int32 [S], its queries
    included; out 16-bit. max_query_len and max_context_len bound what the device's tensors say, and
    max_total_context_len the sum of the contexts (default: all as long as the longest). Unless deterministic, a row's
    last bits may depend on what it shares the launch with. Raises ValueError for sizes the kernel does not have.

    Contexts that are quantized are dequantized into the workspace's scratch first, when the chunks are long enough to
    read them several times and they fit.
    """
    _, num_blocks, num_kv_heads, block_size, _ = kv_data.shape
    num_tokens, num_heads, head_dim = query.shape
    num_sequences = context_lens.shape[0]
    check_sizes(num_heads, num_kv_heads, head_dim, block_size, bits)
    if out.shape != (num_tokens, num_heads * head_dim) or not (query.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"prefill_attention got query {tuple(query.shape)} and out {tuple(out.shape)}")
    if num_tokens == 0:
        return
    group = num_heads // num_kv_heads
    data, scales = kv_words(kv_data, kv_scales)
    num_scratch_blocks = 0
    if kv_scales is not None and max_query_len * group >= _LEAST_ROWS_FOR_SCRATCH:
        all_contexts = num_sequences * max_context_len
        total_len = all_contexts if max_total_context_len is None else min(all_contexts, max_total_context_len)
        num_context_blocks = total_len // block_size + num_sequences
        num_scratch_blocks = scratch_blocks(num_context_blocks, kv_data, head_dim, workspace)
    group_rows = triton.next_power_of_2(group)
    num_tiles = triton.cdiv(num_tokens, TILE_ROWS // group_rows) + num_sequences
    num_sequence_places = max(16, triton.next_power_of_2(num_sequences))
    scale_log2 = softmax_scale * math.log2(math.e)
    if kv_scales is not None and num_scratch_blocks > 0:
        data = scales = dequantize_contexts(
            kv_data, kv_scales, block_tables, table_rows, context_lens, workspace, num_blocks=num_scratch_blocks,
            bits=bits, head_dim=head_dim, dtype=query.dtype,
        )  # fmt: skip
        bits, num_blocks = 16, num_scratch_blocks
        is_long = max_context_len >= _LEAST_CONTEXT_FOR_HOPPER
        if is_long and not deterministic and can_attend_dense(query.device, block_size, sliding_window):
            attend_dense(
                query, data, query_starts, context_lens, out, num_tiles=num_tiles, group_rows=group_rows,
                num_sequence_places=num_sequence_places, scale_log2=scale_log2,
            )  # fmt: skip
            return
    launch(
        _prefill_kernel,
        (num_kv_heads, num_tiles),
        query.device,
        query,
        data,
        scales,
        block_tables,
        table_rows,
        query_starts,
        context_lens,
        out,
        num_sequences,
        num_blocks,
        block_tables.stride(0),
        scale_log2,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_ROWS=group_rows,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BITS=bits,
        WINDOW=sliding_window or 0,
        SEQUENCES=num_sequence_places,
        ROWS=TILE_ROWS,
        DENSE=num_scratch_blocks > 0,
        COMPILED=not is_interpreted(),
        num_warps=_NUM_WARPS,
        **(_HOPPER_TILE if has_programmatic_launch(query.device) else _TILE),
    )
