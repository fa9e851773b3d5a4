"""Checkpoint to Decoder in one pass: every tensor is read once and copied straight to where it is used.

Owns the mapping from names on disk to our fused linears and the checks that nothing is missing, left over or of the
wrong shape. What a tensor looks like in its format is `formats`' business, where the files are `checkpoint`'s.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .api import ConfigError
from .assembly import Assembly, LayerParts, choose_assembly
from .checkpoint import Checkpoint, resolve_model_folder
from .config import HeadBits
from .formats import TensorSpec, find_format
from .linear import DenseLinear, Linear, SharedLinear
from .model_config import ModelConfig, QuantizationConfig
from .models.decoder import Decoder

if TYPE_CHECKING:
    from .models.fused_decoder import FusedDecoder

__all__ = ["load_model", "resolve_model_folder"]

# Buffers that old checkpoints carry along; they follow from config.json.
_IGNORED_NAMES = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_NUM_NAMES_SHOWN = 4


def load_model(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, lm_head_bits: HeadBits = 16
) -> "Decoder | FusedDecoder":
    """Read the weights in `folder` into a decoder that computes in `dtype` on `device`.

    Raises ConfigError naming every kind of mismatch: tensors that are missing, that nothing uses, or whose shape
    differs from what config.json implies.
    """
    pending = _PendingModel(config, dtype, device, choose_assembly(config, dtype, device, lm_head_bits))
    decoder = _fill(pending, Checkpoint(folder), device)
    del pending
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what was read ahead and unpacked
    return decoder


def _fill(pending: "_PendingModel", checkpoint: Checkpoint, device: torch.device) -> "Decoder | FusedDecoder":
    _check_names(checkpoint.folder, checkpoint.tensor_names(), pending)
    for name, tensor in checkpoint.tensors(device, into=pending.plain):
        target = pending.targets.get(name)
        if target is not None:
            _check_tensor(checkpoint.folder, name, tensor, target)
            target.place(tensor)
    return pending.finish()


class _Target(NamedTuple):
    """Where a tensor goes."""

    shape: tuple[int, ...]
    is_floating_point: bool
    place: Callable[[torch.Tensor], None]


class _Module(NamedTuple):
    """One linear module on disk, and how its outputs are reordered when it goes to memory."""

    name: str
    out_features: int
    reorder: Callable[[torch.Tensor, TensorSpec], torch.Tensor] | None = None


class _PendingLinear:
    """A linear of ours that is being filled from one or more modules on disk, joined along their outputs.

    The buffers exist from the first tensor to the last; then the linear is built and they are dropped.
    """

    def __init__(
        self,
        modules: Sequence[_Module],
        in_features: int,
        *,
        has_bias: bool,
        weight_format: ModuleType,
        quantization: QuantizationConfig | None,
        dtype: torch.dtype,
        device: torch.device,
        finish: Callable[[Linear], Any],
    ) -> None:
        self._finish = finish
        self._format = weight_format
        self._quantization = quantization
        self._dtype = dtype
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._built: Any = None
        self.targets: dict[str, _Target] = {}
        whole = self._specs(in_features, sum(module.out_features for module in modules), has_bias)
        offset = 0
        for module in modules:
            for suffix, spec in self._specs(in_features, module.out_features, has_bias).items():
                place = self._placer(suffix, whole[suffix], spec, offset, module)
                self.targets[f"{module.name}.{suffix}"] = _Target(spec.shape, spec.dtype.is_floating_point, place)
            offset += module.out_features
        self._num_unplaced = len(self.targets)

    def result(self) -> Any:
        """Return what `finish` made of the linear."""
        assert self._built is not None, "all names were checked before the first tensor was read"
        return self._built

    def _specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = self._format.tensor_specs(
            in_features, out_features, self._quantization, self._dtype
        )
        if has_bias:
            specs["bias"] = TensorSpec(shape=(out_features,), dtype=self._dtype, output_axis=0)
        return specs

    def _placer(
        self, suffix: str, whole: TensorSpec, part: TensorSpec, offset: int, module: _Module
    ) -> Callable[[torch.Tensor], None]:
        def place(tensor: torch.Tensor) -> None:
            if suffix not in self._buffers:
                self._buffers[suffix] = torch.empty(whole.shape, dtype=whole.dtype, device=self._device)
            reordered = tensor if module.reorder is None else module.reorder(tensor, part)
            start, length = offset // part.outputs_per_element, part.shape[part.output_axis]
            self._buffers[suffix].narrow(whole.output_axis, start, length).copy_(reordered)
            self._num_unplaced -= 1
            if self._num_unplaced == 0:
                self._build()

        return place

    def _build(self) -> None:
        bias = self._buffers.pop("bias", None)
        self._built = self._finish(self._format.build_linear(self._buffers, bias, self._quantization, self._dtype))
        self._buffers = {}


@dataclass(frozen=True, slots=True)
class _PendingLayer:
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: _PendingLinear
    output: _PendingLinear
    gate_up: _PendingLinear
    down: _PendingLinear


class _PendingModel:
    """The whole model before its tensors are read: `targets` says where each goes, `finish` puts it together."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, assembly: Assembly) -> None:
        self._config = config
        self._assembly = assembly
        self._dtype = dtype
        self._device = device
        self.targets: dict[str, _Target] = {}
        self.plain: dict[str, torch.Tensor] = {}  # those that are kept as they are on disk, but for their type
        names = config.family.names
        self._embedding = self._plain(names.embedding, config.vocab_size, config.hidden_size)
        self._layers = [self._layer(f"model.layers.{layer}.") for layer in range(config.num_layers)]
        self._final_norm = self._plain(names.final_norm, config.hidden_size)
        self._head: torch.Tensor | None = None
        if not config.tie_word_embeddings:
            self._head = self._plain(names.head, config.vocab_size, config.hidden_size)

    def ignores(self, name: str) -> bool:
        """Say whether a tensor may be in the checkpoint and has no use: old buffers, and a tied head's copy."""
        tied_head = self._config.tie_word_embeddings and name == f"{self._config.family.names.head}.weight"
        return tied_head or _IGNORED_NAMES.search(name) is not None

    def finish(self) -> "Decoder | FusedDecoder":
        """Return the model; every target has been filled."""
        layers = [self._finished_layer(index, layer) for index, layer in enumerate(self._layers)]
        head: Linear = SharedLinear(self._embedding) if self._head is None else DenseLinear(self._head, None)
        self._head = None
        return self._assembly.decoder(
            self._config, embedding=self._embedding, layers=layers, final_norm=self._final_norm, head=head
        )

    def _plain(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.plain[f"{name}.weight"] = tensor
        self.targets[f"{name}.weight"] = _Target(shape, True, lambda source: void(tensor.copy_(source)))
        return tensor

    def _layer(self, prefix: str) -> _PendingLayer:
        config, names = self._config, self._config.family.names
        hidden, intermediate = config.hidden_size, config.intermediate_size
        num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if names.has_fused_qkv:
            qkv = [_Module(prefix + names.qkv[0], num_q + 2 * num_kv, self._deinterleave)]
        else:
            qkv = [_Module(prefix + name, size) for name, size in zip(names.qkv, (num_q, num_kv, num_kv), strict=True)]
        gate_up = [_Module(prefix + names.gate, intermediate), _Module(prefix + names.up, intermediate)]
        return _PendingLayer(
            attention_norm=self._plain(prefix + names.attention_norm, hidden),
            mlp_norm=self._plain(prefix + names.mlp_norm, hidden),
            q_norm=self._plain(prefix + names.q_norm, config.head_dim) if config.qk_norm else None,
            k_norm=self._plain(prefix + names.k_norm, config.head_dim) if config.qk_norm else None,
            qkv=self._linear(qkv, hidden, config.qkv_bias, self._assembly.linear),
            output=self._linear(
                [_Module(prefix + names.output, hidden)], num_q, config.output_bias, self._assembly.linear
            ),
            gate_up=self._linear(gate_up, hidden, config.mlp_bias, self._assembly.gate_up),
            down=self._linear(
                [_Module(prefix + names.down, hidden)], intermediate, config.mlp_bias, self._assembly.linear
            ),
        )

    def _linear(
        self, modules: Sequence[_Module], in_features: int, has_bias: bool, finish: Callable[[Linear], Any]
    ) -> _PendingLinear:
        quantization = self._quantization_of([module.name for module in modules])
        linear = _PendingLinear(
            modules,
            in_features,
            has_bias=has_bias,
            weight_format=find_format(quantization),
            quantization=quantization,
            dtype=self._dtype,
            device=self._device,
            finish=finish,
        )
        self.targets.update(linear.targets)
        return linear

    def _quantization_of(self, names: Sequence[str]) -> QuantizationConfig | None:
        quantization = self._config.quantization
        if quantization is None:
            return None
        plain = [any(part in name for part in quantization.unquantized_modules) for name in names]
        if any(plain) != all(plain):
            raise ConfigError(
                f"modules_to_not_convert leaves only some of {', '.join(names)} unquantized, and they are computed as "
                "one product; quantize all of them or none"
            )
        return None if all(plain) else quantization

    def _deinterleave(self, tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """Turn InternLM2's wqkv, grouped as [q..., k, v] for each key-value head, into all q, all k, all v."""
        config, axis = self._config, spec.output_axis
        if config.head_dim % spec.outputs_per_element:
            raise ConfigError(
                f"head_dim {config.head_dim} does not divide into packed words of {spec.outputs_per_element} outputs; "
                "this quantized checkpoint cannot be split into heads"
            )
        group = config.num_heads // config.num_kv_heads
        heads = (config.num_kv_heads, group + 2, config.head_dim // spec.outputs_per_element)
        grouped = tensor.reshape(*tensor.shape[:axis], *heads, *tensor.shape[axis + 1 :])
        parts = torch.tensor_split(grouped, (group, group + 1), axis + 1)
        return torch.cat([part.flatten(axis, axis + 2) for part in parts], axis)

    def _finished_layer(self, index: int, layer: _PendingLayer) -> LayerParts:
        return LayerParts(
            index=index,
            attention_norm=layer.attention_norm,
            qkv=layer.qkv.result(),
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            output=layer.output.result(),
            mlp_norm=layer.mlp_norm,
            gate_up=layer.gate_up.result(),
            down=layer.down.result(),
        )


def void(_: object) -> None:
    """Drop an in-place operation's result, where a callback must return nothing."""


def _check_names(folder: Path, found: Iterable[str], pending: _PendingModel) -> None:
    present = set(found)
    missing = [name for name in pending.targets if name not in present]
    unused = sorted(name for name in present if name not in pending.targets and not pending.ignores(name))
    complaints = []
    if missing:
        complaints.append(f"lacks {len(missing)} tensors that config.json implies ({_shown(missing)})")
    if unused:
        complaints.append(f"has {len(unused)} tensors that this model does not use ({_shown(unused)})")
    if not complaints:
        return
    hint = "check that config.json belongs to these weights, or download the checkpoint again"
    if any(name.endswith(".qweight") for name in unused):
        hint = "the weights are quantized, so config.json needs its quantization_config"
    raise ConfigError(f"{folder} {' and '.join(complaints)}; {hint}")


def _check_tensor(folder: Path, name: str, tensor: torch.Tensor, target: _Target) -> None:
    if tuple(tensor.shape) != target.shape:
        raise ConfigError(
            f"{folder}: tensor {name} has shape {list(tensor.shape)}, and config.json implies {list(target.shape)}; "
            "check that config.json belongs to these weights"
        )
    if tensor.is_floating_point() != target.is_floating_point:
        expected = "a floating-point type" if target.is_floating_point else "int32"
        raise ConfigError(f"{folder}: tensor {name} is {tensor.dtype}, and {expected} is needed; its format is unknown")


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMES_SHOWN
    return ", ".join(names[:_NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
