"""Every operation of the model in plain torch: the truth that other kernels are tested against, and the CPU path.

Owns the arithmetic; where blocks lie and who attends to what comes in as an `AttentionPlan`. In float32 on a CPU each
operation gives a row the same bits whatever other rows share the call. That holds only for operations whose vector and
scalar forms agree (`exp` and plain arithmetic do; `silu` and `sigmoid` do not, so they are spelled out) and for matrix
products of one fixed shape, which is why attention works in tiles.
"""

import torch
from torch.nn import functional

from .attention_plan import AttentionPlan, AttentionSlice
from .layout import pack_rows, unpack_rows

# Widens stored steps so that rounding to bfloat16 (relative error 2**-9) never cuts a value off.
_ROUND_OUT = 2.0**-8
_SMALLEST_SCALE = 1e-30
# The score of a key that must not be seen; exp() of it is exactly 0, and unlike -inf it makes no NaN.
_UNSEEN = -1e30
# What infinity is stored as: a quarter of the largest number, so that a quantized row's range is one too.
_LARGEST_STORED = {dtype: torch.finfo(dtype).max / 4 for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x**2) + eps) * weight over the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def rope_tables(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cosines, signed sines), fp32 [num_tokens, 1, head_dim], for `apply_rope_`.

    positions int64 [num_tokens]; frequencies fp32 [num_tokens or 1, head_dim / 2]. The sines of the first half are
    negative, so that rotate_half is a plain roll.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((cosines, cosines), -1).unsqueeze(1), torch.cat((-sines, sines), -1).unsqueeze(1)


