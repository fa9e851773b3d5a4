"""A checkpoint folder that appears whole or not at all: shards, their index, the files beside the weights, config.json.

config.json comes last, so that a folder whose writer was killed does not load; one whose writer failed is removed. Owns
no format: tensors and config.json come as they are to be.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file

from .api import ConfigError

_MAX_SHARD_BYTES = 2 * 10**9  # also the host memory that writing takes
_SPARE_BYTES = 32 * 2**20  # tokenizer and other small files
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
# Of the source's weights: what is written anew, and what was measured of them as they were.
_NOT_COPIED = frozenset({"config.json", "quantize_config.json", "quant_config.json", "report.json", "report.html"})


class CheckpointWriter:
    """Writes into a folder of its own while it is entered; leaving it by an exception removes what it wrote."""

    def __init__(self, output: Path, needed_bytes: int) -> None:
        """Raise ConfigError when the folder holds something or the disk has no room for so many bytes of weights."""
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(f"{output} exists and is no empty folder; give a folder that does not exist yet")
        free, needed = _free_bytes(output), needed_bytes + _SPARE_BYTES
        if free < needed:
            raise ConfigError(
                f"{output} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; free some space, or "
                "give a folder on another disk"
            )
        self._folder = output
        self._made = [folder for folder in (output, *output.parents) if not folder.exists()]
        self._shards: list[list[str]] = []  # the names of the tensors in each
        self._pending: dict[str, torch.Tensor] = {}
        self._memory: set[int] = set()  # addresses of what is pending
        self._pending_bytes = 0
        self.total_bytes = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            return
        for path in self._folder.iterdir():
            path.unlink()
        for folder in self._made:
            folder.rmdir()

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write these tensors, now or with the next ones."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + num_bytes > _MAX_SHARD_BYTES:
            self._write_shard()
        self._pending.update({name: self._own(tensor) for name, tensor in tensors.items()})
        self._pending_bytes += num_bytes
        self.total_bytes += num_bytes

    def finish(self, source: Path, config_json: Mapping[str, Any]) -> None:
        """Give the shards their names, copy the small files of `source`, and write config.json."""
        self._write_shard()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / "model.safetensors")
        else:
            self._name_shards()
        for path in sorted(source.iterdir()):
            if path.is_file() and _is_copied(path):
                shutil.copyfile(path, self._folder / path.name)
        part = self._folder / "config.json.part"
        _write_json(part, config_json)
        part.rename(self._folder / "config.json")

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in memory that no other has, as safetensors wants it: pytorch files keep ties."""
        own = tensor.clone() if tensor.untyped_storage().data_ptr() in self._memory else tensor.contiguous()
        self._memory.add(own.untyped_storage().data_ptr())
        return own

    def _write_shard(self) -> None:
        part = self._part(len(self._shards))
        part.touch()
        mode = part.stat().st_mode  # safetensors makes files that only their owner reads
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(mode)
        self._shards.append(list(self._pending))
        self._pending, self._memory, self._pending_bytes = {}, set(), 0

    def _name_shards(self) -> None:
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            name = f"model-{index + 1:05}-of-{len(self._shards):05}.safetensors"
            self._part(index).rename(self._folder / name)
            weight_map.update(dict.fromkeys(names, name))
        index_json = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        _write_json(self._folder / "model.safetensors.index.json", index_json)

    def _part(self, index: int) -> Path:
        return self._folder / f"model-{index + 1:05}.safetensors.part"


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _is_copied(path: Path) -> bool:
    is_index = path.name.endswith(".index.json")
    is_hidden = path.name.startswith(".")
    return not (is_index or is_hidden or path.suffix in _WEIGHT_SUFFIXES or path.name in _NOT_COPIED)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
