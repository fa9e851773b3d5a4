"""From rows of logits to one token a row, on the device: the best one, or a draw.

`engine/sampler.py` says what is computed. A row is shared by several programs, of which the last to arrive puts the
results together. Weights are fp32, exp((logit - best) / temperature), so that the best is exactly 1; they are summed in
fp64 and drawn in the order of ids: the token is the first whose cumulative weight exceeds u * total, u being the same
hash of seed and output position as on the host. What top_k and top_p keep is `sampling_thresholds.py`'s business.
"""

import torch
import triton
import triton.language as tl

from .launch import launch_options, release_next_kernel, wait_for_previous_kernel
from .sampling_weights import (
    BLOCK,
    MIN_P,
    MOST_PARTS,
    NUM_PARAMETERS,
    NUM_STAGES,
    PEAK_TILE,
    SEED_HASH,
    SMALLEST_TEMPERATURE,
    TEMPERATURE,
    SamplingScratch,
    is_finite,
    is_limited,
    parameter,
    part_size,
    weights_of,
)

_DRAW_TILES = 4  # of BLOCK tokens, that a program sums at once


def find_best(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    parameters: torch.Tensor,
    samples: torch.Tensor,
    scratch: SamplingScratch,
    *,
    deterministic: bool = False,
) -> None:
    """Write each row's best token, the first of equals, to samples[0], and to samples[1] whether its logit is finite.

    logits fp32 [R, vocab_size], columns adjacent; row_slots int32 [R]; parameters fp64 [num_slots, NUM_PARAMETERS],
    contiguous; samples int32 [2, R], contiguous. A row that holds NaN or positive infinity is not valid.
    deterministic: what top_p keeps of a row does not depend on the other rows, even in the last bit. Raises ValueError
    when shapes do not fit.
    """
    num_rows, vocab_size = logits.shape
    if row_slots.shape != (num_rows,) or samples.shape != (2, num_rows) or logits.stride(1) != 1:
        raise ValueError(
            f"find_best got logits {tuple(logits.shape)}, {tuple(row_slots.shape)} slots and samples "
            f"{tuple(samples.shape)}; samples has to be {(2, num_rows)}, with one slot a row and adjacent logits"
        )
    if num_rows > scratch.max_rows or vocab_size != scratch.vocab_size:
        raise ValueError(
            f"find_best got {num_rows} rows of {vocab_size} logits; its scratch memory is for {scratch.max_rows} rows "
            f"of {scratch.vocab_size}"
        )
    size = part_size(num_rows, vocab_size, BLOCK, deterministic=deterministic)
    _peaks_kernel[(num_rows, triton.cdiv(vocab_size, size))](
        logits,
        row_slots,
        parameters,
        samples,
        scratch.arrivals[0],
        scratch.part_peaks,
        scratch.part_ids,
        scratch.part_masses,
        scratch.tile_peaks,
        scratch.peaks,
        scratch.thresholds,
        logits.stride(0),
        num_rows,
        vocab_size,
        size,
        scratch.tile_peaks.shape[1],
        MOST_PARTS=MOST_PARTS,
        PEAK_TILE=PEAK_TILE,
        BLOCK=BLOCK,
        num_warps=4,
        **launch_options(logits.device),
    )


