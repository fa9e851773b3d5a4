"""Decoding: one token for each row attends to its paged, possibly quantized context, all in one launch.

A program takes one row, one key-value head with its group of query heads, and one part of the row's context
(Flash-Decoding, Dao et al. 2023). It rotates its queries, walks its tiles with an online softmax in fp32, and the
program that finishes a row last adds up the parts. The program of a row's last part also rotates, quantizes and appends
the new token, which enters attention as it is stored.

How a batch is cut follows from the context lengths on the device alone, so one captured graph serves all lengths: the
chunk is the sum of all contexts over the number of parts wanted, and each program finds its row by a running sum.

Scales stay outside the inner products. Of a key, code * scale + minimum, the product takes the code; scale and minimum
enter once per token and head. A value's scale goes into the softmax instead: with z = score + log2(scale), exp2(z -
max z) weighs the codes directly, stays within a float16's range whatever the scale is, and divided by the scale is the
token's share of the denominator.
"""

import math

import torch
import triton
import triton.language as tl

from .attention_codes import (
    KEY_BIAS_FIRST,
    KEY_BIAS_SECOND_4,
    VALUE_BIAS_4,
    VALUE_BIAS_8,
    exp2,
    key_operand,
    log2,
    multiply,
    natural_order,
    query_operand,
    reciprocal,
    value_column,
    value_operand,
)
from .attention_heads import load_rotated, rotated, store_rows, unpack_scales
from .attention_parts import find_part
from .attention_workspace import AttentionWorkspace
from .kv_cache import check_sizes, kv_words
from .launch import (
    has_programmatic_launch,
    is_interpreted,
    launch,
    release_next_kernel,
    wait_for_previous_kernel,
)

# Columns of the products, one a query head. Tokens and elements are the rows (swapped operands), so that a group's few
# heads fill the narrow side of mma.m16n8k16 and not its 16 rows.
_HEAD_COLUMNS = 8
# Parts whose loads are in flight together when a row is added up: one at a time cost 0.3 us a part.
_REDUCED_AT_ONCE = 8
# By the cache's bits: tokens a tile, tiles (one a warp) that a program takes at a time, and how many such times are in
# flight. Each warp has a tile to itself, so that nothing but the end of a part is exchanged between warps: with four
# warps on one tile of 64 tokens, 64 rows of 4096 tokens took 290 us on an H200 at 4 bits. Two warps with a tile each
# take 84 to 108 us, four take 109; 256 rows of 1024 tokens take 94 and 132 us.
_TILE_TOKENS = {4: 64, 8: 64, 16: 32}
_NUM_WARPS = {4: 2, 8: 2, 16: 2}
_NUM_STAGES = {4: 2, 8: 2, 16: 2}
# Before Hopper, tiles of half the size: larger ones spill registers.
_OLDER_TILE_TOKENS = {4: 32, 8: 32, 16: 16}
# The cache's word of a place that is not there: scale one, minimum zero.
_NEUTRAL_SCALES = tl.constexpr(0x3F80)


