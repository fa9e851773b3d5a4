"""What the sampling kernels share: a slot's parameters, a row's weights, the scratch memory between launches."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Columns of a slot's parameters, fp64; SEED_HASH holds the bits of an int64.
TEMPERATURE = tl.constexpr(0)
TOP_P = tl.constexpr(1)
MIN_P = tl.constexpr(2)
TOP_K = tl.constexpr(3)
REPETITION = tl.constexpr(4)
PRESENCE = tl.constexpr(5)
FREQUENCY = tl.constexpr(6)
SEED_HASH = tl.constexpr(7)
PENALTY_ROW = tl.constexpr(8)  # the slot's row of token counts, -1: it has none
NUM_PARAMETERS = tl.constexpr(9)

SMALLEST_TEMPERATURE = tl.constexpr(torch.finfo(torch.float32).tiny)  # as on the host
_FAR = tl.constexpr(120.0)  # exp(-120) is 0 in fp32: what lies further below the best needs no larger number

KEY_ABOVE_ONE = tl.constexpr(0x3F800001)  # one past the bit pattern of 1.0, the largest weight

BLOCK = 1024  # tokens that a program reads at once
PEAK_TILE = 128  # tokens whose best logit is kept, to find a row's heaviest tokens without reading the others
MOST_PARTS = 128  # programs that share a row
NUM_EDGES = tl.constexpr(16)
LIST_SIZE = 8192  # weights between two edges that one program bisects in its registers
NUM_STAGES = tl.constexpr(3)  # blocks on their way from memory while one is worked on
# Rows are cut into parts until there are that many programs, but always into some: with 256 rows on an H200 2 parts, 4
# and 8 took 85, 79 and 70 us to draw; with 16 rows 64 parts took 14 us and 128 took 15.
_ENOUGH_PROGRAMS = 1024
_FEWEST_PARTS = 8


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """What the kernels hand to each other, for steps of up to `max_rows` rows; one step at a time uses it."""

    max_rows: int
    vocab_size: int
    arrivals: torch.Tensor  # int32 [2, max_rows], all 0 between calls
    part_peaks: torch.Tensor  # fp32 [max_rows, MOST_PARTS]
    part_ids: torch.Tensor  # int32 [max_rows, MOST_PARTS]
    part_masses: torch.Tensor  # fp32 [max_rows, MOST_PARTS], relative to the part's own best
    tile_peaks: torch.Tensor  # fp32 [max_rows, ceil(vocab_size / PEAK_TILE)], the best logit of each tile
    head_tiles: torch.Tensor  # int32 [max_rows, ceil(vocab_size / PEAK_TILE)], tiles that hold the heaviest tokens
    peaks: torch.Tensor  # fp32 [max_rows]
    is_open: torch.Tensor  # int32 [max_rows], 1 where the heaviest tokens do not tell the threshold
    thresholds: torch.Tensor  # fp32 [max_rows]
    counts: torch.Tensor  # int32 [max_rows, MOST_PARTS, NUM_EDGES]
    masses: torch.Tensor  # fp64 [max_rows, MOST_PARTS, NUM_EDGES]
    lists: torch.Tensor  # fp32 [max_rows, LIST_SIZE]
    tile_masses: torch.Tensor  # fp64 [max_rows, ceil(vocab_size / BLOCK)]


def sampling_scratch(max_rows: int, vocab_size: int, device: torch.device) -> SamplingScratch:
    """Allocate the scratch memory: about 64 KiB a row."""

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    num_edges = NUM_EDGES.value
    return SamplingScratch(
        max_rows=max_rows,
        vocab_size=vocab_size,
        arrivals=new(torch.int32, 2, max_rows),
        part_peaks=new(torch.float32, max_rows, MOST_PARTS),
        part_ids=new(torch.int32, max_rows, MOST_PARTS),
        part_masses=new(torch.float32, max_rows, MOST_PARTS),
        tile_peaks=new(torch.float32, max_rows, triton.cdiv(vocab_size, PEAK_TILE)),
        head_tiles=new(torch.int32, max_rows, triton.cdiv(vocab_size, PEAK_TILE)),
        peaks=new(torch.float32, max_rows),
        is_open=new(torch.int32, max_rows),
        thresholds=new(torch.float32, max_rows),
        counts=new(torch.int32, max_rows, MOST_PARTS, num_edges),
        masses=new(torch.float64, max_rows, MOST_PARTS, num_edges),
        lists=new(torch.float32, max_rows, LIST_SIZE),
        tile_masses=new(torch.float64, max_rows, triton.cdiv(vocab_size, BLOCK)),
    )


def part_size(num_rows: int, vocab_size: int, multiple: int, *, deterministic: bool = False) -> int:
    """Return how many tokens of a row each of its programs takes, a multiple of `multiple`.

    deterministic: the same for every number of rows, because sums over a row's parts depend on where it is cut.
    """
    num_parts = MOST_PARTS if deterministic else max(_FEWEST_PARTS, min(MOST_PARTS, _ENOUGH_PROGRAMS // num_rows))
    return -(-vocab_size // (num_parts * multiple)) * multiple


@triton.jit
def weights_of(logits, peak, temperature):  # type: ignore[no-untyped-def]
    """Return exp((logits - peak) / temperature), 0 for -inf and NaN; nothing overflows."""
    distance = tl.maximum(tl.minimum(logits - peak, 0.0), temperature * -_FAR)
    return tl.exp(distance / temperature)


@triton.jit
def parameter(parameters, slot, COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(parameters + slot * NUM_PARAMETERS + COLUMN)


@triton.jit
def is_finite(value):  # type: ignore[no-untyped-def]
    return tl.abs(value) < float("inf")


@triton.jit
def is_limited(parameters, slot):  # type: ignore[no-untyped-def]
    """Say whether the slot draws, and among its heaviest tokens only (top_k, top_p)."""
    limits = (parameter(parameters, slot, TOP_P) < 1.0) | (parameter(parameters, slot, TOP_K) > 0.0)
    return limits & (parameter(parameters, slot, TEMPERATURE) > 0.0)


@triton.jit
def as_weight(key):  # type: ignore[no-untyped-def]
    """Return the fp32 numbers of these bit patterns."""
    return key.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def bisect(  # type: ignore[no-untyped-def]
    weights, low, high, measure_high, target, COUNTS: tl.constexpr
):
    """Return the largest bit pattern from `low` on at which there is enough: `target` weights (COUNTS) or their sum.

    weights holds all weights in [low, high), the others are -1. There is enough at `low`; measure_high, fp64, is what
    lies at `high` and above, which is too little. The weight sought is the only one left long before its bits are.
    """
    num_inside = tl.sum((weights >= as_weight(low)).to(tl.int32), axis=0)
    num_over = tl.zeros((), tl.int32)  # of the listed ones, at `high` and above
    while (num_inside > 1) & (high - low > 1):
        middle = (low + high) // 2
        is_over = weights >= as_weight(middle)
        count = tl.sum(is_over.to(tl.int32), axis=0)
        if COUNTS:
            measure = measure_high + count.to(tl.float64)
        else:
            measure = measure_high + tl.sum(tl.where(is_over, weights, 0.0).to(tl.float64), axis=0)
        is_enough = measure >= target
        num_inside = tl.where(is_enough, count - num_over, num_inside + num_over - count)
        num_over = tl.where(is_enough, num_over, count)
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    lightest = tl.min(tl.where(weights >= as_weight(low), weights, 2.0), axis=0)
    return tl.where(num_inside == 1, lightest.to(tl.int32, bitcast=True).to(tl.int64), low)


@triton.jit
def append_weights(weights, is_wanted, out, length, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the wanted ones of a block behind the first `length`, up to SIZE in all; return how many there are now."""
    wanted = is_wanted.to(tl.int32)
    places = length + tl.cumsum(wanted, axis=0) - 1
    tl.store(out + places, weights, mask=is_wanted & (places < SIZE))
    return length + tl.sum(wanted, axis=0)