def draw_tokens(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    output_positions: torch.Tensor,
    parameters: torch.Tensor,
    samples: torch.Tensor,
    scratch: SamplingScratch,
) -> None:
    """Replace the best token by a drawn one in rows whose slot has a temperature and that are valid.

    After `find_best` with the same arguments; output_positions int32 [R] says which token of its output each row gives.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, BLOCK)
    tiles_per_part = part_size(num_rows, vocab_size, _DRAW_TILES * BLOCK) // BLOCK
    _draw_kernel[(num_rows, triton.cdiv(num_tiles, tiles_per_part))](
        logits,
        row_slots,
        output_positions,
        parameters,
        parameters.view(torch.int64),
        samples,
        scratch.arrivals[1],
        scratch.peaks,
        scratch.thresholds,
        scratch.tile_masses,
        logits.stride(0),
        vocab_size,
        num_tiles,
        tiles_per_part,
        TILES=triton.next_power_of_2(num_tiles),
        DRAW_TILES=_DRAW_TILES,
        BLOCK=BLOCK,
        num_warps=4,
        **launch_options(logits.device),
    )


@triton.jit
def _uniform(seed_hash, position):  # type: ignore[no-untyped-def]
    """Return a number in [0, 1), fp64: the second round of SplitMix64 (Steele et al., 2014), seed_hash is the first."""
    mixed = (seed_hash + position.to(tl.int64)).to(tl.uint64) + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    mixed = mixed ^ (mixed >> 31)
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def _is_last_arrival(arrivals, num_parts):  # type: ignore[no-untyped-def]
    """Say whether all other programs of the row have stored their part; the counter is 0 again after the last."""
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals, 1) == num_parts - 1
    if is_last:
        tl.store(arrivals, 0)
    return is_last


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    row_logits,
    first,
    part_size,
    vocab_size,
    temperature,
    tile_peaks,
    LIMITED: tl.constexpr,
    PEAK_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the best logit of a part, its first id, and, of rows that need it, the part's weight relative to its best.

    The best of each tile goes to tile_peaks. Every lane keeps its own best, and its sum relative to that.
    """
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_ids = first + lanes
    base = tl.full((BLOCK,), -1.0e38, tl.float32)  # as `best`, but finite
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(first, first + part_size, BLOCK, num_stages=NUM_STAGES):
        ids = start + lanes
        values = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf"))
        values = tl.where(values == values, values, float("inf"))  # NaN makes the row as invalid as infinity does
        is_better = values > best
        best = tl.where(is_better, values, best)
        best_ids = tl.where(is_better, ids, best_ids)
        if LIMITED:
            higher = tl.maximum(base, tl.minimum(values, 1.0e38))
            masses = masses * weights_of(base, higher, temperature) + weights_of(values, higher, temperature)
            base = higher
            tiles = start // PEAK_TILE + tl.arange(0, BLOCK // PEAK_TILE)
            peaks_of_tiles = tl.max(tl.reshape(values, (BLOCK // PEAK_TILE, PEAK_TILE)), axis=1)
            tl.store(tile_peaks + tiles, peaks_of_tiles, mask=tiles * PEAK_TILE < vocab_size)
    peak = tl.max(best, axis=0)
    peak_id = tl.min(tl.where(best == peak, best_ids, vocab_size), axis=0)
    return peak, peak_id, tl.sum(masses * weights_of(base, tl.max(base, axis=0), temperature), axis=0)


@triton.jit
def _peaks_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_slots,
    parameters,
    samples,
    arrivals,
    part_peaks,
    part_ids,
    part_masses,
    tile_peaks,
    peaks,
    thresholds,
    logits_stride,
    num_rows,
    vocab_size,
    part_size,
    num_peak_tiles,
    MOST_PARTS: tl.constexpr,
    PEAK_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row_logits, row_tiles = logits + row * logits_stride, tile_peaks + row * num_peak_tiles
    place = row * MOST_PARTS + part
    wait_for_previous_kernel(PDL)
    slot = tl.load(row_slots + row).to(tl.int64)
    temperature = tl.maximum(parameter(parameters, slot, TEMPERATURE).to(tl.float32), SMALLEST_TEMPERATURE)
    first = part * part_size
    if is_limited(parameters, slot):
        peak, peak_id, mass = _scan(
            row_logits, first, part_size, vocab_size, temperature, row_tiles, True, PEAK_TILE, BLOCK
        )
        tl.store(part_masses + place, mass)
    else:
        peak, peak_id, mass = _scan(
            row_logits, first, part_size, vocab_size, temperature, row_tiles, False, PEAK_TILE, BLOCK
        )
    tl.store(part_peaks + place, peak)
    tl.store(part_ids + place, peak_id)
    release_next_kernel(PDL)
    if _is_last_arrival(arrivals + row, num_parts):
        parts = tl.arange(0, MOST_PARTS)
        places = row * MOST_PARTS + parts
        is_part = parts < num_parts
        all_peaks = tl.load(part_peaks + places, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        all_ids = tl.load(part_ids + places, mask=is_part, other=vocab_size, cache_modifier=".cg")
        row_peak = tl.max(all_peaks, axis=0)
        token_id = tl.min(tl.where(all_peaks == row_peak, all_ids, vocab_size), axis=0)
        tl.store(samples + row, token_id)
        tl.store(samples + num_rows + row, is_finite(row_peak).to(tl.int32))
        tl.store(peaks + row, row_peak)
        tl.store(thresholds + row, parameter(parameters, slot, MIN_P).to(tl.float32))


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    row_logits,
    vocab_size,
    peak,
    temperature,
    threshold,
    u,
    tile_masses,
    num_tiles,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the smallest id whose cumulative kept weight exceeds u times the total."""
    tiles = tl.arange(0, TILES)
    masses = tl.load(tile_masses + tiles, mask=tiles < num_tiles, other=0.0, cache_modifier=".cg")
    reached = tl.cumsum(masses, axis=0)
    target = u * tl.sum(masses, axis=0)
    last_tile = tl.max(tl.where(masses > 0.0, tiles, 0), axis=0)
    tile = tl.minimum(tl.sum((reached <= target).to(tl.int32), axis=0), last_tile)
    before = tl.sum(tl.where(tiles < tile, masses, 0.0), axis=0)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf"))
    weights = weights_of(values, peak, temperature)
    weights = tl.where((weights >= threshold) & (ids < vocab_size), weights, 0.0)
    is_past = (before + tl.cumsum(weights.to(tl.float64), axis=0) > target) & (weights > 0.0)
    first_past = tl.min(tl.where(is_past, ids, vocab_size), axis=0)
    last_kept = tl.max(tl.where(weights > 0.0, ids, 0), axis=0)  # when rounding leaves none past the target
    return tl.minimum(first_past, last_kept)


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_slots,
    output_positions,
    parameters,
    seed_hashes,
    samples,
    arrivals,
    peaks,
    thresholds,
    tile_masses,
    logits_stride,
    vocab_size,
    num_tiles,
    tiles_per_part,
    TILES: tl.constexpr,
    DRAW_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_previous_kernel(PDL)
    slot = tl.load(row_slots + row).to(tl.int64)
    temperature = parameter(parameters, slot, TEMPERATURE).to(tl.float32)
    peak = tl.load(peaks + row)
    if (temperature > 0.0) & is_finite(peak):
        temperature = tl.maximum(temperature, SMALLEST_TEMPERATURE)
        threshold = tl.load(thresholds + row)
        row_logits = logits + row * logits_stride
        for step in tl.range(0, tiles_per_part, DRAW_TILES, num_stages=NUM_STAGES):
            tiles = part * tiles_per_part + step + tl.arange(0, DRAW_TILES)
            ids = tiles[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            values = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf"))
            weights = weights_of(values, peak, temperature)
            kept = tl.where((weights >= threshold) & (ids < vocab_size), weights, 0.0).to(tl.float64)
            tl.store(tile_masses + row * num_tiles + tiles, tl.sum(kept, axis=1), mask=tiles < num_tiles)
        release_next_kernel(PDL)
        if _is_last_arrival(arrivals + row, tl.num_programs(1)):
            seed_hash = tl.load(seed_hashes + slot * NUM_PARAMETERS + SEED_HASH)
            u = _uniform(seed_hash, tl.load(output_positions + row))
            token_id = _pick(
                row_logits, vocab_size, peak, temperature, threshold, u, tile_masses + row * num_tiles, num_tiles,
                TILES, BLOCK,
            )  # fmt: skip
            tl.store(samples + row, token_id)
