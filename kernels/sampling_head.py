"""What top_k and top_p keep of a row whose heaviest tokens are few: most rows of a language model.

The best logit of every 128 tokens is known from the search for the row's best. The tiles with the largest of these hold
all of the row's heaviest tokens: those at least as heavy as the lightest of the tiles' best ones. When these are enough
for top_k, or weigh enough for top_p, the threshold is among them, and the rest of the row need not be read.
"""

import torch
import triton
import triton.language as tl

from .launch import launch_options, release_next_kernel, wait_for_previous_kernel
from .sampling_weights import (
    BLOCK,
    KEY_ABOVE_ONE,
    MOST_PARTS,
    NUM_STAGES,
    PEAK_TILE,
    SMALLEST_TEMPERATURE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SamplingScratch,
    append_weights,
    as_weight,
    bisect,
    is_finite,
    is_limited,
    parameter,
    part_size,
    weights_of,
)

_ENOUGH_TILES = 128  # hold at least as many heavy tokens: more than a usual top_k
_TILES_AT_ONCE = 16
_HEAD_SIZE = 2048  # tokens that are looked at; usually little more than tiles
_NUM_WARPS = 8


@triton.jit
def _heaviest_tiles(  # type: ignore[no-untyped-def]
    tile_peaks,
    head_tiles,
    num_tiles,
    peak,
    temperature,
    TILES: tl.constexpr,
    FEWEST_TILES: tl.constexpr,
    MOST_TILES: tl.constexpr,
):
    """List the tiles whose best weight is at least some bit pattern; return it and how many they are.

    More than MOST_TILES are returned, and none listed, where too many tiles have the same best weight.
    """
    tiles = tl.arange(0, TILES)
    values = tl.load(tile_peaks + tiles, mask=tiles < num_tiles, other=float("-inf"))
    weights = tl.where(tiles < num_tiles, weights_of(values, peak, temperature), -1.0)
    low, high = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + KEY_ABOVE_ONE
    count = tl.zeros((), tl.int32) + num_tiles
    while (count > MOST_TILES) & (high - low > 1):
        middle = (low + high) // 2
        count_over = tl.sum((weights >= as_weight(middle)).to(tl.int32), axis=0)
        is_enough = count_over >= FEWEST_TILES
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        count = tl.where(is_enough, count_over, count)
    if count <= MOST_TILES:
        is_heavy = weights >= as_weight(low)
        tl.store(head_tiles + tl.cumsum(is_heavy.to(tl.int32), axis=0) - 1, tiles, mask=is_heavy)
    tl.debug_barrier()
    return low, count


