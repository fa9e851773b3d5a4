"""Finished layers to a checkpoint that any reader of AutoAWQ's "gemm" format loads.

Owns the output folder's files: shards, their index, config.json, and the tokenizer and generation files that are copied
from the source. Shards are written under other names; config.json comes last, so an unfinished folder does not load.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..api import ConfigError
from ..formats.awq import pack_linear
from .architectures import LinearKey, LinearPlan, layer_prefix, norm_names
from .awq import QuantizedLayer
from .layer_store import LayerStore, save_atomically, write_atomically
from .rounding import Rounding
from .source import SourceModel

_MAX_SHARD_BYTES = 2 * 10**9  # also the host memory that writing takes
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*")
_NOT_COPIED = ("config.json", "*.index.json", "quantize_config.json", "report.json")
_SPARE_BYTES = 64 * 2**20


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
    """Write all files to `output`, floating-point tensors in `dtype`."""
    remove_checkpoint(output)
    shards = list(_shards(source, store, dtype))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, parts in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: tensor for part in parts for name, tensor in part().items()}
        save_atomically(output / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(output / "model.safetensors.index.json", index)
    _copy_other_files(source.folder, output)
    _write_json(output / "config.json", _config_json(source.folder, rounding, dtype, unquantized_modules))


def remove_checkpoint(output: Path) -> None:
    """Remove the files of a checkpoint that lies in `output`, config.json first; others stay."""
    for pattern in (
        "config.json",
        "report.json",
        "report.html",
        "model*.safetensors",
        "model*.part",
        "model.*.index.json",
    ):
        for path in output.glob(pattern):
            path.unlink()


def output_bytes(source: SourceModel, rounding: Rounding) -> tuple[int, int]:
    """Return what the quantized layers and what the rest of the checkpoint take on disk, at most."""
    config = source.config
    outer = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) * 2
    weights = sum(plan.out_features * plan.in_features for plan in source.plans.values())
    groups = sum(plan.out_features * rounding.num_groups(plan.in_features) for plan in source.plans.values())
    vectors = 4 * sum(2 * plan.out_features + 2 * config.hidden_size for plan in source.plans.values())
    return config.num_layers * (weights // 2 + groups * 5 // 2 + vectors), outer


def check_space(output: Path, source: SourceModel, rounding: Rounding) -> None:
    """Raise ConfigError when the disk has no room for the finished layers and the checkpoint that they become."""
    layers, outer = output_bytes(source, rounding)
    needed = 2 * layers + outer + _SPARE_BYTES
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"{output} has {free / 1e9:.2f} GB free and quantizing {source.folder.name} takes up to "
            f"{needed / 1e9:.2f} GB there; free some space, or give --work-dir on another disk"
        )


Part = Callable[[], dict[str, torch.Tensor]]


def _shards(source: SourceModel, store: LayerStore, dtype: torch.dtype) -> Iterator[list[Part]]:
    """Yield what goes into each file, in the order of the model; every part is read when its file is written."""
    (first, embedding), *others = source.outer_tensors().items()
    before, after = {first: embedding}, dict(others)
    layers = range(source.config.num_layers)
    parts: list[tuple[Part, int]] = [
        (lambda: before, _num_bytes(before)),
        *((partial(store.tensors, layer), store.num_bytes(layer)) for layer in layers),
        (lambda: after, _num_bytes(after)),
    ]
    shard: list[Part] = []
    shard_bytes = 0
    for part, num_bytes in parts:
        if shard and shard_bytes + num_bytes > _MAX_SHARD_BYTES:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(partial(_in_dtype, part, dtype))
        shard_bytes += num_bytes
    yield shard


def _in_dtype(part: Part, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor for name, tensor in part().items()
    }


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _copy_other_files(source: Path, output: Path) -> None:
    for path in sorted(source.iterdir()):
        is_wanted = any(path.match(pattern) for pattern in _COPIED)
        if path.is_file() and is_wanted and not any(path.match(pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(path, output / path.name)


def _config_json(
    source: Path, rounding: Rounding, dtype: torch.dtype, unquantized_modules: Sequence[str]
) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": rounding.group_size,
        "zero_point": True,  # symmetric weights too: their zero points are written, and all are 8
        "modules_to_not_convert": list(unquantized_modules) or None,
    }
    return config


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
