"""Products with a weight of 8-bit integers, one scale a row: the head, whose 16-bit form is a tenth of a decode step.

y = scale * (x q^T), q = round(w / scale) with scale = max |w| / 127 for each output (symmetric round-to-nearest). Few
rows are bound by reading q, so every program reads one contiguous run of it, several tiles long, through a pipeline of
asynchronous copies, and turns it into 16-bit numbers on the way to the tensor cores. Many rows are bound by arithmetic:
the weight is then written out in 16 bits, a part at a time, and left to cuBLAS.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .launch import is_interpreted, launch_options, release_next_kernel, wait_for_previous_kernel

# On an H200, 92544 x 4096, the fused product took 90 us for 1 row, 98 for 16, 141 for 32 and 256 for 64; in parts of
# 2048, 4096, 8192 and 16384 rows it took 628, 495, 514 and 507 us for 64 rows, and 847, 628, 598 and 565 for 256.
# cuBLAS with the 16-bit weight took 182, 188, 193 (64 rows) and 280 (256 rows).
MOST_FUSED_ROWS = 64
DEQUANTIZED_ROWS = 4096
_QUANTIZED_ROWS = 8192  # at once, so that quantizing a head takes 128 MiB beside it
_LARGEST_CODE = 127
_SMALLEST_SCALE = 1e-30

# With more than 64 outputs x 32 rows, two warps spill registers; more rows are several programs side by side, which
# find the weight in the L2.
_BLOCK_N = 64
_MOST_BLOCK_M = 32
_BLOCK_K_AND_STAGES = {8: (256, 3), 16: (128, 4), 32: (128, 4)}  # by BLOCK_M
_PROGRAMS_PER_PROCESSOR = 4
# Two warps use mma.sync; with four, Triton 3.6 takes wgmma with the weight in registers, which gave wrong results.
_NUM_WARPS = 2

# Four codes to four halves: 0x6400 + (code + 128) is the half 1024 + code + 128, exactly; 0x6480 is 1152.
_CODES_TO_HALVES = tl.constexpr(
    "{ .reg .b32 b, l, h, c; mov.b32 c, 0x64806480; xor.b32 b, $2, 0x80808080; "
    "prmt.b32 l, b, 0x64646464, 0x4140; prmt.b32 h, b, 0x64646464, 0x4342; "
    "sub.f16x2 $0, l, c; sub.f16x2 $1, h, c; }"
)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """W [out_features, in_features] as codes * scales."""

    codes: torch.Tensor  # int8 [out_features, in_features]
    scales: torch.Tensor  # fp32 [out_features]


def quantize_rows(weight: torch.Tensor) -> Int8Weight:
    """Quantize a weight [out_features, in_features] of any float type, on its device."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _QUANTIZED_ROWS):
        part = slice(start, start + _QUANTIZED_ROWS)
        values = weight[part].float()
        scales[part] = values.abs().amax(-1).div_(_LARGEST_CODE).clamp_(min=_SMALLEST_SCALE)
        codes[part] = (values / scales[part, None]).round_()
    return Int8Weight(codes, scales)


