"""Tiny random checkpoints of every family in its own on-disk naming, each with transformers' model of the same weights.

The weights come from transformers; what this file adds is the naming and interleaving of InternLM2's checkpoints,
written as loops over heads, and config.json files as the families ship them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCAB_SIZE = 131
HIDDEN_SIZE = 64
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS

Tensors = dict[str, torch.Tensor]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DYNAMIC = {"type": "dynamic", "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class FamilyCase:
    """One family: its config.json's own keys, and transformers' configuration that computes the same."""

    id: str
    config: dict[str, Any]
    reference_class: str  # of transformers; by name, because older releases do not have them all
    reference: dict[str, Any] = field(default_factory=dict)
    without_keys: tuple[str, ...] = ()
    rename: Callable[[Tensors], Tensors] | None = None

    def config_json(self, **changes: Any) -> dict[str, Any]:
        keys = {**_SIZES, "torch_dtype": "float32", **self.config, **changes}
        return {key: value for key, value in keys.items() if key not in self.without_keys}

    def reference_model(self, **changes: Any) -> transformers.PreTrainedModel:
        """Return transformers' model with random weights, large enough that every part matters in the logits."""
        config = getattr(transformers, self.reference_class)(**{**_SIZES, **self.reference, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * 0.2)
        return model

    def tensors(self, model: transformers.PreTrainedModel) -> Tensors:
        """Return the model's weights under the family's names; a tied head is stored once."""
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state if self.rename is None else self.rename(state)


def to_internlm2(state: Tensors) -> Tensors:
    """Rename Llama's tensors to InternLM2's and interleave q, k and v: for each key-value head its q heads, k, v."""
    renamed: Tensors = {}
    plain = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    for name, tensor in state.items():
        if "q_proj" in name:
            k, v = state[name.replace("q_proj", "k_proj")], state[name.replace("q_proj", "v_proj")]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = interleave(tensor, k, v)
        elif "k_proj" not in name and "v_proj" not in name:
            for llama, internlm2 in plain.items():
                name = name.replace(llama, internlm2)
            renamed[name] = tensor
    return renamed


def interleave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_kv_heads: int = NUM_KV_HEADS) -> torch.Tensor:
    """Lay q, k, v rows (outputs first) in wqkv's order."""
    head_dim = k.shape[0] // num_kv_heads
    group = q.shape[0] // k.shape[0]
    rows = []
    for kv_head in range(num_kv_heads):
        rows += [q[(kv_head * group + g) * head_dim :][:head_dim] for g in range(group)]
        rows += [k[kv_head * head_dim :][:head_dim], v[kv_head * head_dim :][:head_dim]]
    return torch.cat(rows)


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def case_named(case_id: str) -> FamilyCase:
    return next(case for case in FAMILY_CASES if case.id == case_id)


def _rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _architecture(name: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type}


_LLAMA = _architecture("Llama", "llama")

FAMILY_CASES = (
    FamilyCase(
        "internlm2",
        {**_architecture("InternLM2", "internlm2"), "bias": False, "rope_theta": 1e6, "rope_scaling": _DYNAMIC},
        "LlamaConfig",
        _rope(1e6, "dynamic", factor=2.0),
        rename=to_internlm2,
    ),
    FamilyCase(
        "internlm2-bias",
        {**_architecture("InternLM2", "internlm2"), "bias": True, "rope_theta": 1e4, "rope_scaling": None},
        "LlamaConfig",
        {**_rope(1e4), "attention_bias": True},
        rename=to_internlm2,
    ),
    FamilyCase(
        "internlm1",
        {**_architecture("InternLM", "internlm"), "bias": True, "rotary": {"base": 1e4, "type": "dynamic"}},
        "LlamaConfig",
        {**_rope(1e4, "dynamic", factor=1.0), "attention_bias": True, "num_key_value_heads": NUM_HEADS},
        without_keys=("num_key_value_heads",),
    ),
    FamilyCase(
        "internlm3",
        {
            **_architecture("InternLM3", "internlm3"),
            "bias": False,
            "qkv_bias": False,
            "head_dim": 32,
            "rope_theta": 5e7,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        },
        "InternLM3Config",
        {**_rope(5e7, "dynamic", factor=6.0), "head_dim": 32},
    ),
    FamilyCase(
        "internlm3-bias",
        {
            **_architecture("InternLM3", "internlm3"),
            "bias": True,
            "qkv_bias": True,
            "rope_theta": 5e7,
            "rope_scaling": None,
        },
        "InternLM3Config",
        {**_rope(5e7), "attention_bias": True, "mlp_bias": True, "head_dim": HEAD_DIM},
    ),
    FamilyCase("llama2", {**_LLAMA}, "LlamaConfig", _rope(1e4)),
    FamilyCase("llama3", {**_LLAMA, "rope_theta": 5e5}, "LlamaConfig", _rope(5e5)),
    FamilyCase(
        "llama3.1",
        {**_LLAMA, "rope_theta": 5e5, "rope_scaling": _LLAMA3},
        "LlamaConfig",
        {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
    ),
    FamilyCase(
        "llama-tied-mlp-bias",
        {**_LLAMA, "rope_theta": 1e4, "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
        "LlamaConfig",
        {**_rope(1e4), "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    FamilyCase("codellama", {**_LLAMA, "rope_theta": 1e6}, "LlamaConfig", _rope(1e6)),
    FamilyCase(
        "llama-linear",
        {**_LLAMA, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "LlamaConfig",
        _rope(1e4, "linear", factor=4.0),
    ),
    FamilyCase(
        "mistral",
        {**_architecture("Mistral", "mistral"), "rope_theta": 1e6, "sliding_window": None},
        "MistralConfig",
        {**_rope(1e6), "sliding_window": None},
    ),
    FamilyCase(
        "mistral-window",
        {**_architecture("Mistral", "mistral"), "rope_theta": 1e4, "sliding_window": 11},
        "MistralConfig",
        {**_rope(1e4), "sliding_window": 11},
    ),
    FamilyCase(
        "qwen2",
        {**_architecture("Qwen2", "qwen2"), "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 8},
        "Qwen2Config",
        _rope(1e6),
    ),
    FamilyCase(
        "qwen2.5-tied",
        {
            **_architecture("Qwen2", "qwen2"),
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        "Qwen2Config",
        {**_rope(1e6), "tie_word_embeddings": True},
    ),
    FamilyCase(
        "qwen3",
        {**_architecture("Qwen3", "qwen3"), "rope_theta": 1e6, "head_dim": 32, "attention_bias": False},
        "Qwen3Config",
        {**_rope(1e6), "head_dim": 32},
    ),
)