def apply_rope_(x: torch.Tensor, cosines: torch.Tensor, signed_sines: torch.Tensor) -> torch.Tensor:
    """Rotate the heads of x [num_tokens, num_heads, head_dim] in place, in rotate_half (NeoX) order; return x."""
    rotated = x.roll(x.shape[-1] // 2, -1).mul_(signed_sines)
    return x.mul_(cosines).add_(rotated)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for gate_up [num_tokens, 2 * intermediate_size]."""
    gate, up = gate_up.chunk(2, -1)
    if gate.dtype != torch.float32 or gate.is_cuda:
        return functional.silu(gate) * up
    return torch.div(gate, gate.neg().exp_().add_(1)).mul_(up)


def quantize_kv(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of values [..., head_dim] to `bits` (8 or 4) unsigned bits, asymmetrically.

    Returns codes uint8 [..., head_dim * bits / 8] and (scale, minimum) bfloat16 [..., 2]; a value is
    code * scale + minimum. Codes are computed from the rounded scale and minimum, both rounded outwards, so storing
    them in 16 bits never cuts a value off. Against float32 scales the mean error of normal rows of 64 grows by 4 % at
    8 bits and 1 to 2 % at 4 bits, the largest error not at all. A constant row, where maximum == minimum, needs no
    case of its own: the minimum's rounding leaves it a small step.
    """
    values = values.float()
    smallest, largest = torch.aminmax(values, dim=-1, keepdim=True)
    minimum = (smallest - smallest.abs() * _ROUND_OUT).to(torch.bfloat16)
    levels = 2**bits - 1
    scale = (largest - minimum.float()).mul_((1 + _ROUND_OUT) / levels).clamp_min_(_SMALLEST_SCALE).to(torch.bfloat16)
    codes = (values - minimum.float()).div_(scale.float()).round_().clamp_(0, levels).to(torch.uint8)
    return (pack_rows(codes) if bits == 4 else codes), torch.cat((scale, minimum), -1)


def dequantize_kv(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the values [..., head_dim] of `quantize_kv`'s codes and scales."""
    scale, minimum = scales.to(dtype).chunk(2, -1)
    if bits == 8:
        values = codes.to(dtype)
    else:
        values = unpack_rows(codes, codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype))
    return values.mul_(scale).add_(minimum)


def append_kv(
    kv: torch.Tensor, kv_data: torch.Tensor, kv_scales: torch.Tensor | None, rows: torch.Tensor, bits: int
) -> None:
    """Write new keys and values into the cache.

    kv [num_tokens, 2 * num_kv_heads, head_dim], keys before values; kv_data and kv_scales as in `read_kv`; rows int64
    [num_tokens * 2 * num_kv_heads] from the plan. Values that are not finite become finite, and small enough that a
    quantized row of them stays so: a sequence that overflowed must not reach the next owner of its blocks as 0 * NaN.
    (The GPU's kernels never read past a sequence's end, so there such a row becomes NaN, which its own sequence sees:
    `attention_heads`.)
    """
    largest = _LARGEST_STORED[kv.dtype]
    values = kv.reshape(-1, kv.shape[-1]).nan_to_num(nan=0.0, posinf=largest, neginf=-largest)
    if kv_scales is None:
        kv_data.view(-1, kv_data.shape[-1]).index_copy_(0, rows, values)
        return
    codes, scales = quantize_kv(values, bits)
    kv_data.view(-1, kv_data.shape[-1]).index_copy_(0, rows, codes)
    kv_scales.view(-1, 2).index_copy_(0, rows, scales)


def read_kv(
    kv_data: torch.Tensor, kv_scales: torch.Tensor | None, block_rows: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather blocks of one layer: keys and values, each [num_listed_blocks * num_kv_heads, block_size, head_dim].

    kv_data [2, num_blocks, num_kv_heads, block_size, head_dim or packed bytes], kv_scales the same with a last
    dimension of 2 or None; block_rows int64 [2 * num_listed_blocks], key blocks first, then value blocks offset by
    num_blocks.
    """
    _, _, num_kv_heads, block_size, width = kv_data.shape
    blocks = kv_data.view(-1, num_kv_heads, block_size, width).index_select(0, block_rows)
    if kv_scales is not None:
        scales = kv_scales.view(-1, num_kv_heads, block_size, 2).index_select(0, block_rows)
        blocks = dequantize_kv(blocks, scales, bits, dtype)
    keys, values = blocks.view(2, -1, block_size, blocks.shape[-1])
    return keys, values


def paged_attention(
    query: torch.Tensor,
    kv_data: torch.Tensor,
    kv_scales: torch.Tensor | None,
    plan: AttentionPlan,
    *,
    bits: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Causal grouped-query attention of new tokens over their sequences' blocks; [num_tokens, num_heads * head_dim].

    query [num_tokens, num_heads, head_dim]; kv_data and kv_scales as in `read_kv`, with the new tokens appended.
    """
    num_kv_heads = kv_data.shape[2]
    groups = (query * softmax_scale).view(query.shape[0] * num_kv_heads, -1)
    parts = [_attend_slice(groups, kv_data, kv_scales, plan, part, bits) for part in plan.slices]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows.index_select(0, plan.output_rows).view(-1, query.shape[1] * query.shape[2])


def _attend_slice(
    groups: torch.Tensor,
    kv_data: torch.Tensor,
    kv_scales: torch.Tensor | None,
    plan: AttentionPlan,
    part: AttentionSlice,
    bits: int,
) -> torch.Tensor:
    """Attend for a few tiles at once; [num_tiles * num_kv_heads * tile_tokens, heads of a group * head_dim].

    Every matrix product has the fixed shape [tile rows, head_dim] x [head_dim, block_size], one for each tile, block
    and key-value head. The softmax takes its maximum over all blocks, and sums fixed-length rows first, then blocks in
    the fixed order of `_fold`; blocks past a tile's end add exact zeros. groups: scaled queries, [num_tokens *
    num_kv_heads, heads of a group * head_dim].
    """
    keys, values = read_kv(kv_data, kv_scales, part.block_rows, bits, groups.dtype)
    num_products, block_size, head_dim = keys.shape
    queries = groups.index_select(0, part.query_rows).view(num_products, -1, head_dim)
    by_block = (part.num_tiles, part.num_blocks, kv_data.shape[2], queries.shape[1], -1)

    scores = torch.bmm(queries, keys.transpose(1, 2)).float().view(by_block)
    scores[:, part.first_masked_block :].masked_fill_(part.mask, _UNSEEN)
    weights = scores.sub_(scores.amax((1, 4), keepdim=True)).exp_()
    products = torch.bmm(weights.view(num_products, -1, block_size).to(groups.dtype), values).float().view(by_block)
    totals = _fold(torch.cat((products, weights.sum(-1, keepdim=True)), -1))
    return torch.div(totals[..., :head_dim], totals[..., head_dim:]).to(groups.dtype).view(-1, groups.shape[1])


def _fold(parts: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 1, in place, halving from the largest power of two: [n, blocks, ...] -> [n, ...].

    The order of the additions depends on a block's index alone: zeros appended at the end change no bit of the sum.
    """
    count = parts.shape[1]
    while count > 1:
        half = 1 << ((count - 1).bit_length() - 1)
        parts[:, : count - half].add_(parts[:, half:count])
        count = half
    return parts[:, 0]


def w4a16_weight(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a 4-bit weight to [out_features, in_features]: (code - zero) * scale.

    codes uint8 [out_features, in_features / 2] in row order (`layout.pack_rows`); zeros and scales [out_features,
    groups], each for in_features / groups consecutive inputs.
    """
    out_features, groups = scales.shape
    weight = unpack_rows(codes, torch.empty(out_features, codes.shape[1] * 2, dtype=dtype, device=codes.device))
    grouped = weight.view(out_features, groups, -1)
    grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
    return weight
