"""The linears of a decoder layer as the quantizer sees them: which modules are one product, and how their rows lie.

Follows from the table in `families.py`; no family has a branch here. The rows of a joined linear are in the order that
the decoder computes with (all q heads, all k, all v; all gate, all up), and `disk_rows` says where each lies on disk.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ..model_config import ModelConfig

LinearKey = Literal["qkv", "output", "gate_up", "down"]
LINEAR_KEYS: tuple[LinearKey, ...] = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """One product of a layer and the modules on disk that it consists of, joined along their outputs."""

    key: LinearKey
    modules: tuple[tuple[str, int], ...]  # name after `model.layers.N.`, number of outputs
    in_features: int
    has_bias: bool
    disk_rows: torch.Tensor | None = None  # int64 [out_features]: row i of ours is row disk_rows[i] of the modules'

    @property
    def out_features(self) -> int:
        return sum(size for _, size in self.modules)


def layer_prefix(layer: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def linear_plans(config: ModelConfig) -> dict[LinearKey, LinearPlan]:
    """Return the four products of every layer of this model."""
    names, hidden, intermediate = config.family.names, config.hidden_size, config.intermediate_size
    num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv_sizes = (num_q + 2 * num_kv,) if names.has_fused_qkv else (num_q, num_kv, num_kv)
    plans = (
        LinearPlan(
            key="qkv",
            modules=tuple(zip(names.qkv, qkv_sizes, strict=True)),
            in_features=hidden,
            has_bias=config.qkv_bias,
            disk_rows=_interleaved_rows(config) if names.has_fused_qkv else None,
        ),
        LinearPlan(key="output", modules=((names.output, hidden),), in_features=num_q, has_bias=config.output_bias),
        LinearPlan(
            key="gate_up",
            modules=((names.gate, intermediate), (names.up, intermediate)),
            in_features=hidden,
            has_bias=config.mlp_bias,
        ),
        LinearPlan(key="down", modules=((names.down, hidden),), in_features=intermediate, has_bias=config.mlp_bias),
    )
    return {plan.key: plan for plan in plans}


def norm_names(config: ModelConfig) -> dict[str, str]:
    """Return the names of a layer's norms, after `model.layers.N.`, by ours."""
    names = config.family.names
    norms = {"attention_norm": names.attention_norm, "mlp_norm": names.mlp_norm}
    return {**norms, "q_norm": names.q_norm, "k_norm": names.k_norm} if config.qk_norm else norms


def _interleaved_rows(config: ModelConfig) -> torch.Tensor:
    """Return where InternLM2's wqkv, [q..., k, v] for each key-value head, has the rows of all q, all k, all v."""
    group = config.num_heads // config.num_kv_heads
    rows = torch.arange((config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    by_head = rows.view(config.num_kv_heads, group + 2, config.head_dim)
    return torch.cat([part.flatten() for part in (by_head[:, :group], by_head[:, group], by_head[:, group + 1])])
