"""The files of a checkpoint folder: shards, their index, what lies beside the weights, and config.json.

config.json comes last, so that a folder whose writer was killed does not load; a writer that failed removes what it
wrote. Owns no format: tensors and config.json come as they are to be.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from .api import ConfigError
from .atomic_write import part_of, write_json, write_tensors

_MAX_SHARD_BYTES = 2 * 10**9  # also the host memory that writing takes
_SPARE_BYTES = 32 * 2**20  # tokenizer and other small files
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
# Of the source's weights: what is written anew, and what was measured of them as they were.
_NOT_COPIED = frozenset({"config.json", "quantize_config.json", "quant_config.json", "report.json", "report.html"})
_WITHOUT_NAME = "shard-{:05}"  # of a shard while it is not known how many there will be
_REMOVED = ("config.json", "config.json.part", "report.*", "shard-*", "model*.safetensors", "model.*.index.json*")


def check_space(output: Path, num_bytes: int) -> None:
    """Raise ConfigError when a folder's disk has no room for so many bytes of weights; the folder need not exist."""
    free, needed = _free_bytes(output), num_bytes + _SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"{output} takes up to {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; free some space, "
            "or give a folder on another disk"
        )


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or what a killed writer left of one, config.json first; other files stay."""
    for pattern in _REMOVED:
        for path in folder.glob(pattern):
            path.unlink()


class CheckpointWriter:
    """Writes a checkpoint into a folder that has none; leaving the context by an exception removes what it wrote."""

    def __init__(self, output: Path) -> None:
        """The folder is made when the context is entered, with those above it that are missing."""
        self._folder = output
        self._made = [folder for folder in (output, *output.parents) if not folder.exists()]
        self._written: list[Path] = []
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
        for path in self._written:
            path.unlink(missing_ok=True)
            part_of(path).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else put something there
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
            self._rename_shard(0, "model.safetensors")
        else:
            self._name_shards()
        for path in sorted(source.iterdir()):
            if path.is_file() and _is_copied(path):
                shutil.copyfile(path, self._new(path.name))
        write_json(self._new("config.json"), config_json)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in memory that no other has, as safetensors wants it: pytorch files keep ties."""
        own = tensor.clone() if tensor.untyped_storage().data_ptr() in self._memory else tensor.contiguous()
        self._memory.add(own.untyped_storage().data_ptr())
        return own

    def _write_shard(self) -> None:
        path = self._new(_WITHOUT_NAME.format(len(self._shards)))
        write_tensors(path, self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._memory, self._pending_bytes = {}, set(), 0

    def _name_shards(self) -> None:
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            name = f"model-{index + 1:05}-of-{len(self._shards):05}.safetensors"
            self._rename_shard(index, name)
            weight_map.update(dict.fromkeys(names, name))
        index_json = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self._new("model.safetensors.index.json"), index_json)

    def _rename_shard(self, index: int, name: str) -> None:
        (self._folder / _WITHOUT_NAME.format(index)).rename(self._new(name))

    def _new(self, name: str) -> Path:
        path = self._folder / name
        self._written.append(path)
        return path


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _is_copied(path: Path) -> bool:
    is_index = path.name.endswith(".index.json")
    is_hidden = path.name.startswith(".")
    return not (is_index or is_hidden or path.suffix in _WEIGHT_SUFFIXES or path.name in _NOT_COPIED)