@triton.jit
def _list_head(  # type: ignore[no-untyped-def]
    row_logits,
    vocab_size,
    peak,
    temperature,
    low,
    head_tiles,
    num_tiles,
    weights_out,
    PEAK_TILE: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Write the listed tiles' weights of at least `low` to weights_out, at most HEAD_SIZE; return how many they are."""
    length = tl.zeros((), tl.int32)
    for start in tl.range(0, num_tiles, TILES_AT_ONCE, num_stages=NUM_STAGES):
        places = start + tl.arange(0, TILES_AT_ONCE)
        tiles = tl.load(head_tiles + places, mask=places < num_tiles, other=0, cache_modifier=".cg")
        ids = tiles[:, None] * PEAK_TILE + tl.arange(0, PEAK_TILE)[None, :]
        is_token = (places < num_tiles)[:, None] & (ids < vocab_size)
        values = tl.load(row_logits + ids, mask=is_token, other=float("-inf"))
        weights = tl.where(is_token, weights_of(values, peak, temperature), -1.0)
        weights = tl.reshape(weights, (TILES_AT_ONCE * PEAK_TILE,))
        length = append_weights(weights, weights >= as_weight(low), weights_out, length, HEAD_SIZE)
    tl.debug_barrier()
    return length


@triton.jit
def _head_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_slots,
    parameters,
    peaks,
    part_peaks,
    part_masses,
    tile_peaks,
    head_tiles,
    lists,
    thresholds,
    is_open,
    logits_stride,
    vocab_size,
    num_parts,
    num_tiles,
    list_size,
    MOST_PARTS: tl.constexpr,
    PEAK_TILE: tl.constexpr,
    TILES: tl.constexpr,
    FEWEST_TILES: tl.constexpr,
    MOST_TILES: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous_kernel(PDL)
    slot = tl.load(row_slots + row).to(tl.int64)
    peak = tl.load(peaks + row)
    stays_open = tl.zeros((), tl.int32)
    if is_limited(parameters, slot) & is_finite(peak):
        temperature = tl.maximum(parameter(parameters, slot, TEMPERATURE).to(tl.float32), SMALLEST_TEMPERATURE)
        top_p, top_k = parameter(parameters, slot, TOP_P), parameter(parameters, slot, TOP_K)
        row_tiles, row_list = head_tiles + row * num_tiles, lists + row * list_size
        low, count = _heaviest_tiles(
            tile_peaks + row * num_tiles, row_tiles, num_tiles, peak, temperature, TILES, FEWEST_TILES, MOST_TILES
        )
        length = tl.zeros((), tl.int32) + HEAD_SIZE + 1
        if count <= MOST_TILES:
            length = _list_head(
                logits + row * logits_stride, vocab_size, peak, temperature, low, row_tiles, count, row_list,
                PEAK_TILE, TILES_AT_ONCE, HEAD_SIZE,
            )  # fmt: skip
        stays_open = (length > HEAD_SIZE).to(tl.int32)
        places = tl.arange(0, HEAD_SIZE)
        num_listed = tl.where(stays_open == 0, length, 0)
        weights = tl.load(row_list + places, mask=places < num_listed, other=-1.0, cache_modifier=".cg")
        high, nothing = tl.zeros((), tl.int64) + KEY_ABOVE_ONE, tl.zeros((), tl.float64)
        key = low
        if (top_k > 0.0) & (top_k < vocab_size):
            stays_open |= (top_k > length).to(tl.int32)
            if stays_open == 0:
                key = bisect(weights, low, high, nothing, top_k, True)
            kept = tl.sum(tl.where(weights >= as_weight(key), weights, 0.0).to(tl.float64), axis=0)
        else:
            parts = tl.arange(0, MOST_PARTS)
            is_part = parts < num_parts
            part_peak = tl.load(part_peaks + row * MOST_PARTS + parts, mask=is_part, other=float("-inf"))
            mass = tl.load(part_masses + row * MOST_PARTS + parts, mask=is_part, other=0.0)
            kept = tl.sum((mass * weights_of(part_peak, peak, temperature)).to(tl.float64), axis=0)
        if top_p < 1.0:
            wanted = tl.maximum(top_p * kept, 1e-300)  # a top_p of 0 keeps the best
            listed = tl.sum(tl.maximum(weights, 0.0).to(tl.float64), axis=0)
            stays_open |= (listed < wanted).to(tl.int32)
            if stays_open == 0:
                key = bisect(weights, key, high, nothing, wanted, False)
        elif top_k >= vocab_size:
            key = tl.zeros((), tl.int64)
            stays_open = tl.zeros((), tl.int32)
        if stays_open == 0:
            tl.store(thresholds + row, tl.maximum(tl.load(thresholds + row), as_weight(key)))
    tl.store(is_open + row, stays_open)
    release_next_kernel(PDL)


def limit_by_head(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    parameters: torch.Tensor,
    scratch: SamplingScratch,
    *,
    deterministic: bool,
) -> None:
    """Raise rows' thresholds to what top_k and top_p ask for, and say in scratch.is_open which rows are still to do.

    After `find_best` (sampling.py), with the same arguments.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, PEAK_TILE)
    fewest_tiles = min(_ENOUGH_TILES, triton.cdiv(num_tiles, 4))  # a quarter of a small vocabulary
    size = part_size(num_rows, vocab_size, BLOCK, deterministic=deterministic)  # as `find_best` divides a row
    _head_kernel[(num_rows,)](
        logits,
        row_slots,
        parameters,
        scratch.peaks,
        scratch.part_peaks,
        scratch.part_masses,
        scratch.tile_peaks,
        scratch.head_tiles,
        scratch.lists,
        scratch.thresholds,
        scratch.is_open,
        logits.stride(0),
        vocab_size,
        triton.cdiv(vocab_size, size),
        num_tiles,
        scratch.lists.shape[1],
        MOST_PARTS=MOST_PARTS,
        PEAK_TILE=PEAK_TILE,
        TILES=triton.next_power_of_2(num_tiles),
        FEWEST_TILES=fewest_tiles,
        MOST_TILES=2 * fewest_tiles,
        TILES_AT_ONCE=_TILES_AT_ONCE,
        HEAD_SIZE=_HEAD_SIZE,
        num_warps=_NUM_WARPS,
        **launch_options(logits.device),
    )
