"""A checkpoint in another weight format: the same codes in other words, or the numbers that they stand for.

Between the 4-bit formats codes, zero points and scales stay what they are, bit for bit, the scales' type too. Owns
which linears there are, and what a format cannot hold. Files are `checkpoint_writer.py`'s, words `formats`'.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .api import ConfigError
from .checkpoint import Checkpoint
from .checkpoint_writer import CheckpointWriter, check_space
from .convert_options import ConvertOptions, WeightFormat
from .formats import DescriptionSpec, FourBitWeight, Specs, awq, compressed_tensors, find_format, gptq
from .model_config import ModelConfig
from .quantization_config import QuantizationScheme
from .quantize.architectures import layer_prefix, linear_plans

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SYMMETRIC_ZERO = 8


class Conversion(NamedTuple):
    """What was written."""

    num_linears: int
    num_bytes: int


def convert_checkpoint(source: Path, output: Path, options: ConvertOptions) -> Conversion:
    """Write the checkpoint in `source` to the folder `output`, which must not hold anything, in another format.

    Raises ConfigError when a file is wrong, the disk too small, or the format cannot hold the weights; then nothing is
    left behind.
    """
    if options.to is None:
        raise ConfigError("--to is missing; give one of awq, gptq, compressed-tensors, hf")
    if options.dtype != "auto" and options.to != "hf":
        raise ConfigError(f"--dtype is for --to hf: the scales of {options.to} weights keep their type; leave it out")
    config = ModelConfig.from_folder(source)
    stored = _StoredModel(config, Checkpoint(source))
    target = _plain_target(config, options) if options.to == "hf" else _four_bit_target(options.to, stored)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is no empty folder; give a folder that does not exist yet")
    check_space(output, stored.num_bytes(target))
    with CheckpointWriter(output) as writer:
        for tensors in stored.converted(target):
            writer.add(tensors)
        writer.finish(source, _config_json(source, target))
    return Conversion(len(stored.quantized), writer.total_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredLinear:
    """A linear as the source has it on disk."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    scheme: QuantizationScheme | None

    @property
    def specs(self) -> Specs:
        """The tensors that hold its weight, and those that tell of it."""
        specs: Specs = find_format(self.scheme).tensor_specs(
            self.in_features, self.out_features, self.scheme, torch.float16
        )
        if self.has_bias:
            specs.pop("bias", None)
        return specs


