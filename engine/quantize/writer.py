"""Finished layers to a checkpoint that any reader of AutoAWQ's "gemm" format loads.

Owns the names, order and types of the tensors, and config.json; the files are `checkpoint_writer.py`'s.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_writer import CheckpointWriter, remove_checkpoint
from ..formats.awq import describe_gemm, pack_linear
from .architectures import LinearKey, LinearPlan, layer_prefix, norm_names
from .awq import QuantizedLayer
from .layer_store import LayerStore
from .rounding import Rounding
from .source import SourceModel


def layer_tensors(source: SourceModel, layer: int, result: QuantizedLayer) -> dict[str, torch.Tensor]:
    """Return a quantized layer's tensors as they are named and laid out on disk, on the CPU.

    What is not packed stays in float32 (norms, biases) or in the scales' type, until the checkpoint's type is known.
    """
    prefix = layer_prefix(layer)
    tensors = {f"{prefix}{on_disk}.weight": result.norms[name] for name, on_disk in norm_names(source.config).items()}
    for key, plan in source.plans.items():
        for name, parts in _modules(plan, result, key):
            tensors.update({f"{prefix}{name}.{suffix}": tensor for suffix, tensor in parts.items()})
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _modules(plan: LinearPlan, result: QuantizedLayer, key: LinearKey) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the modules on disk that a linear consists of, each with its tensors by suffix."""
    rows = None
    if plan.disk_rows is not None:
        rows = torch.empty_like(plan.disk_rows)
        rows[plan.disk_rows] = torch.arange(len(rows))  # row i on disk is our row rows[i]
    start = 0
    for name, size in plan.modules:
        part = torch.arange(start, start + size) if rows is None else rows[start : start + size]
        start += size
        tensors: dict[str, torch.Tensor] = {}
        if key in result.rounded:
            rounded = result.rounded[key]
            part = part.to(rounded.codes.device)
            tensors.update(pack_linear(rounded.codes[part], rounded.zeros[part], rounded.scales[part]))
        else:
            tensors["weight"] = result.kept[key][part.to(result.kept[key].device)]
        if key in result.biases:
            tensors["bias"] = result.biases[key][part.to(result.biases[key].device)]
        yield name, tensors


def write_checkpoint(
    source: SourceModel,
    store: LayerStore,
    output: Path,
    *,
    rounding: Rounding,
    dtype: torch.dtype,
    unquantized_modules: Sequence[str],
) -> None:
    """Write all files to `output`, floating-point tensors in `dtype`, in place of a checkpoint that lies there."""
    remove_checkpoint(output)
    with CheckpointWriter(output) as writer:
        for tensors in _tensors_in_order(source, store):
            writer.add({name: _in_dtype(tensor, dtype) for name, tensor in tensors.items()})
        writer.finish(source.folder, _config_json(source.folder, rounding, dtype, unquantized_modules))


def needed_bytes(source: SourceModel, rounding: Rounding) -> int:
    """Return what a run takes on the disk, at most: the finished layers, and the checkpoint that they become."""
    config = source.config
    outer = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) * 2
    weights = sum(plan.out_features * plan.in_features for plan in source.plans.values())
    groups = sum(plan.out_features * rounding.num_groups(plan.in_features) for plan in source.plans.values())
    vectors = 4 * sum(2 * plan.out_features + 2 * config.hidden_size for plan in source.plans.values())
    layers = config.num_layers * (weights // 2 + groups * 5 // 2 + vectors)
    return 2 * layers + outer


def _tensors_in_order(source: SourceModel, store: LayerStore) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield the model's tensors in its own order, each layer's when it is asked for."""
    (first, embedding), *others = source.outer_tensors().items()
    yield {first: embedding}
    for layer in range(source.config.num_layers):
        yield store.tensors(layer)
    yield dict(others)


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _config_json(
    source: Path, rounding: Rounding, dtype: torch.dtype, unquantized_modules: Sequence[str]
) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = describe_gemm(rounding.group_size, unquantized_modules)
    return config
