"""Writes a trained network as a Hugging Face folder of InternLM2 (fused wqkv) or Llama: bf16, shards, configs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .network import Shape

MAX_SHARD_BYTES = 15_000_000


def interleaved(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """Fuse q, k and v: for each kv head its query heads, then k, then v; head_dim rows each."""
    num_kv_heads = key.shape[0] // head_dim
    parts = [tensor.view(num_kv_heads, -1, head_dim, tensor.shape[1]) for tensor in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def separated(fused: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `interleaved`."""
    heads = fused.view(shape.num_kv_heads, -1, shape.head_dim, fused.shape[1])
    return heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)


def to_checkpoint(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Return InternLM2's tensor names and layouts, in bf16."""
    tensors = {
        "model.tok_embeddings.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "output.weight": state["output.weight"],
    }
    for index in range(shape.num_layers):
        own, theirs = f"layers.{index}.", f"model.layers.{index}."
        query, key, value = (state[f"{own}w{part}.weight"] for part in "qkv")
        tensors[f"{theirs}attention.wqkv.weight"] = interleaved(query, key, value, shape.head_dim)
        tensors[f"{theirs}attention.wo.weight"] = state[f"{own}wo.weight"]
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"{theirs}{name}.weight"] = state[f"{own}{name}.weight"]
        for name in ("w1", "w2", "w3"):
            tensors[f"{theirs}feed_forward.{name}.weight"] = state[f"{own}{name}.weight"]
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def from_checkpoint(folder: Path, shape: Shape) -> dict[str, Tensor]:
    """Read a folder back as a network's state, in float32."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors.update(load_file(shard))
    state = {
        "tok_embeddings.weight": tensors["model.tok_embeddings.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["output.weight"],
    }
    for index in range(shape.num_layers):
        own, theirs = f"layers.{index}.", f"model.layers.{index}."
        parts = separated(tensors[f"{theirs}attention.wqkv.weight"], shape)
        state.update({f"{own}w{part}.weight": tensor for part, tensor in zip("qkv", parts, strict=True)})
        state[f"{own}wo.weight"] = tensors[f"{theirs}attention.wo.weight"]
        for name in ("attention_norm", "ffn_norm"):
            state[f"{own}{name}.weight"] = tensors[f"{theirs}{name}.weight"]
        for name in ("w1", "w2", "w3"):
            state[f"{own}{name}.weight"] = tensors[f"{theirs}feed_forward.{name}.weight"]
    return {name: tensor.float() for name, tensor in state.items()}


def to_llama_checkpoint(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Return the same network under Llama's tensor names, in bf16; q, k and v stay apart."""
    renamed = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {f"w{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    parts |= {"w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj"}
    parts |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for index in range(shape.num_layers):
        renamed.update(
            {f"layers.{index}.{own}.weight": f"model.layers.{index}.{theirs}.weight" for own, theirs in parts.items()}
        )
    return {renamed[name]: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


def write_checkpoint(state: dict[str, Tensor], shape: Shape, folder: Path) -> None:
    """Write shards, index, config.json and generation_config.json of an InternLM2 model."""
    write_shards(to_checkpoint(state, shape), folder)
    write_json(folder / "config.json", config_json(shape))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [2, shape.vocab_size - 2], "pad_token_id": 2},
    )


def write_llama_checkpoint(state: dict[str, Tensor], shape: Shape, folder: Path) -> None:
    """Write shards, index, config.json and generation_config.json of a Llama model."""
    write_shards(to_llama_checkpoint(state, shape), folder)
    write_json(folder / "config.json", llama_config_json(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors as safetensors files of at most MAX_SHARD_BYTES, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {}
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def config_json(shape: Shape) -> dict[str, object]:
    """Return config.json with every key that InternLM2's own files have, but remote code."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "attn_implementation": "eager",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def llama_config_json(shape: Shape) -> dict[str, object]:
    """Return the config.json of the same model under Llama's names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
