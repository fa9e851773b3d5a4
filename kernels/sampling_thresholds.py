"""The smallest weight that top_k and top_p keep in each row, without sorting.

Nearly always a row's few heaviest tokens tell it (`sampling_head.py`). Where they do not, the programs of a row first
measure how many tokens, and how much weight, lie above a few fixed weights. Then one program a row finds the threshold:
the weights between the two edges around it are listed, and it is bisected on its bit pattern, which orders positive
floats as integers. Where too many lie between two edges, the row is measured again with closer ones first.
"""

import torch
import triton
import triton.language as tl

from .launch import launch_options, release_next_kernel, wait_for_previous_kernel
from .sampling_head import limit_by_head
from .sampling_weights import (
    KEY_ABOVE_ONE,
    LIST_SIZE,
    MOST_PARTS,
    NUM_EDGES,
    NUM_STAGES,
    SMALLEST_TEMPERATURE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SamplingScratch,
    append_weights,
    as_weight,
    bisect,
    parameter,
    part_size,
    weights_of,
)

_EDGE_STEP = tl.constexpr(7 << 20)  # 7/8 of a halving: fixed edges from 0.56 to 1.1e-4; the last is above zero alone
_MEASURE_BLOCK = 512  # times 16 edges: with 1024 tokens, registers spill
_LIST_BLOCK = 4096
_THRESHOLD_WARPS = 16


def limit_tokens(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    parameters: torch.Tensor,
    scratch: SamplingScratch,
    *,
    deterministic: bool = False,
) -> None:
    """Raise each row's threshold in `scratch` to what its slot's top_k and top_p ask for.

    After `find_best` and before `draw_tokens` (sampling.py), with the same arguments. Rows without either, greedy rows
    and rows without a finite best logit are left alone.
    """
    num_rows, vocab_size = logits.shape
    options = launch_options(logits.device)
    limit_by_head(logits, row_slots, parameters, scratch, deterministic=deterministic)
    size = part_size(num_rows, vocab_size, _MEASURE_BLOCK, deterministic=deterministic)
    num_parts = triton.cdiv(vocab_size, size)
    _measures_kernel[(num_rows, num_parts)](
        logits,
        row_slots,
        parameters,
        scratch.peaks,
        scratch.is_open,
        scratch.counts,
        scratch.masses,
        logits.stride(0),
        vocab_size,
        size,
        MOST_PARTS=MOST_PARTS,
        BLOCK=_MEASURE_BLOCK,
        num_warps=8,
        **options,
    )
    _thresholds_kernel[(num_rows,)](
        logits,
        row_slots,
        parameters,
        scratch.peaks,
        scratch.is_open,
        scratch.thresholds,
        scratch.counts,
        scratch.masses,
        scratch.lists,
        logits.stride(0),
        vocab_size,
        num_parts,
        MOST_PARTS=MOST_PARTS,
        BLOCK=_MEASURE_BLOCK,
        LIST_SIZE=LIST_SIZE,
        LIST_BLOCK=_LIST_BLOCK,
        num_warps=_THRESHOLD_WARPS,
        **options,
    )


@triton.jit
def _fixed_edge_keys():  # type: ignore[no-untyped-def]
    """Return the bit patterns of the fixed edges, int64, falling: of integers, so that they are the same everywhere."""
    edge = tl.arange(0, NUM_EDGES).to(tl.int64)
    return tl.where(edge == NUM_EDGES - 1, 1, (edge + 1) * -_EDGE_STEP + (KEY_ABOVE_ONE - 1))