@triton.jit
def _append_own(  # type: ignore[no-untyped-def]
    data,
    scales,
    own,
    side_step,
    place,
    value_places,
    cosine,
    sine,
    k_norm,
    norm_eps,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Append the row's key and value, at own and own + side_step; return both as stored.

    That is the key's halves in fp32 [1, HEAD_DIM / 2], the value's codes [HEAD_DIM, 1] in the product's order, and the
    value's scale and minimum.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    sides = tl.arange(0, 2)[:, None]
    pointers = own + sides * side_step + tl.arange(0, HALF)[None, :]
    first = tl.load(pointers).to(tl.float32)
    second = tl.load(pointers + HALF).to(tl.float32)
    turned_first, turned_second = rotated(first, second, cosine, sine, k_norm, norm_eps, HALF, HAS_NORM)
    first = tl.where(sides == 0, turned_first, first)
    second = tl.where(sides == 0, turned_second, second)
    everywhere = tl.full((2, 1), True, tl.int1)
    first, second, scale, minimum = store_rows(
        data, scales, place + sides * value_places, everywhere, first, second, HEAD_DIM, BITS
    )
    key_scale, value_scale = tl.split(scale.reshape(2))
    key_minimum, value_minimum = tl.split(minimum.reshape(2))
    key_first, value_first = tl.split(first.T)
    key_second, value_second = tl.split(second.T)
    column = value_column(value_first[None, :], value_second[None, :], HEAD_DIM, BITS)
    key_first = key_first * key_scale + key_minimum
    key_second = key_second * key_scale + key_minimum
    return key_first[None, :], key_second[None, :], column, value_scale, value_minimum


@triton.jit(do_not_specialize=["num_rows", "num_splits", "num_blocks"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    qkv,
    cosines,
    sines,
    data,
    scales,
    block_tables,
    table_rows,
    context_lens,
    q_norm,
    k_norm,
    out,
    partial_outputs,
    partial_weights,
    counters,
    num_rows,
    num_splits,
    qkv_stride,
    table_stride,
    num_blocks,
    softmax_scale_log2,
    norm_eps,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    APPENDS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = HEAD_DIM if BITS == 16 else HEAD_DIM * BITS // 32  # elements of `data` in a row
    HEADS: tl.constexpr = KV_HEADS * GROUP
    OPERAND: tl.constexpr = data.dtype.element_ty if BITS == 16 else tl.float16
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    row, context_len, first, end, number, num_parts = find_part(
        context_lens, num_rows, num_splits, part, ROWS, TILES * TILE, WINDOW, APPENDS
    )
    if row >= num_rows:
        return
    table = block_tables + tl.load(table_rows + row).to(tl.int64) * table_stride
    value_places = num_blocks.to(tl.int64) * (KV_HEADS * BLOCK_SIZE)
    starts = first + tl.arange(0, TILES)[:, None] * TILE
    blocks = tl.load(table + starts // BLOCK_SIZE, mask=starts < end, other=0)

    wait_for_previous_kernel(PDL)
    # Early, unlike in other kernels: much of this one is waiting, in which the next one fetches its weights.
    release_next_kernel(PDL)
    heads = tl.arange(0, COLUMNS)
    elements = tl.arange(0, HALF)[None, :]
    qkv_row = qkv + row.to(tl.int64) * qkv_stride
    is_head = heads < GROUP
    query = qkv_row + (kv_head * GROUP + heads)[:, None] * HEAD_DIM + elements
    if APPENDS:
        cosine = tl.load(cosines + row * HALF + elements)
        sine = tl.load(sines + row * HALF + elements)
        query_first, query_second = load_rotated(
            query, is_head[:, None], cosine, sine, q_norm, norm_eps, HALF, HAS_NORM
        )
    else:
        query_first = tl.load(query, mask=is_head[:, None], other=0.0).to(tl.float32)
        query_second = tl.load(query + HALF, mask=is_head[:, None], other=0.0).to(tl.float32)
    query_first = (query_first * softmax_scale_log2).to(OPERAND)
    query_second = (query_second * softmax_scale_log2).to(OPERAND)
    first_sum = tl.sum(query_first.to(tl.float32), axis=1)
    second_sum = tl.sum(query_second.to(tl.float32), axis=1)
    query_sum = first_sum + second_sum
    operand = query_operand(query_first, query_second, HEAD_DIM, BITS).T
    operand = tl.broadcast_to(operand[None, :, :], (TILES, HEAD_DIM, COLUMNS))

    best = tl.full((TILES, COLUMNS), float("-inf"), tl.float32)  # largest z so far
    denominator = tl.zeros((TILES, COLUMNS), tl.float32)
    minimums = tl.zeros((TILES, COLUMNS), tl.float32)  # sum of weight * minimum
    weight_sum = tl.zeros((TILES, COLUMNS), tl.float32)  # sum of the weights as the product saw them, for the bias
    total = tl.zeros((TILES, HEAD_DIM, COLUMNS), tl.float32)
    if APPENDS:
        if (number == num_parts - 1) & (context_len > 0):
            position = context_len - 1
            own_block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
            place = (own_block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            own = qkv_row + (HEADS + kv_head) * HEAD_DIM
            key_first, key_second, column, value_scale, value_minimum = _append_own(
                data, scales, own, KV_HEADS * HEAD_DIM, place, value_places, cosine, sine, k_norm, norm_eps, HEAD_DIM,
                BITS, HAS_NORM,
            )  # fmt: skip
            products = query_first.to(tl.float32) * key_first + query_second.to(tl.float32) * key_second
            is_first_tile = (tl.arange(0, TILES) == 0)[:, None]
            z = tl.sum(products, axis=1) + tl.math.log2(value_scale)
            best = tl.where(is_first_tile, z[None, :], best)
            denominator = tl.where(is_first_tile, 1.0 / value_scale, denominator)
            minimums = denominator * value_minimum
            total = tl.where(is_first_tile[:, None, :], column[None, :, :], total)

    tiles = tl.arange(0, TILES)[:, None] * TILE
    tokens = tiles + tl.arange(0, TILE)[None, :]
    places = tl.arange(0, TILE)[None, :]
    words = places[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    if BITS == 4:
        bias = -KEY_BIAS_FIRST * first_sum - KEY_BIAS_SECOND_4 * second_sum
    elif BITS == 8:
        bias = -KEY_BIAS_FIRST * query_sum
    for start in tl.range(first, end, TILES * TILE):
        firsts = (blocks.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + (start + tiles) % BLOCK_SIZE
        following = start + TILES * TILE + tiles
        blocks = tl.load(table + following // BLOCK_SIZE, mask=following < end, other=0)
        is_seen = start + tokens < end
        if WINDOW > 0:
            is_seen &= start + tokens >= context_len - WINDOW
        key_data = (data + firsts * WIDTH)[:, :, None] + words
        value_data = (data + (firsts + value_places) * WIDTH)[:, :, None] + words
        if BITS == 16:
            keys = tl.load(key_data, mask=is_seen[:, :, None], other=0.0)
            values = tl.load(value_data, mask=is_seen[:, :, None], other=0.0)
            z = multiply(keys, operand, tl.zeros((TILES, TILE, COLUMNS), tl.float32), ASSEMBLY)
        else:
            key_words = tl.load(key_data)
            value_words = tl.load(value_data)
            key_scale, key_minimum = unpack_scales(
                tl.load(scales + firsts + places, mask=is_seen, other=_NEUTRAL_SCALES)
            )
            value_scale, value_minimum = unpack_scales(
                tl.load(scales + (firsts + value_places) + places, mask=is_seen, other=_NEUTRAL_SCALES)
            )
            keys = key_operand(key_words, HEAD_DIM, BITS, ASSEMBLY)
            start_scores = tl.zeros((TILES, TILE, COLUMNS), tl.float32) + bias[None, None, :]
            scores = multiply(keys, operand, start_scores, ASSEMBLY)
            shift = key_minimum[:, :, None] * query_sum[None, None, :] + log2(value_scale, ASSEMBLY)[:, :, None]
            z = scores * key_scale[:, :, None] + shift
        z = tl.where(is_seen[:, :, None], z, float("-inf"))
        largest = tl.maximum(best, tl.max(z, axis=1))
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        weights = exp2(z - finite[:, None, :], ASSEMBLY)
        rescale = exp2(best - finite, ASSEMBLY)
        best = largest
        rounded = weights.to(OPERAND)
        if BITS == 16:
            denominator = denominator * rescale + tl.sum(weights, axis=1)
            turned = total.permute(0, 2, 1) * rescale[:, :, None]
            total = multiply(rounded.permute(0, 2, 1), values, turned, ASSEMBLY).permute(0, 2, 1)
        else:
            shares = weights * reciprocal(value_scale, ASSEMBLY)[:, :, None]
            denominator = denominator * rescale + tl.sum(shares, axis=1)
            minimums = minimums * rescale + tl.sum(shares * value_minimum[:, :, None], axis=1)
            weight_sum = weight_sum * rescale + tl.sum(rounded.to(tl.float32), axis=1)
            values = value_operand(value_words, HEAD_DIM, BITS, ASSEMBLY)
            total = multiply(values, rounded, total * rescale[:, None, :], ASSEMBLY)

    if BITS != 16:
        total += (minimums - (VALUE_BIAS_4 if BITS == 4 else VALUE_BIAS_8) * weight_sum)[:, None, :]
    largest = tl.max(best, axis=0)
    tile_share = exp2(best - tl.where(largest == float("-inf"), 0.0, largest)[None, :], ASSEMBLY)
    best = largest
    denominator = tl.sum(denominator * tile_share, axis=0)
    total = natural_order(tl.sum(total * tile_share[:, None, :], axis=0), HEAD_DIM, BITS)
    total *= (1.0 / tl.where(context_len > 0, denominator, 1.0))[:, None]  # a padding row's total is zero
    head = kv_head * GROUP + heads
    cells = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    is_cell = is_head[:, None]
    target = out + row.to(tl.int64) * (HEADS * HEAD_DIM) + cells
    if num_parts == 1:
        tl.store(target, total.to(out.dtype.element_ty), mask=is_cell)
        return
    mine = part.to(tl.int64) * HEADS
    tl.store(partial_outputs + mine * HEAD_DIM + cells, total, mask=is_cell)
    tl.store(partial_weights + mine + head, best + tl.math.log2(denominator), mask=is_head)
    tl.debug_barrier()  # all threads' parts are written before the counter says so
    counter = counters + row * KV_HEADS + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") != num_parts - 1:
        return
    tl.store(counter, 0)
    tl.debug_barrier()
    row_parts = (part - number).to(tl.int64) * HEADS
    best = tl.full((COLUMNS,), float("-inf"), tl.float32)
    denominator = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS, HEAD_DIM), tl.float32)
    for start in tl.range(0, num_parts, PARTS, num_stages=1):
        for other in tl.static_range(PARTS):  # independent loads, all in flight together
            theirs = row_parts + (start + other) * HEADS
            is_there = is_head & (start + other + heads * 0 < num_parts)
            weight = tl.load(partial_weights + theirs + head, mask=is_there, other=float("-inf"), cache_modifier=".cg")
            output = tl.load(
                partial_outputs + theirs * HEAD_DIM + cells, mask=is_there[:, None], other=0.0, cache_modifier=".cg"
            )
            largest = tl.maximum(best, weight)
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            rescale = exp2(best - finite, ASSEMBLY)
            portion = exp2(weight - finite, ASSEMBLY)
            denominator = denominator * rescale + portion
            total = total * rescale[:, None] + output * portion[:, None]
            best = largest
    total *= (1.0 / tl.where(is_head, denominator, 1.0))[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_cell)


def decode_attention(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    kv_data: torch.Tensor,
    kv_scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
    *,
    bits: int,
    softmax_scale: float,
    num_heads: int,
    sliding_window: int | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    appends: bool = True,
) -> None:
    """Attend for one token of each row, appending its key and value first; out, 16-bit [R, num_heads * D], is written.

    qkv [R, (num_heads + 2 * num_kv_heads) * D] fp32 or 16-bit, before rotation; cosines and sines fp32 [R, D / 2] of
    each row's position; kv_data [2, num_blocks, num_kv_heads, block_size, width] and kv_scales [..., 2] or None as
    `KVCache.layer` gives them; block_tables int32 [num_table_rows, max_blocks]; table_rows int32 [R], which row of
    them is each row's; context_lens int32 [R], the row's own token included, 0 for a padding row, whose output is zero
    and which writes nothing. q_norm and k_norm [D]: RMS norm of each head before rotation.

    With appends=False qkv holds the queries alone, [R, num_heads * D], rotated and normalized already, all keys and
    values are in the cache, and cosines and sines are not read.

    block_tables, table_rows and context_lens are read while the kernel launched just before this one may still run, so
    that one must not write them. Raises ValueError for sizes the kernel does not have.
    """
    _, num_blocks, num_kv_heads, block_size, _ = kv_data.shape
    num_rows = qkv.shape[0]
    head_dim = out.shape[1] // num_heads
    check_sizes(num_heads, num_kv_heads, head_dim, block_size, bits)
    num_columns = (num_heads + 2 * num_kv_heads if appends else num_heads) * head_dim
    if qkv.shape[1] != num_columns or not (qkv.stride(1) == 1 and out.is_contiguous()):
        raise ValueError(f"decode_attention got qkv {tuple(qkv.shape)} for {num_heads} heads of {head_dim} elements")
    if num_rows > workspace.max_rows or workspace.num_heads != num_heads or workspace.head_dim != head_dim:
        raise ValueError(f"the workspace was allocated for {workspace.max_rows} rows of another shape; got {num_rows}")
    data, scales = kv_words(kv_data, kv_scales)
    tile_tokens = (_TILE_TOKENS if has_programmatic_launch(qkv.device) else _OLDER_TILE_TOKENS)[bits]
    launch(
        _decode_kernel,
        (num_kv_heads, num_rows + workspace.num_splits),
        qkv.device,
        qkv,
        cosines,
        sines,
        data,
        scales,
        block_tables,
        table_rows,
        context_lens,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        out,
        workspace.partial_outputs,
        workspace.partial_weights,
        workspace.counters,
        num_rows,
        workspace.num_splits,
        qkv.stride(0),
        block_tables.stride(0),
        num_blocks,
        softmax_scale * math.log2(math.e),
        norm_eps,
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BITS=bits,
        WINDOW=sliding_window or 0,
        ROWS=1 if num_rows == 1 else max(16, triton.next_power_of_2(num_rows)),
        TILE=min(tile_tokens, block_size),
        TILES=_NUM_WARPS[bits],
        COLUMNS=_HEAD_COLUMNS,
        PARTS=_REDUCED_AT_ONCE,
        APPENDS=appends,
        HAS_NORM=q_norm is not None,
        ASSEMBLY=not is_interpreted(),
        num_warps=_NUM_WARPS[bits],
        num_stages=_NUM_STAGES[bits],
    )
