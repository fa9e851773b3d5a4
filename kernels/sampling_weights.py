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

BLOCK = 1024  # tokens that a program reads at once
MOST_PARTS = 128  # programs that share a row
NUM_EDGES = tl.constexpr(8)
LIST_SIZE = 4096  # weights between two edges that one program bisects in its registers
_ENOUGH_PROGRAMS = 512  # of 4 to 8 warps: four for each processor of an H200


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """What the kernels hand to each other, for steps of up to `max_rows` rows; one step at a time uses it."""

    max_rows: int
    vocab_size: int
    arrivals: torch.Tensor  # int32 [2, max_rows], all 0 between calls
    part_peaks: torch.Tensor  # fp32 [max_rows, MOST_PARTS]
    part_ids: torch.Tensor  # int32 [max_rows, MOST_PARTS]
    peaks: torch.Tensor  # fp32 [max_rows]
    thresholds: torch.Tensor  # fp32 [max_rows]
    counts: torch.Tensor  # int32 [max_rows, MOST_PARTS, NUM_EDGES]
    masses: torch.Tensor  # fp64 [max_rows, MOST_PARTS, NUM_EDGES]
    lists: torch.Tensor  # fp32 [max_rows, LIST_SIZE]
    list_lengths: torch.Tensor  # int32 [max_rows]
    tile_masses: torch.Tensor  # fp64 [max_rows, ceil(vocab_size / BLOCK)]


def sampling_scratch(max_rows: int, vocab_size: int, device: torch.device) -> SamplingScratch:
    """Allocate the scratch memory: about 30 KiB a row."""

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    num_edges = NUM_EDGES.value
    return SamplingScratch(
        max_rows=max_rows,
        vocab_size=vocab_size,
        arrivals=new(torch.int32, 2, max_rows),
        part_peaks=new(torch.float32, max_rows, MOST_PARTS),
        part_ids=new(torch.int32, max_rows, MOST_PARTS),
        peaks=new(torch.float32, max_rows),
        thresholds=new(torch.float32, max_rows),
        counts=new(torch.int32, max_rows, MOST_PARTS, num_edges),
        masses=new(torch.float64, max_rows, MOST_PARTS, num_edges),
        lists=new(torch.float32, max_rows, LIST_SIZE),
        list_lengths=new(torch.int32, max_rows),
        tile_masses=new(torch.float64, max_rows, triton.cdiv(vocab_size, BLOCK)),
    )


def part_size(num_rows: int, vocab_size: int, multiple: int) -> int:
    """Return how many tokens of a row each of its programs takes, a multiple of `multiple`."""
    num_parts = max(1, min(MOST_PARTS, _ENOUGH_PROGRAMS // num_rows))
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