@triton.jit
def _measure(row_logits, first, end, peak, temperature, edges, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many weights of these tokens are at least each edge (int32), and their sum (fp64)."""
    counts = tl.zeros((NUM_EDGES, BLOCK), tl.int32)
    masses = tl.zeros((NUM_EDGES, BLOCK), tl.float32)
    for start in tl.range(first, end, BLOCK, num_stages=NUM_STAGES):
        ids = start + tl.arange(0, BLOCK)
        values = tl.load(row_logits + ids, mask=ids < end, other=float("-inf"))
        weights = weights_of(values, peak, temperature)
        is_over = (weights[None, :] >= edges[:, None]) & (ids < end)[None, :]
        counts += is_over.to(tl.int32)
        masses += tl.where(is_over, weights[None, :], 0.0)
    return tl.sum(counts, axis=1), tl.sum(masses.to(tl.float64), axis=1)


@triton.jit
def _measures_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_slots,
    parameters,
    peaks,
    is_open,
    counts,
    masses,
    logits_stride,
    vocab_size,
    part_size,
    MOST_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_previous_kernel(PDL)
    if tl.load(is_open + row) == 1:
        slot = tl.load(row_slots + row).to(tl.int64)
        temperature = parameter(parameters, slot, TEMPERATURE).to(tl.float32)
        peak = tl.load(peaks + row)
        first = part * part_size
        end = tl.minimum(first + part_size, vocab_size)
        edges = as_weight(_fixed_edge_keys())
        temperature = tl.maximum(temperature, SMALLEST_TEMPERATURE)
        part_counts, part_masses = _measure(logits + row * logits_stride, first, end, peak, temperature, edges, BLOCK)
        places = (row * MOST_PARTS + part) * NUM_EDGES + tl.arange(0, NUM_EDGES)
        tl.store(counts + places, part_counts)
        tl.store(masses + places, part_masses)
    release_next_kernel(PDL)


@triton.jit
def _at(values, index):  # type: ignore[no-untyped-def]
    """Return the element of a vector of NUM_EDGES."""
    return tl.sum(tl.where(tl.arange(0, NUM_EDGES) == index, values, 0), axis=0)


@triton.jit
def _list_weights(  # type: ignore[no-untyped-def]
    row_logits,
    vocab_size,
    peak,
    temperature,
    low,
    high,
    weights_out,
    LIST_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the row's weights in [low, high) to weights_out, at most LIST_SIZE of them; return how many there are."""
    length = tl.zeros((), tl.int32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=NUM_STAGES):
        ids = start + tl.arange(0, BLOCK)
        values = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf"))
        weights = weights_of(values, peak, temperature)
        is_inside = (weights >= low) & (weights < high) & (ids < vocab_size)
        length = append_weights(weights, is_inside, weights_out, length, LIST_SIZE)
    tl.debug_barrier()
    return length


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    row_logits,
    vocab_size,
    peak,
    temperature,
    target,
    counts,
    masses,
    weights_list,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """Return the largest weight, as a bit pattern, at and above which there is enough, and the sum from there up.

    Enough is `target` tokens (COUNTS) or a weight of `target`; counts and masses are the row's at the fixed edges.
    The weights of at least `high` are too few, those of at least `low` are enough; both are bit patterns.
    """
    keys = _fixed_edge_keys()
    low, high = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + KEY_ABOVE_ONE
    count_low, mass_low = tl.zeros((), tl.int32) + vocab_size, _at(masses, NUM_EDGES - 1)
    count_high, mass_high = tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    is_measured = True
    while is_measured:
        measures = counts.to(tl.float64) if COUNTS else masses
        index = tl.sum((measures < target).to(tl.int32), axis=0)  # the first edge with enough above it
        if index > 0:
            high, count_high, mass_high = _at(keys, index - 1), _at(counts, index - 1), _at(masses, index - 1)
        if index < NUM_EDGES:
            low, count_low, mass_low = _at(keys, index), _at(counts, index), _at(masses, index)
        is_measured = (count_low - count_high > LIST_SIZE) & (high - low > 1)
        if is_measured:
            steps = -tl.arange(0, NUM_EDGES) + NUM_EDGES
            keys = low + (high - low) * steps // (NUM_EDGES + 1)
            counts, masses = _measure(row_logits, 0, vocab_size, peak, temperature, as_weight(keys), BLOCK)
    if high - low > 1:
        length = _list_weights(
            row_logits, vocab_size, peak, temperature, as_weight(low), as_weight(high), weights_list,
            LIST_SIZE, LIST_BLOCK,
        )  # fmt: skip
        places = tl.arange(0, LIST_SIZE)
        weights = tl.load(weights_list + places, mask=places < length, other=-1.0, cache_modifier=".cg")
        low = bisect(weights, low, high, count_high.to(tl.float64) if COUNTS else mass_high, target, COUNTS)
        mass_low = mass_high + tl.sum(tl.where(weights >= as_weight(low), weights, 0.0).to(tl.float64), axis=0)
    return low, mass_low


@triton.jit
def _thresholds_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_slots,
    parameters,
    peaks,
    is_open,
    thresholds,
    counts,
    masses,
    lists,
    logits_stride,
    vocab_size,
    num_parts,
    MOST_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous_kernel(PDL)
    if tl.load(is_open + row) == 1:
        slot = tl.load(row_slots + row).to(tl.int64)
        temperature = parameter(parameters, slot, TEMPERATURE).to(tl.float32)
        temperature = tl.maximum(temperature, SMALLEST_TEMPERATURE)
        top_p = parameter(parameters, slot, TOP_P)
        top_k = parameter(parameters, slot, TOP_K)
        peak = tl.load(peaks + row)
        row_logits = logits + row * logits_stride
        parts, edges = tl.arange(0, MOST_PARTS), tl.arange(0, NUM_EDGES)
        places = (row * MOST_PARTS + parts)[:, None] * NUM_EDGES + edges[None, :]
        is_part = (parts < num_parts)[:, None]
        row_counts = tl.sum(tl.load(counts + places, mask=is_part, other=0), axis=0)
        row_masses = tl.sum(tl.load(masses + places, mask=is_part, other=0.0), axis=0)
        key = tl.zeros((), tl.int64)
        kept = _at(row_masses, NUM_EDGES - 1)
        if (top_k > 0.0) & (top_k < vocab_size):
            key, kept = _select(
                row_logits, vocab_size, peak, temperature, top_k, row_counts, row_masses,
                lists + row * LIST_SIZE, True, BLOCK, LIST_SIZE, LIST_BLOCK,
            )  # fmt: skip
        if top_p < 1.0:
            wanted = tl.maximum(top_p * kept, 1e-300)  # a top_p of 0 keeps the best
            nucleus_key, _ = _select(
                row_logits, vocab_size, peak, temperature, wanted, row_counts, row_masses,
                lists + row * LIST_SIZE, False, BLOCK, LIST_SIZE, LIST_BLOCK,
            )  # fmt: skip
            key = tl.maximum(key, nucleus_key)
        tl.store(thresholds + row, tl.maximum(tl.load(thresholds + row), as_weight(key)))
    release_next_kernel(PDL)
