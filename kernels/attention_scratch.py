"""Dequantizes the contexts of a prefill step into a 16-bit scratch, where a head's contexts lie one after another.

A long chunk reads its context once for every tile of its queries, so codes are turned into numbers once, beforehand,
and attention runs as on an unquantized cache whose blocks lie in sequence order. Short chunks, and contexts larger than
the scratch, are dequantized inside the attention kernel instead, to the same bits.
"""

import torch
import triton
import triton.language as tl

from .attention_heads import unpack_scales
from .attention_workspace import AttentionWorkspace
from .launch import launch, release_next_kernel, wait_for_previous_kernel

_NUM_WARPS = 4


@triton.jit
def dequantized_tile(  # type: ignore[no-untyped-def]
    data, scales, places, is_inside, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr
):
    """Load the cache's places [tokens], int64, as OPERAND [tokens, HEAD_DIM]; tokens that are not inside are zeros."""
    TOKENS: tl.constexpr = places.shape[0]
    WIDTH: tl.constexpr = HEAD_DIM * BITS // 8
    rows = data.to(tl.pointer_type(tl.uint8)) + places[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale, minimum = unpack_scales(tl.load(scales + places, mask=is_inside, other=0))
    codes = tl.load(rows, mask=is_inside[:, None], other=0)
    if BITS == 4:
        codes = tl.join(codes & 0xF, codes >> 4).permute(0, 2, 1).reshape(TOKENS, HEAD_DIM)
    scale = tl.broadcast_to(scale[:, None], (TOKENS, HEAD_DIM))
    minimum = tl.broadcast_to(minimum[:, None], (TOKENS, HEAD_DIM))
    return tl.math.fma(codes.to(tl.float32), scale, minimum).to(OPERAND)


@triton.jit
def dense_start(context_lens, num_sequences, sequence, SEQUENCES: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scratch block in which a sequence's context begins."""
    sequences = tl.arange(0, SEQUENCES)
    lens = tl.load(context_lens + sequences, mask=sequences < tl.minimum(sequence, num_sequences), other=0)
    return tl.sum(tl.cdiv(lens, BLOCK_SIZE), axis=0)


@triton.jit(do_not_specialize=["num_sequences", "num_blocks", "num_scratch_blocks"])
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    data,
    scales,
    block_tables,
    table_rows,
    context_lens,
    scratch,
    num_sequences,
    num_blocks,
    num_scratch_blocks,
    table_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    target = tl.program_id(1)
    side = tl.program_id(2).to(tl.int64)
    wait_for_previous_kernel(PDL)
    sequences = tl.arange(0, SEQUENCES)
    lens = tl.load(context_lens + sequences, mask=sequences < num_sequences, other=0)
    widths = tl.cdiv(lens, BLOCK_SIZE)
    past = tl.cumsum(widths, axis=0)
    sequence = tl.sum((past <= target).to(tl.int32), axis=0)
    if sequence >= num_sequences:
        return
    is_sequence = sequences == sequence
    number = target - tl.sum(tl.where(is_sequence, past - widths, 0), axis=0)
    context_len = tl.sum(tl.where(is_sequence, lens, 0), axis=0)
    table = block_tables + tl.load(table_rows + sequence).to(tl.int64) * table_stride
    block = tl.load(table + number).to(tl.int64) + side * num_blocks
    tokens = tl.arange(0, BLOCK_SIZE)
    places = (block * KV_HEADS + kv_head) * BLOCK_SIZE + tokens
    is_inside = number * BLOCK_SIZE + tokens < context_len
    values = dequantized_tile(data, scales, places, is_inside, HEAD_DIM, BITS, scratch.dtype.element_ty)
    rows = ((side * KV_HEADS + kv_head) * num_scratch_blocks + target) * BLOCK_SIZE + tokens
    tl.store(scratch + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], values)
    release_next_kernel(PDL)


def scratch_blocks(num_context_blocks: int, kv_data: torch.Tensor, head_dim: int, workspace: AttentionWorkspace) -> int:
    """Return how many blocks the scratch is to have for that many context blocks, or 0 if they do not fit."""
    _, _, num_kv_heads, block_size, _ = kv_data.shape
    num_bytes = num_context_blocks * 2 * num_kv_heads * block_size * head_dim * 2
    return num_context_blocks if num_bytes <= workspace.scratch.numel() else 0


def dequantize_contexts(
    kv_data: torch.Tensor,
    kv_scales: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: AttentionWorkspace,
    *,
    num_blocks: int,
    bits: int,
    head_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the contexts of all sequences, one after another, as [2, num_kv_heads, num_blocks, block_size, head_dim].

    Arguments as in `prefill_attention`; num_blocks, from `scratch_blocks`, is at least what the contexts have. Places
    past a context's end are zeros. The result lies in the workspace.
    """
    _, num_cache_blocks, num_kv_heads, block_size, _ = kv_data.shape
    shape = (2, num_kv_heads, num_blocks, block_size, head_dim)
    scratch = workspace.scratch.view(dtype)[: 2 * num_blocks * num_kv_heads * block_size * head_dim].view(shape)
    launch(
        _dequantize_kernel,
        (num_kv_heads, num_blocks, 2),
        kv_data.device,
        kv_data.view(torch.int32),
        kv_scales.view(torch.int32),
        block_tables,
        table_rows,
        context_lens,
        scratch,
        context_lens.shape[0],
        num_cache_blocks,
        num_blocks,
        block_tables.stride(0),
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BITS=bits,
        SEQUENCES=max(16, triton.next_power_of_2(context_lens.shape[0])),
        num_warps=_NUM_WARPS,
    )
    return scratch
