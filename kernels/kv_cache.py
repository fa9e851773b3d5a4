"""Appending prompt tokens to the paged cache: rotation, head norms, quantization and storing in one launch.

A program takes a few tokens and one key-value head with its group of query heads: queries are rotated into a 16-bit
buffer for `prefill_attention`, keys and values go to the cache as `reference.quantize_kv` has them. Decode rows do all
of this inside `paged_attention.decode_attention`.
"""

import torch
import triton
import triton.language as tl

from .attention_heads import load_rotated, store_rows
from .launch import launch, release_next_kernel, wait_for_previous_kernel

_TILE_TOKENS = 8
_NUM_WARPS = 4
SUPPORTED_HEAD_DIMS = (64, 128)
SUPPORTED_BITS = (4, 8, 16)
MOST_GROUP_HEADS = 8
LEAST_BLOCK_SIZE = 16


def check_sizes(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, bits: int) -> None:
    """Raise ValueError for a model or cache that the attention kernels have no code for."""
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise ValueError(f"attention kernels have head_dim {SUPPORTED_HEAD_DIMS}, not {head_dim}")
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MOST_GROUP_HEADS:
        raise ValueError(f"attention kernels have groups of 1 to 8 heads, not {num_heads} heads over {num_kv_heads}")
    if block_size < LEAST_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"attention kernels need a block size that is a power of two from 16 on, not {block_size}")
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"attention kernels read caches of 4, 8 and 16 bits, not {bits}")


def kv_words(kv_data: torch.Tensor, kv_scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer of the cache as kernels address it: codes and scales in 32-bit words, or 16-bit data as it is."""
    if kv_scales is None:
        return kv_data, kv_data
    return kv_data.view(torch.int32), kv_scales.view(torch.int32)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _append_kernel(  # type: ignore[no-untyped-def]
    qkv,
    cosines,
    sines,
    data,
    scales,
    block_tables,
    token_table_rows,
    positions,
    query_out,
    q_norm,
    k_norm,
    num_tokens,
    num_blocks,
    qkv_stride,
    table_stride,
    norm_eps,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    HEADS: tl.constexpr = KV_HEADS * GROUP
    kv_head = tl.program_id(0)
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    elements = tl.arange(0, HALF)[None, :]
    wait_for_previous_kernel(PDL)

    rows = tl.arange(0, TOKENS * GROUP_ROWS)[:, None]
    token = first_token + rows // GROUP_ROWS
    head = rows % GROUP_ROWS
    is_row = (token < num_tokens) & (head < GROUP)
    mask = tl.broadcast_to(is_row, (TOKENS * GROUP_ROWS, HALF))
    query_head = kv_head * GROUP + head
    cosine = tl.load(cosines + token * HALF + elements, mask=mask, other=0.0)
    sine = tl.load(sines + token * HALF + elements, mask=mask, other=0.0)
    query = qkv + token * qkv_stride + query_head * HEAD_DIM + elements
    query_first, query_second = load_rotated(query, mask, cosine, sine, q_norm, norm_eps, HALF, HAS_NORM)
    target = query_out + (token * HEADS + query_head) * HEAD_DIM + elements
    tl.store(target, query_first.to(query_out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, query_second.to(query_out.dtype.element_ty), mask=mask)

    token = first_token + tl.arange(0, TOKENS)[:, None]
    is_token = token < num_tokens
    mask = tl.broadcast_to(is_token, (TOKENS, HALF))
    position = tl.load(positions + token, mask=is_token, other=-1).to(tl.int64)
    is_token &= position >= 0  # padding rows have none
    table = tl.load(token_table_rows + token, mask=is_token, other=0).to(tl.int64) * table_stride
    block = tl.load(block_tables + table + position // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    place = (block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
    cosine = tl.load(cosines + token * HALF + elements, mask=mask, other=0.0)
    sine = tl.load(sines + token * HALF + elements, mask=mask, other=0.0)
    key = qkv + token * qkv_stride + (HEADS + kv_head) * HEAD_DIM + elements
    key_first, key_second = load_rotated(key, mask, cosine, sine, k_norm, norm_eps, HALF, HAS_NORM)
    value = key + KV_HEADS * HEAD_DIM
    value_first = tl.load(value, mask=mask, other=0.0).to(tl.float32)
    value_second = tl.load(value + HALF, mask=mask, other=0.0).to(tl.float32)
    release_next_kernel(PDL)
    store_rows(data, scales, place, is_token, key_first, key_second, HEAD_DIM, BITS)
    place += num_blocks.to(tl.int64) * (KV_HEADS * BLOCK_SIZE)
    store_rows(data, scales, place, is_token, value_first, value_second, HEAD_DIM, BITS)


def append_kv(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    kv_data: torch.Tensor,
    kv_scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    token_table_rows: torch.Tensor,
    positions: torch.Tensor,
    query_out: torch.Tensor,
    *,
    bits: int,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
) -> None:
    """Rotate the queries of qkv into query_out and append its rotated keys, and its values, to the cache.

    qkv [T, (num_heads + 2 * num_kv_heads) * D] fp32 or 16-bit; cosines and sines fp32 [T, D / 2] of each token's
    position; kv_data [2, num_blocks, num_kv_heads, block_size, width] and kv_scales [..., 2] or None as
    `KVCache.layer` gives them; block_tables int32 [num_table_rows, max_blocks]; token_table_rows and positions, int32
    or int64 [T], say where a token's slot is, and a padding row, which writes nothing to the cache, has position -1;
    query_out 16-bit [T, num_heads, D]. q_norm and k_norm [D]: RMS norm of
    each head before rotation. Raises ValueError for sizes the kernel does not have.
    """
    _, num_blocks, num_kv_heads, block_size, _ = kv_data.shape
    num_tokens, _, head_dim = query_out.shape
    check_sizes(num_heads, num_kv_heads, head_dim, block_size, bits)
    if qkv.shape != (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim) or qkv.stride(1) != 1:
        raise ValueError(
            f"append_kv got qkv {tuple(qkv.shape)} and query_out {tuple(query_out.shape)} for {num_kv_heads} KV heads"
        )
    if num_tokens == 0:
        return
    data, scales = kv_words(kv_data, kv_scales)
    group = num_heads // num_kv_heads
    launch(
        _append_kernel,
        (num_kv_heads, triton.cdiv(num_tokens, _TILE_TOKENS)),
        qkv.device,
        qkv,
        cosines,
        sines,
        data,
        scales,
        block_tables,
        token_table_rows,
        positions,
        query_out,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        num_tokens,
        num_blocks,
        qkv.stride(0),
        block_tables.stride(0),
        norm_eps,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_ROWS=triton.next_power_of_2(group),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BITS=bits,
        TOKENS=_TILE_TOKENS,
        HAS_NORM=q_norm is not None,
        num_warps=_NUM_WARPS,
    )
