"""Products of 16-bit matrices whose rows have the same bits in every company; for speed alone the vendor's are better.

One fixed tile serves every number of rows and nothing is split, so a result's additions never change order (cuBLAS
chooses its kernel, and so the order, by the number of rows). Deterministic requests use it for the head and for models
with 16-bit weights.
"""

import torch
import triton
import triton.language as tl

from .launch import is_interpreted, launch, release_next_kernel, wait_for_previous_kernel

# Few outputs a program, so that a single row still occupies the processors: 4096 outputs make 128 programs.
_BLOCK_N = 32
_BLOCK_M = 64
_BLOCK_K = 128
_NUM_WARPS = 4
_NUM_STAGES = 3


@triton.jit(do_not_specialize=["num_rows"])
def _dense_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    bias,
    num_rows,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0)
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)  # row tiles side by side: they share the weight's tile
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row = (m < num_rows)[:, None]
    is_column = (n < out_features)[None, :]
    x_tile = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_tile = weight + n.to(tl.int64)[None, :] * weight_stride + k[:, None]
    wait_for_previous_kernel(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, in_features, BLOCK_K, num_stages=NUM_STAGES):
        is_input = k < in_features - start
        left = tl.load(x_tile + start, mask=is_row & is_input[None, :], other=0.0)
        right = tl.load(weight_tile + start, mask=is_column & is_input[:, None], other=0.0)
        if INTERPRETED:  # it would multiply the bits of bf16 numbers as integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc)
    release_next_kernel(PDL)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    outs = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    if ADDS:
        acc += tl.load(outs, mask=is_row & is_column, other=0.0)
    tl.store(outs, acc.to(out.dtype.element_ty), mask=is_row & is_column)


def dense_matmul(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, bias: torch.Tensor | None = None) -> None:
    """Write x W^T + bias to out.

    x [M, in_features] and weight [out_features, in_features] of one 16-bit type; out [M, out_features] fp32 or 16-bit;
    bias [out_features] of any float type. Columns adjacent. Raises ValueError when shapes or types do not fit.
    """
    _launch(x, weight, out, bias, adds=False)


def dense_add(
    x: torch.Tensor, weight: torch.Tensor, accumulator: torch.Tensor, *, bias: torch.Tensor | None = None
) -> None:
    """Add x W^T + bias to the fp32 accumulator; arguments as in `dense_matmul`."""
    if accumulator.dtype != torch.float32:
        raise ValueError(f"dense_add adds into float32, not {accumulator.dtype}")
    _launch(x, weight, accumulator, bias, adds=True)


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, *, adds: bool) -> None:
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    if weight.shape[1] != in_features or out.shape != (num_rows, out_features):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and out {tuple(out.shape)} do not fit")
    if x.dtype != weight.dtype or x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}; both have to be float16 or both bfloat16")
    if x.stride(1) != 1 or weight.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the columns of x, weight and out have to be adjacent in memory")
    if num_rows == 0:
        return
    launch(
        _dense_kernel,
        (triton.cdiv(num_rows, _BLOCK_M) * triton.cdiv(out_features, _BLOCK_N),),
        x.device,
        x,
        weight,
        out,
        x if bias is None else bias,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        BLOCK_N=_BLOCK_N,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        NUM_STAGES=_NUM_STAGES,
        ADDS=adds,
        HAS_BIAS=bias is not None,
        INTERPRETED=is_interpreted(),
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )
