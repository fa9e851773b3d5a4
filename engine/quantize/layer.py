"""One decoder layer in 16 or 32 bits, as the quantizer runs it: whole windows from position 0, no KV cache.

Owns the layer's forward pass and nothing else. Products are in the weights' type; bfloat16 on a GPU, because
activations that float16 cannot hold are common, and float32 on a CPU.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from lmdserve.kernels import reference

from ..layers import rotary_frequencies
from ..model_config import ModelConfig
from .architectures import LinearKey


@dataclass(slots=True)
class Weight:
    """A linear's weight [out_features, in_features] and bias [out_features] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class LayerWeights:
    """All that a layer has, norms by our names."""

    norms: dict[str, torch.Tensor]
    linears: dict[LinearKey, Weight]

    def to(self, dtype: torch.dtype) -> "LayerWeights":
        """Return the same in another type; what has it already is shared."""
        return LayerWeights(
            {name: norm.to(dtype) for name, norm in self.norms.items()},
            {
                key: Weight(linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))
                for key, linear in self.linears.items()
            },
        )


class Observer(Protocol):
    """Is shown what goes into each linear of a layer."""

    def __call__(self, key: LinearKey, inputs: torch.Tensor) -> None:
        """inputs [num_windows, seqlen, in_features]."""


class Layer:
    """One layer in the type and on the device where it is computed, and its forward pass."""

    def __init__(self, config: ModelConfig, weights: LayerWeights) -> None:
        self.config = config
        self.norms = weights.norms
        self.linears = weights.linears

    def forward(self, x: torch.Tensor, rotary: "Rotary", observe: Observer | None = None) -> torch.Tensor:
        """Return the hidden states [num_windows, seqlen, hidden_size] after this layer."""
        see = observe or _see_nothing
        inputs = self.norm("attention_norm", x)
        see("qkv", inputs)
        attended = self.attend(self.linears["qkv"](inputs), rotary)
        see("output", attended)
        x = x + self.linears["output"](attended)
        inputs = self.norm("mlp_norm", x)
        see("gate_up", inputs)
        gated = self.gate(self.linears["gate_up"](inputs))
        see("down", gated)
        return x + self.linears["down"](gated)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return x, which may be wider than the weights, normed over its last dimension, in the weights' type."""
        weight = self.norms[name]
        return reference.rms_norm(x, weight.to(x.dtype), self.config.rms_norm_eps).to(weight.dtype)

    def attend(self, qkv: torch.Tensor, rotary: "Rotary") -> torch.Tensor:
        """Return causal attention, [num_windows, seqlen, num_heads * head_dim], of joined q, k and v."""
        config = self.config
        heads = qkv.view(*qkv.shape[:-1], -1, config.head_dim)  # [num_windows, seqlen, heads, head_dim]
        query, key, value = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], -2)
        if config.qk_norm:
            query, key = self.norm("q_norm", query), self.norm("k_norm", key)
        query, key = rotary.apply(query), rotary.apply(key)
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=rotary.mask,
            is_causal=rotary.mask is None,
            scale=1 / math.sqrt(config.head_dim),
            enable_gqa=config.num_heads != config.num_kv_heads,
        )
        return attended.transpose(1, 2).flatten(2)

    @staticmethod
    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up."""
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)


class Rotary:
    """What follows from positions 0 .. seqlen - 1 for all layers: rotations, and the mask where a window slides."""

    def __init__(self, config: ModelConfig, seqlen: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies = rotary_frequencies(config.rope, config.rope_base(seqlen), config.head_dim)
        positions = torch.arange(seqlen)
        cosines, signed_sines = reference.rope_tables(positions, frequencies.unsqueeze(0))
        self._cosines, self._signed_sines = cosines.to(device, dtype), signed_sines.to(device, dtype)
        self._half = config.head_dim // 2
        self.mask: torch.Tensor | None = None  # bool [seqlen, seqlen], or None: all that came before
        if config.sliding_window is not None and config.sliding_window < seqlen:
            distance = positions.unsqueeze(1) - positions
            self.mask = ((distance >= 0) & (distance < config.sliding_window)).to(device)

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate heads [num_windows, seqlen, num_heads, head_dim]."""
        return heads * self._cosines + heads.roll(self._half, -1) * self._signed_sines


def _see_nothing(key: LinearKey, inputs: torch.Tensor) -> None:
    """Look at nothing."""