def w8a16_scratch(in_features: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what `w8a16_matmul` needs for more than MOST_FUSED_ROWS rows."""
    return torch.empty((DEQUANTIZED_ROWS, in_features), dtype=dtype, device=device)


@triton.jit
def _widen(codes, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes in x's type; converting to halves one by one takes a unit with a quarter of the threads."""
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(_CODES_TO_HALVES, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    return codes.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _w8a16_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    out,
    num_rows,
    out_features,
    features_per_program,
    x_stride,
    out_stride,
    IN_FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(1).to(tl.int64) * features_per_program
    end = tl.minimum(first + features_per_program, out_features)
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = (m < num_rows)[None, :]
    x_tile = x + m.to(tl.int64)[None, :] * x_stride + k[:, None]
    outs = out + m.to(tl.int64)[None, :] * out_stride
    STEPS: tl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    wait_for_previous_kernel(PDL)
    for step in tl.range(0, tl.cdiv(features_per_program, BLOCK_N) * STEPS, num_stages=NUM_STAGES):
        start = step % STEPS * BLOCK_K
        features = first + step // STEPS * BLOCK_N + n
        is_feature, is_input = (features < end)[:, None], k < IN_FEATURES - start
        tile = tl.load(
            codes + features[:, None] * IN_FEATURES + (start + k)[None, :], mask=is_feature & is_input[None, :], other=0
        )
        columns = tl.load(x_tile + start, mask=is_row & is_input[:, None], other=0.0)
        if INTERPRETED:  # it has no assembly, and would multiply the bits of bf16 numbers as integers
            acc = tl.dot(tile.to(tl.float32), columns.to(tl.float32), acc)
        else:
            acc = tl.dot(_widen(tile, x.dtype.element_ty), columns, acc)
        if start + BLOCK_K >= IN_FEATURES:
            scale = tl.load(scales + features, mask=features < end, other=0.0)
            tl.store(outs + features[:, None], acc * scale[:, None], mask=is_feature & is_row)
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    release_next_kernel(PDL)


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes, scales, out, in_features, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < in_features
    wait_for_previous_kernel(PDL)
    values = tl.load(codes + row * in_features + columns, mask=is_inside, other=0).to(tl.float32)
    values *= tl.load(scales + row)
    tl.store(out + row * in_features + columns, values.to(out.dtype.element_ty), mask=is_inside)
    release_next_kernel(PDL)


def w8a16_matmul(x: torch.Tensor, weight: Int8Weight, out: torch.Tensor, scratch: torch.Tensor | None) -> None:
    """Write x W^T to out.

    x [M, in_features], fp16 or bf16, columns adjacent; out fp32 [M, out_features], columns adjacent; scratch from
    `w8a16_scratch`, needed from MOST_FUSED_ROWS + 1 rows on. Raises ValueError when shapes do not fit.
    """
    num_rows = x.shape[0]
    out_features, in_features = weight.codes.shape
    if x.shape[1] != in_features or out.shape != (num_rows, out_features) or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(
            f"w8a16_matmul got x {tuple(x.shape)} and out {tuple(out.shape)} for a weight "
            f"{(out_features, in_features)}; x has to be {(num_rows, in_features)} and out {(num_rows, out_features)}, "
            "with adjacent columns"
        )
    if num_rows > MOST_FUSED_ROWS:
        if scratch is None:
            raise ValueError(f"w8a16_matmul needs its scratch memory for {num_rows} rows, more than {MOST_FUSED_ROWS}")
        _matmul_in_parts(x, weight, out, scratch)
    elif num_rows:
        _matmul_fused(x, weight, out)


def _matmul_fused(x: torch.Tensor, weight: Int8Weight, out: torch.Tensor) -> None:
    out_features, in_features = weight.codes.shape
    block_m = min(_MOST_BLOCK_M, max(8, triton.next_power_of_2(x.shape[0])))
    block_k, num_stages = _BLOCK_K_AND_STAGES[block_m]
    num_programs = _PROGRAMS_PER_PROCESSOR * _num_processors(x.device)
    features_per_program = triton.cdiv(triton.cdiv(out_features, num_programs), 16) * 16
    _w8a16_kernel[(triton.cdiv(x.shape[0], block_m), triton.cdiv(out_features, features_per_program))](
        x,
        weight.codes,
        weight.scales,
        out,
        x.shape[0],
        out_features,
        features_per_program,
        x.stride(0),
        out.stride(0),
        IN_FEATURES=in_features,
        BLOCK_N=_BLOCK_N,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        NUM_STAGES=num_stages,
        INTERPRETED=is_interpreted(),
        num_warps=_NUM_WARPS,
        **launch_options(x.device),
    )


def _matmul_in_parts(x: torch.Tensor, weight: Int8Weight, out: torch.Tensor, scratch: torch.Tensor) -> None:
    out_features, in_features = weight.codes.shape
    for start in range(0, out_features, DEQUANTIZED_ROWS):
        part = slice(start, min(start + DEQUANTIZED_ROWS, out_features))
        dense = scratch[: part.stop - start]
        _dequantize_kernel[(len(dense), triton.cdiv(in_features, 4096))](
            weight.codes[part],
            weight.scales[part],
            dense,
            in_features,
            BLOCK=4096,
            num_warps=4,
            **launch_options(x.device),
        )
        torch.mm(x, dense.T, out_dtype=torch.float32, out=out[:, part])


@cache
def _num_processors(device: torch.device) -> int:
    """Return the streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
