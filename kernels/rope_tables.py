"""Cosines and sines of a step's rotary angles (RoPE, Su et al., 2021), once for all layers.

The angle is position * frequency, rounded to fp32 as in `reference.rope_tables`. Angles reach 262144 and more: they are
reduced to an eighth of a turn either way in fp64, exactly enough, and evaluated there as polynomials (the coefficients
of Moshier's Cephes library, sinf.c), because CUDA's own fp32 sine keeps its reduction of large angles in local memory.
Against fp64 the error is at most 1.2e-7 at every position.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, release_next_kernel, wait_for_previous_kernel

_BLOCK = 128
_QUARTER_TURNS = tl.constexpr(0.63661977236758134308)  # 2 / pi: quarter turns a radian
_QUARTER_TURN = tl.constexpr(1.57079632679489661923)


@triton.jit
def _cosine_and_sine(angles):  # type: ignore[no-untyped-def]
    """Return cos and sin of fp32 angles of any size."""
    wide = angles.to(tl.float64)
    quarters = tl.floor(wide * _QUARTER_TURNS + 0.5)
    r = (wide - quarters * _QUARTER_TURN).to(tl.float32)  # in [-pi/4, pi/4]
    square = r * r
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * r + r
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine = cosine - 0.5 * square + 1.0
    quadrant = quarters.to(tl.int64) & 3
    is_swapped = (quadrant & 1) == 1
    of_cosine = tl.where(is_swapped, sine, cosine)
    of_sine = tl.where(is_swapped, cosine, sine)
    is_cosine_negative = (quadrant == 1) | (quadrant == 2)
    return tl.where(is_cosine_negative, -of_cosine, of_cosine), tl.where(quadrant >= 2, -of_sine, of_sine)


@triton.jit
def _rope_tables_kernel(  # type: ignore[no-untyped-def]
    positions,
    frequencies,
    table_rows,
    cosines,
    sines,
    size,
    num_pairs,
    HAS_TABLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < size
    rows = places // num_pairs
    wait_for_previous_kernel(PDL)
    position = tl.load(positions + rows, mask=is_inside, other=0).to(tl.float32)
    of_table = places % num_pairs
    if HAS_TABLE_ROWS:
        of_table += tl.load(table_rows + rows, mask=is_inside, other=0).to(tl.int64) * num_pairs
    frequency = tl.load(frequencies + of_table, mask=is_inside, other=0.0)
    cosine, sine = _cosine_and_sine(position * frequency)
    tl.store(cosines + places, cosine, mask=is_inside)
    tl.store(sines + places, sine, mask=is_inside)
    release_next_kernel(PDL)


def rope_tables(
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    table_rows: torch.Tensor | None,
    cosines: torch.Tensor,
    sines: torch.Tensor,
) -> None:
    """Write the cosines and sines, fp32 [M, D / 2], of each row's position times its inverse frequencies.

    positions int32 [M] (below 2**24, so that fp32 holds them); frequencies fp32 [num_tables, D / 2]; table_rows int32
    [M] says which frequencies a row uses, None: the first for all. All contiguous. Raises ValueError when shapes do
    not fit.
    """
    num_rows, num_pairs = positions.shape[0], frequencies.shape[1]
    shape = (num_rows, num_pairs)
    if cosines.shape != shape or sines.shape != shape or (table_rows is not None and table_rows.shape != (num_rows,)):
        raise ValueError(
            f"rope_tables got {num_rows} positions of {num_pairs} pairs, but cosines {tuple(cosines.shape)}, sines "
            f"{tuple(sines.shape)}; both have to be {shape}, and table_rows to have one entry a row"
        )
    if not (cosines.is_contiguous() and sines.is_contiguous() and frequencies.is_contiguous()):
        raise ValueError("rope_tables needs contiguous frequencies, cosines and sines")
    if cosines.numel() == 0:
        return
    launch(
        _rope_tables_kernel,
        (triton.cdiv(cosines.numel(), _BLOCK),),
        cosines.device,
        positions,
        frequencies,
        positions if table_rows is None else table_rows,
        cosines,
        sines,
        cosines.numel(),
        num_pairs,
        HAS_TABLE_ROWS=table_rows is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