Pack = Callable[[FourBitWeight, torch.Tensor | None], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What is made of the source."""

    pack: Pack  # (weight, group of each input or None) -> tensors by suffix
    scheme: QuantizationScheme | None
    section: dict[str, Any] | None  # quantization_config
    plain_dtype: torch.dtype | None = None  # of dequantized weights
    changes_others: bool = False  # all floating-point tensors get that type


class _StoredModel:
    """The source's linears and other tensors."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self.config = config
        self._checkpoint = checkpoint
        linears = list(_linears(config))
        self.quantized = [linear for linear in linears if linear.scheme is not None]
        self.plain = [linear for linear in linears if linear.scheme is None]
        self._owners = {f"{linear.name}.{suffix}": linear for linear in self.quantized for suffix in linear.specs}
        self._check_names()

    def read(self, linear: _StoredLinear) -> FourBitWeight:
        """Return a linear's weight."""
        tensors = {}
        for suffix, spec in linear.specs.items():
            tensor = self._checkpoint.read(f"{linear.name}.{suffix}")
            if tensor is None:  # not required; names were checked
                continue
            self._check_tensor(f"{linear.name}.{suffix}", tensor, spec.shape, spec.dtype)
            if not isinstance(spec, DescriptionSpec):
                tensors[suffix] = tensor
            elif (complaint := spec.complaint(tensor)) is not None:
                raise ConfigError(f"{self._checkpoint.folder}: tensor {linear.name}.{suffix} {complaint}")
        weight: FourBitWeight = find_format(linear.scheme).read_weight(tensors, linear.scheme)
        return weight

    def group_index(self, linear: _StoredLinear) -> torch.Tensor | None:
        """Return the group of each input, [in_features]; None when groups are runs of neighbours."""
        assert linear.scheme is not None
        if not linear.scheme.reorders_inputs:
            return None
        index = self._checkpoint.read(f"{linear.name}.{find_format(linear.scheme).GROUP_INDEX_SUFFIX}")
        if index is None or bool((index[1:] >= index[:-1]).all()):
            return None
        return index.long()

    def is_reordered(self) -> bool:
        """Say whether any linear has groups that are no runs of neighbours."""
        return any(self.group_index(linear) is not None for linear in self.quantized)

    def is_symmetric(self) -> bool:
        """Say whether every zero point is 8; the first that is not ends the search."""
        return all(bool((self.read(linear).zeros == _SYMMETRIC_ZERO).all()) for linear in self.quantized)

    def converted(self, target: _Target) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors of the target, in the source's order."""
        done = set()
        for name in self._checkpoint.tensor_names():
            linear = self._owners.get(name)
            if linear is None:
                yield {name: self._other(name, target)}
            elif linear.name not in done:
                done.add(linear.name)
                tensors = target.pack(self.read(linear), self.group_index(linear))
                for suffix, tensor in tensors.items():
                    _check_finite(f"{linear.name}.{suffix}", tensor)
                yield {f"{linear.name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def num_bytes(self, target: _Target) -> int:
        """Return about what the target's tensors take, from above."""
        total = 0
        for name in self._checkpoint.tensor_names():
            if name not in self._owners:
                tensor = self._checkpoint.read(name)
                assert tensor is not None
                itemsize = target.plain_dtype.itemsize if target.changes_others and target.plain_dtype else 0
                total += tensor.numel() * max(itemsize, tensor.itemsize)
        for linear in self.quantized:
            weights, group_size = linear.in_features * linear.out_features, _group_size(linear)
            if target.plain_dtype is not None:
                total += weights * target.plain_dtype.itemsize
            else:
                total += weights // 2 + 5 * weights // group_size + 8 * linear.in_features
        return total

    def _other(self, name: str, target: _Target) -> torch.Tensor:
        tensor = self._checkpoint.read(name)
        assert tensor is not None
        if target.changes_others and tensor.is_floating_point():
            tensor = tensor.to(target.plain_dtype)
            _check_finite(name, tensor)
        return tensor

    def _check_names(self) -> None:
        present = set(self._checkpoint.tensor_names())
        for linear in self.quantized:
            for suffix, spec in linear.specs.items():
                is_required = not isinstance(spec, DescriptionSpec) or spec.is_required
                if is_required and f"{linear.name}.{suffix}" not in present:
                    raise ConfigError(
                        f"{self._checkpoint.folder} lacks tensor {linear.name}.{suffix}, which config.json implies; "
                        "check that config.json belongs to these weights, or download the checkpoint again"
                    )

    def _check_tensor(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != dtype.is_floating_point:
            raise ConfigError(
                f"{self._checkpoint.folder}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, and config.json "
                f"implies {dtype} {list(shape)}; check that config.json belongs to these weights"
            )


def _linears(config: ModelConfig) -> Iterator[_StoredLinear]:
    for layer in range(config.num_layers):
        for plan in linear_plans(config).values():
            for module, out_features in plan.modules:
                name = layer_prefix(layer) + module
                yield _StoredLinear(
                    name=name,
                    in_features=plan.in_features,
                    out_features=out_features,
                    has_bias=plan.has_bias,
                    scheme=None if config.quantization is None else config.quantization.scheme_of(name),
                )


def _group_size(linear: _StoredLinear) -> int:
    assert linear.scheme is not None
    return linear.scheme.num_inputs_per_group(linear.in_features)


def _plain_target(config: ModelConfig, options: ConvertOptions) -> _Target:
    dtype = _DTYPES[config.dtype_name if options.dtype == "auto" else options.dtype]

    def pack(weight: FourBitWeight, group_index: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"weight": weight.dequantize(group_index).to(dtype)}

    return _Target(pack=pack, scheme=None, section=None, plain_dtype=dtype, changes_others=options.dtype != "auto")


def _four_bit_target(to: WeightFormat, stored: _StoredModel) -> _Target:
    """Return the target; raise ConfigError, saying why and what to do, when the format cannot hold the weights."""
    if not stored.quantized:
        raise ConfigError(
            f"the checkpoint has plain weights, and {to} stores 4-bit codes; make them: lmdserve quantize"
        )
    sizes = {linear.scheme.group_size for linear in stored.quantized if linear.scheme is not None}
    if len(sizes) > 1:
        raise ConfigError(
            f"the checkpoint has groups of {', '.join(map(str, sorted(sizes)))} inputs in different linears, and one "
            f"group size is written for all; convert it with --to hf, and quantize that with lmdserve quantize"
        )
    make = {"awq": _awq_target, "gptq": _gptq_target, "compressed-tensors": _compressed_target}[to]
    target = make(stored, sizes.pop(), [linear.name for linear in stored.plain])
    for linear in stored.quantized:
        find_format(target.scheme).tensor_specs(linear.in_features, linear.out_features, target.scheme, torch.float16)
    return target


def _awq_target(stored: _StoredModel, group_size: int, plain: Sequence[str]) -> _Target:
    if stored.is_reordered():
        raise ConfigError(
            "the checkpoint was quantized in the order of activations (desc_act or actorder): a scale group is any set "
            "of inputs, and AWQ has runs of neighbours only. gptq and compressed-tensors keep the order; or convert it "
            "with --to hf, and quantize that with lmdserve quantize"
        )

    def pack(weight: FourBitWeight, group_index: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return awq.pack_linear(weight.codes, weight.zeros, weight.scales)

    return _Target(pack=pack, scheme=_scheme("awq", "gemm", group_size), section=awq.describe_gemm(group_size, plain))


def _gptq_target(stored: _StoredModel, group_size: int, plain: Sequence[str]) -> _Target:
    """Version 1, which all readers know, for symmetric weights; they do not agree on its zero points of 0."""
    is_symmetric, is_reordered = stored.is_symmetric(), stored.is_reordered()
    version = "gptq" if is_symmetric else "gptq_v2"
    section = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": is_reordered,
        "sym": is_symmetric,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": False,
    }
    if plain:
        section["dynamic"] = {rf"-:^{re.escape(name)}$": {} for name in plain}

    def pack(weight: FourBitWeight, group_index: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return gptq.pack_linear(weight.codes, weight.zeros, weight.scales, group_index=group_index, layout_name=version)

    return _Target(pack=pack, scheme=_scheme("gptq", version, group_size), section=section)


def _compressed_target(stored: _StoredModel, group_size: int, plain: Sequence[str]) -> _Target:
    is_symmetric, is_reordered = stored.is_symmetric(), stored.is_reordered()
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": is_symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": "group" if is_reordered else None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [stored.config.family.names.head, *plain],
        "config_groups": {"group_0": group},
    }

    def pack(weight: FourBitWeight, group_index: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if is_reordered and group_index is None:
            in_features, groups = weight.codes.shape[1], weight.scales.shape[1]
            group_index = torch.arange(in_features) // (in_features // groups)
        return compressed_tensors.pack_linear(
            weight.codes, weight.zeros, weight.scales, group_index=group_index, has_zeros=not is_symmetric
        )

    scheme = _scheme("compressed-tensors", "pack-quantized", group_size, has_zeros=not is_symmetric)
    return _Target(pack=pack, scheme=scheme, section=section)


def _scheme(method: Any, layout: str, group_size: int, *, has_zeros: bool = True) -> QuantizationScheme:
    return QuantizationScheme(
        method=method, layout=layout, group_size=group_size, has_zeros=has_zeros, reorders_inputs=False
    )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ConfigError(
            f"tensor {name} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}; where larger "
            "numbers are the reason, --to hf with --dtype bfloat16 or float32 holds them"
        )


def _config_json(source: Path, target: _Target) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    if target.plain_dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(target.plain_dtype).removeprefix("torch.")
    if target.section is not None:
        config["quantization_config"] = target.section
    return config
