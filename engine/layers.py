"""The decoder's layers: attention and MLP blocks over fused linears, and the rotary frequencies.

Owns no memory but its weights; keys and values live in the KVCache, index tensors in the step's plan.
"""

import math
from dataclasses import dataclass

import torch

from lmdserve.kernels import reference
from lmdserve.kernels.attention_plan import AttentionPlan

from .kv_cache import KVCache
from .linear import Linear
from .model_config import RopeConfig


@dataclass(frozen=True, slots=True)
class StepTables:
    """What all layers of one step share."""

    num_tokens: int  # hidden states may have more rows, which repeat the first and are dropped in the end
    plan: AttentionPlan
    cosines: torch.Tensor  # fp32 or the compute type, [num_tokens, 1, head_dim]
    signed_sines: torch.Tensor


class RMSNorm:
    """x / sqrt(mean(x**2) + eps) * weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, self._weight, self._eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention of one layer; `qkv` computes queries, keys and values in one product, heads in order."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: Linear
    output: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __call__(self, x: torch.Tensor, tables: StepTables, kv_cache: KVCache) -> torch.Tensor:
        projected = self.qkv(x)[: tables.num_tokens]  # without the rows that only pad the products
        heads = projected.view(tables.num_tokens, -1, self.head_dim)  # q heads, then k heads, then v heads
        rotated = heads[:, : self.num_heads + self.num_kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            rotated[:, : self.num_heads] = self.q_norm(rotated[:, : self.num_heads])
            rotated[:, self.num_heads :] = self.k_norm(rotated[:, self.num_heads :])
        reference.apply_rope_(rotated, tables.cosines, tables.signed_sines)
        data, scales = kv_cache.layer(self.layer)
        # Appended first and read back, so that a token's past is the same bits whether or not it came in this step.
        reference.append_kv(heads[:, self.num_heads :], data, scales, tables.plan.append_rows, kv_cache.bits)
        attended = reference.paged_attention(
            heads[:, : self.num_heads],
            data,
            scales,
            tables.plan,
            bits=kv_cache.bits,
            softmax_scale=1.0 / math.sqrt(self.head_dim),
        )
        return self.output(attended)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(reference.swiglu(self.gate_up(x)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Pre-norm attention and MLP with residual connections."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP

    def __call__(self, x: torch.Tensor, tables: StepTables, kv_cache: KVCache) -> torch.Tensor:
        x = self.attention(self.attention_norm(x), tables, kv_cache).add_(x)
        return self.mlp(self.mlp_norm(x)).add_(x)


def rotary_frequencies(rope: RopeConfig, base: float, head_dim: int) -> torch.Tensor:
    """Return the inverse frequencies base ** (-2i / head_dim), scaled as `rope.kind` says; fp32 [head_dim / 2].

    llama3 (Llama 3.1's rule) leaves high frequencies, divides low ones by `factor` and blends between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (base**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind != "llama3":
        return frequencies
    wavelengths_per_context = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (wavelengths_per_context - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / rope.factor)
