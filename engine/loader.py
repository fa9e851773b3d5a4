"""Checkpoint to Decoder in one pass: every tensor is read once and copied straight to where it is used.

Owns the mapping from names on disk to our fused linears and the checks that nothing is missing, left over or of the
wrong shape. What a tensor looks like in its format is `formats`' business, where the files are `checkpoint`'s.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .api import ConfigError
from .assembly import Assembly, LayerParts, choose_assembly
from .checkpoint import Checkpoint
from .config import HeadBits
from .formats import TensorSpec, find_format
from .input_order import group_index_complaint, input_order
from .linear import DenseLinear, Linear, ReorderedLinear, SharedLinear
from .model_config import ModelConfig
from .models.decoder import Decoder
from .pending_linear import Module, PendingLinear, Target
from .quantization_config import QuantizationScheme

if TYPE_CHECKING:
    from .models.fused_decoder import FusedDecoder

# Buffers that old checkpoints carry along; they follow from config.json.
IGNORED_NAMES = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_NUM_NAMES_SHOWN = 4


def load_model(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, lm_head_bits: HeadBits = 16
) -> "Decoder | FusedDecoder":
    """Read the weights in `folder` into a decoder that computes in `dtype` on `device`.

    Raises ConfigError naming every kind of mismatch: tensors that are missing, that nothing uses, or whose shape
    differs from what config.json implies.
    """
    checkpoint = Checkpoint(folder)
    pending = _PendingModel(config, checkpoint, dtype, device, choose_assembly(config, dtype, device, lm_head_bits))
    decoder = _fill(pending, checkpoint, device)
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


@dataclass(frozen=True, slots=True)
class _PendingLayer:
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: PendingLinear
    output: PendingLinear
    gate_up: PendingLinear
    down: PendingLinear


class _PendingModel:
    """The whole model before its tensors are read: `targets` says where each goes, `finish` puts it together."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, assembly: Assembly
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._assembly = assembly
        self._dtype = dtype
        self._device = device
        self.targets: dict[str, Target] = {}
        self.plain: dict[str, torch.Tensor] = {}  # those that are kept as they are on disk, but for their type
        names = config.family.names
        self._embedding = self._plain(names.embedding, config.vocab_size, config.hidden_size)
        self._layers = [self._layer(f"model.layers.{layer}.") for layer in range(config.num_layers)]
        self._final_norm = self._plain(names.final_norm, config.hidden_size)
        self._head: torch.Tensor | None = None
        if not config.tie_word_embeddings:
            if self._has_quantized_head():
                raise ConfigError(
                    f"{checkpoint.folder}: the output head {names.head} is quantized, which is not supported; "
                    "take a checkpoint that leaves it in 16 bits"
                )
            self._head = self._plain(names.head, config.vocab_size, config.hidden_size)

    def ignores(self, name: str) -> bool:
        """Say whether a tensor may be in the checkpoint and has no use: old buffers, and a tied head's copy."""
        tied_head = self._config.tie_word_embeddings and name == f"{self._config.family.names.head}.weight"
        return tied_head or IGNORED_NAMES.search(name) is not None

    def finish(self) -> "Decoder | FusedDecoder":
        """Return the model; every target has been filled."""
        layers = [self._finished_layer(index, layer) for index, layer in enumerate(self._layers)]
        head: Linear = SharedLinear(self._embedding) if self._head is None else DenseLinear(self._head, None)
        # Targets refer to linears and these to this object: without the circle, weights go with their decoder.
        self.targets.clear()
        self._layers, self._head = [], None
        return self._assembly.decoder(
            self._config, embedding=self._embedding, layers=layers, final_norm=self._final_norm, head=head
        )

    def _plain(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.plain[f"{name}.weight"] = tensor
        self.targets[f"{name}.weight"] = Target(shape, True, lambda source: void(tensor.copy_(source)))
        return tensor

    def _layer(self, prefix: str) -> _PendingLayer:
        config, names = self._config, self._config.family.names
        hidden, intermediate = config.hidden_size, config.intermediate_size
        num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if names.has_fused_qkv:
            qkv = self._modules(prefix, {names.qkv[0]: num_q + 2 * num_kv}, hidden, self._deinterleave)
        else:
            qkv = self._modules(prefix, dict(zip(names.qkv, (num_q, num_kv, num_kv), strict=True)), hidden)
        output = self._modules(prefix, {names.output: hidden}, num_q)
        gate_up = self._modules(prefix, {names.gate: intermediate, names.up: intermediate}, hidden)
        down = self._modules(prefix, {names.down: hidden}, intermediate)
        assembly, inner_order = self._assembly, down[0].input_order
        return _PendingLayer(
            attention_norm=self._plain(prefix + names.attention_norm, hidden),
            mlp_norm=self._plain(prefix + names.mlp_norm, hidden),
            q_norm=self._plain(prefix + names.q_norm, config.head_dim) if config.qk_norm else None,
            k_norm=self._plain(prefix + names.k_norm, config.head_dim) if config.qk_norm else None,
            qkv=self._linear(qkv, hidden, config.qkv_bias, assembly.linear),
            output=self._linear(output, num_q, config.output_bias, assembly.linear),
            # gate and up put out what down takes in the order in which down wants it, so that nothing is gathered.
            gate_up=self._linear(
                gate_up, hidden, config.mlp_bias, assembly.gate_up, output_order=_of_both_halves(inner_order)
            ),
            down=self._linear(
                down, intermediate, config.mlp_bias, lambda linear: assembly.linear(_of_sorted_inputs(linear))
            ),
        )

    def _modules(
        self,
        prefix: str,
        outputs: Mapping[str, int],
        in_features: int,
        reorder: Callable[[torch.Tensor, TensorSpec], torch.Tensor] | None = None,
    ) -> list[Module]:
        """Return modules on disk that are one linear of ours, by their names behind `prefix` and numbers of outputs."""
        return [
            Module(prefix + name, count, self._input_order(prefix + name, in_features), reorder)
            for name, count in outputs.items()
        ]

    def _input_order(self, module: str, in_features: int) -> torch.Tensor | None:
        """Read, ahead of the weights, in which order a module's inputs are sorted by scale group."""
        scheme = self._scheme_of(module)
        if scheme is None or not scheme.reorders_inputs:
            return None
        name = f"{module}.{find_format(scheme).GROUP_INDEX_SUFFIX}"
        group_index = self._checkpoint.read(name)
        if group_index is None or tuple(group_index.shape) != (in_features,):
            return None  # names and shapes are checked, with better words, as the tensors come
        complaint = group_index_complaint(group_index, scheme.num_inputs_per_group(in_features), may_reorder=True)
        if complaint is not None:
            raise ConfigError(f"{self._checkpoint.folder}: tensor {name} {complaint}")
        return input_order(group_index)

    def _linear(
        self,
        modules: Sequence[Module],
        in_features: int,
        has_bias: bool,
        finish: Callable[[Linear], Any],
        *,
        output_order: torch.Tensor | None = None,
    ) -> PendingLinear:
        linear = PendingLinear(
            modules,
            in_features,
            has_bias=has_bias,
            scheme=self._common_scheme([module.name for module in modules]),
            output_order=output_order,
            dtype=self._dtype,
            device=self._device,
            finish=finish,
        )
        self.targets.update(linear.targets)
        return linear

    def _scheme_of(self, module: str) -> QuantizationScheme | None:
        quantization = self._config.quantization
        return None if quantization is None else quantization.scheme_of(module)

    def _common_scheme(self, modules: Sequence[str]) -> QuantizationScheme | None:
        schemes = {self._scheme_of(module) for module in modules}
        if len(schemes) > 1:
            raise ConfigError(
                f"quantization_config stores {', '.join(modules)} in different ways, and they are computed as one "
                "product; quantize all of them alike or none"
            )
        return schemes.pop()

    def _has_quantized_head(self) -> bool:
        """AWQ's rules speak of layers alone; compressed-tensors' `Linear` means the head too unless it is ignored."""
        scheme = self._scheme_of(self._config.family.names.head)
        return scheme is not None and scheme.method == "compressed-tensors"

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


def _of_both_halves(order: torch.Tensor | None) -> torch.Tensor | None:
    return None if order is None else torch.cat((order, order + len(order)))


def _of_sorted_inputs(linear: Linear) -> Linear:
    """Return the linear for inputs that come sorted by scale group already."""
    return linear.linear if isinstance(linear, ReorderedLinear) else linear


def void(_: object) -> None:
    """Drop an in-place operation's result, where a callback must return nothing."""


def _check_names(folder: Path, found: Iterable[str], pending: _PendingModel) -> None:
    present = set(found)
    missing = [name for name, target in pending.targets.items() if target.is_required and name not in present]
    unused = sorted(name for name in present if name not in pending.targets and not pending.ignores(name))
    complaints = []
    if missing:
        complaints.append(f"lacks {len(missing)} tensors that config.json implies ({_shown(missing)})")
    if unused:
        complaints.append(f"has {len(unused)} tensors that this model does not use ({_shown(unused)})")
    if not complaints:
        return
    hint = "check that config.json belongs to these weights, or download the checkpoint again"
    if any(name.endswith((".qweight", ".weight_packed")) for name in unused):
        hint = "the weights are quantized, so config.json needs its quantization_config"
    raise ConfigError(f"{folder} {' and '.join(complaints)}; {hint}")


def _check_tensor(folder: Path, name: str, tensor: torch.Tensor, target: Target) -> None:
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
