"""A checkpoint's config.json as a checked record: sizes, RoPE, biases, quantization, end-of-sequence ids.

No torch here. Whatever the decoder cannot honour (an unknown architecture, activation, RoPE type, quantization method)
is refused by name; nothing is silently dropped. Which keys each family has is in `families`, those of quantized weights
in `quantization_config`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from .config_keys import ConfigKeys, read_json
from .families import FAMILIES, BiasRule, Family
from .quantization_config import QuantizationConfig, read_quantization

RopeKind = Literal["default", "linear", "dynamic", "llama3"]

_ROPE_KIND_ALIASES: Mapping[str, RopeKind] = {
    "default": "default",
    "origin": "default",  # InternLM's word for it
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}
_DTYPE_NAMES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How rotary frequencies follow from `theta`; fields past `max_position_embeddings` are used by llama3 only."""

    theta: float
    kind: RopeKind
    factor: float
    max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the engine must know of a model before its weights are read."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    eos_token_ids: frozenset[int]
    dtype_name: str  # of the checkpoint: float32, float16 or bfloat16
    quantization: QuantizationConfig | None

    @property
    def model_type(self) -> str:
        return self.family.model_type

    @property
    def qk_norm(self) -> bool:
        return self.family.has_qk_norm

    @cached_property
    def num_parameters(self) -> int:
        """Weights of the unquantized model, biases and norms left out; for memory plans and reports."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings

    def rope_base(self, num_prompt_tokens: int) -> float:
        """Return the RoPE base of a request: `theta`, or for dynamic NTK the base its prompt length asks for.

        base = theta * (factor * n / max_positions - (factor - 1)) ** (d / (d - 2)) once n exceeds max_positions. It is
        fixed at admission, so that all keys of a sequence share one base and no other sequence changes it.
        """
        if self.rope.kind != "dynamic" or num_prompt_tokens <= self.rope.max_position_embeddings:
            return self.rope.theta
        factor = self.rope.factor
        stretch = factor * num_prompt_tokens / self.rope.max_position_embeddings - (factor - 1)
        return float(self.rope.theta * stretch ** (self.head_dim / (self.head_dim - 2)))

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and generation_config.json; raise ConfigError naming the file and key that is wrong."""
        keys = ConfigKeys(read_json(folder / "config.json"), folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = ConfigKeys(read_json(generation_path), generation_path) if generation_path.is_file() else None
        return _parse(keys, generation)


def _parse(keys: ConfigKeys, generation: ConfigKeys | None) -> ModelConfig:
    family = _family(keys)
    _refuse_what_no_decoder_has(keys)
    num_heads = keys.positive("num_attention_heads")
    hidden_size = keys.positive("hidden_size")
    num_kv_heads = keys.positive("num_key_value_heads", None if family.has_gqa_key else num_heads)
    if num_heads % num_kv_heads:
        raise keys.fail(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = _head_dim(keys, family, hidden_size, num_heads)
    num_layers = keys.positive("num_hidden_layers")
    max_position_embeddings = keys.positive("max_position_embeddings")
    return ModelConfig(
        family=family,
        vocab_size=keys.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps"),
        rope=_rope(keys, family, max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", family.tie_word_embeddings_default),
        qkv_bias=_bias(keys, family.qkv_bias, family),
        output_bias=_bias(keys, family.output_bias, family),
        mlp_bias=_bias(keys, family.mlp_bias, family),
        sliding_window=_sliding_window(keys, family, num_layers),
        eos_token_ids=frozenset(_eos_token_ids(keys)) | frozenset(_eos_token_ids(generation) if generation else ()),
        dtype_name=_dtype_name(keys),
        quantization=read_quantization(keys),
    )


def _family(keys: ConfigKeys) -> Family:
    model_type = keys.values.get("model_type")
    architectures = keys.values.get("architectures") or []
    for family in FAMILIES:
        if family.model_type != model_type:
            continue
        if architectures and not set(family.architectures) & set(architectures):
            raise keys.fail(
                f"architecture {architectures} is not supported; {model_type} needs {family.architectures[0]}"
            )
        return family
    supported = ", ".join(family.architectures[0] for family in FAMILIES)
    raise keys.fail(
        f"model_type {model_type!r} with architectures {architectures} is not supported; supported: {supported}"
    )


def _refuse_what_no_decoder_has(keys: ConfigKeys) -> None:
    activation = keys.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise keys.fail(f"hidden_act {activation!r} is not supported; the decoder computes 'silu' only")
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise keys.fail("partial_rotary_factor other than 1.0 is not supported; RoPE turns whole heads")


def _head_dim(keys: ConfigKeys, family: Family, hidden_size: int, num_heads: int) -> int:
    if not keys.has("head_dim") and not family.requires_head_dim and hidden_size % num_heads:
        raise keys.fail(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    head_dim = keys.positive("head_dim", None if family.requires_head_dim else hidden_size // num_heads)
    if head_dim % 2 or head_dim < 4:
        raise keys.fail(f"head_dim {head_dim} is not supported; it must be even and at least 4")
    return head_dim


def _rope(keys: ConfigKeys, family: Family, max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), `rope_theta` + `rope_scaling` (before), or InternLM's `rotary`."""
    scaling = keys.section("rope_parameters") or keys.section("rope_scaling")
    rotary = keys.section("rotary")
    if rotary is not None and scaling is None:
        theta = rotary.number("base")
        kind = _rope_kind(rotary, "type")
        factor = rotary.number("scaling_factor", 1.0)
        return RopeConfig(theta=theta, kind=kind, factor=factor, max_position_embeddings=max_position_embeddings)
    theta_section = scaling if scaling is not None and scaling.has("rope_theta") else keys
    theta = theta_section.number("rope_theta", family.rope_theta_default)
    if theta <= 0:
        raise keys.fail(f"key 'rope_theta' must be above 0, not {theta}")
    if scaling is None:
        return RopeConfig(theta=theta, kind="default", factor=1.0, max_position_embeddings=max_position_embeddings)
    kind = _rope_kind(scaling, "rope_type" if scaling.has("rope_type") else "type")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise keys.fail("partial_rotary_factor other than 1.0 is not supported; RoPE turns whole heads")
    factor = scaling.number("factor", 1.0 if kind == "default" else None)
    if factor < 1.0:
        raise keys.fail(f"RoPE 'factor' must be at least 1, not {factor}")
    if kind != "llama3":
        return RopeConfig(theta=theta, kind=kind, factor=factor, max_position_embeddings=max_position_embeddings)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        max_position_embeddings=max_position_embeddings,
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_max_position_embeddings=scaling.positive("original_max_position_embeddings"),
    )


def _rope_kind(section: ConfigKeys, key: str) -> RopeKind:
    name = str(section.values.get(key))
    if name not in _ROPE_KIND_ALIASES:
        supported = ", ".join(sorted(set(_ROPE_KIND_ALIASES.values())))
        raise section.fail(f"RoPE type {name!r} is not supported; supported: {supported}")
    return _ROPE_KIND_ALIASES[name]


def _bias(keys: ConfigKeys, rule: BiasRule, family: Family) -> bool:
    if isinstance(rule, bool):
        return rule
    spelling = next((key for key in rule if keys.has(key)), rule[0])
    return keys.boolean(spelling, family.bias_default)


def _sliding_window(keys: ConfigKeys, family: Family, num_layers: int) -> int | None:
    """Return the window in tokens that every layer has, or None; a mix of layers is refused."""
    layer_types = set(keys.values.get("layer_types") or ())
    if len(layer_types) > 1 or not layer_types <= {"full_attention", "sliding_attention"}:
        raise keys.fail(f"layer_types {sorted(layer_types)} are not supported; all layers must attend alike")
    if not family.has_sliding_window or not keys.has("sliding_window"):
        return None
    if layer_types == {"full_attention"} or not keys.boolean("use_sliding_window", family.model_type == "mistral"):
        return None
    first_sliding_layer = keys.integer("max_window_layers", 0) if not layer_types else 0
    if first_sliding_layer >= num_layers:
        return None
    if first_sliding_layer > 0:
        raise keys.fail(
            f"max_window_layers {first_sliding_layer} of {num_layers} layers is not supported; all layers must attend "
            "alike, so set use_sliding_window to false to serve it with full attention"
        )
    return keys.positive("sliding_window")


def _eos_token_ids(keys: ConfigKeys) -> Iterable[int]:
    value = keys.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise keys.fail(f"key 'eos_token_id' must be an integer or a list of integers, not {value!r}")
    return ids


def _dtype_name(keys: ConfigKeys) -> str:
    name = str(keys.values.get("dtype") or keys.values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPE_NAMES:
        raise keys.fail(f"dtype {name!r} is not supported; supported: {', '.join(_DTYPE_NAMES)}")
    return name
