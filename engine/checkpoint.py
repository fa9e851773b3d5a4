"""The weight files of a checkpoint folder: which they are, and their tensors by name.

Owns the reading of safetensors and of pytorch .bin files (weights only: no pickled code runs). Knows no model.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .api import ConfigError
from .shard_reader import read_to_device, stored_tensors

_SAFETENSORS_STEM = "model"
_BIN_STEM = "pytorch_model"
_LFS_MARK = b"version https://git-lfs"  # what a clone without git-lfs has in place of large files


class Checkpoint:
    """The weight files of one folder, read one tensor at a time in the order they are stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _weight_files(folder)
        self._is_safetensors = self._files[0].suffix == ".safetensors"

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors; no weight is read for it."""
        return list(self._file_of)

    def read(self, name: str) -> torch.Tensor | None:
        """Return one tensor on the CPU; None when there is none of this name."""
        file = self._file_of.get(name)
        if file is None:
            return None
        opened = self._opened[file]
        tensor: torch.Tensor = opened.get_tensor(name) if self._is_safetensors else opened[name]
        return tensor

    def tensors(self, device: torch.device, *, into: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor once: on a GPU where it is going to be used, else memory-mapped from its file.

        What is read to a GPU goes straight to the tensor of its name in `into` where that has its shape and type.
        """
        if self._is_safetensors and device.type == "cuda":
            yield from read_to_device([tensor for file in self._files for tensor in stored_tensors(file)], device, into)
            return
        for opened in self._opened.values():
            if self._is_safetensors:
                for name in opened.offset_keys():
                    yield name, opened.get_tensor(name)
            else:
                yield from opened.items()

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        """Every file, as safetensors' handle or as the dictionary of a .bin."""
        return {file: self._open_safetensors(file) if self._is_safetensors else _load_bin(file) for file in self._files}

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        return {name: file for file, opened in self._opened.items() for name in opened.keys()}  # noqa: SIM118, a handle

    def _open_safetensors(self, file: Path) -> Any:  # safe_open has no annotations
        try:
            return safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error, "download the checkpoint again") from None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files to read, safetensors before .bin, sharded (by their index) or single."""
    for stem, suffix in ((_SAFETENSORS_STEM, ".safetensors"), (_BIN_STEM, ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed_files(index)
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    raise ConfigError(
        f"{folder} holds no weights: expected {_SAFETENSORS_STEM}.safetensors or {_BIN_STEM}.bin, "
        "or their .index.json with its shards; download the checkpoint again"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [index.parent / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not a weight index ({error!r}); download the checkpoint again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        listed = ", ".join(missing[:3]) or "any file"
        raise ConfigError(f"{index.parent} lacks {len(missing)} shards of its index ({listed}); download them again")
    return files


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise _unreadable(file, error, "convert it to safetensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{file} holds no dictionary of tensors; convert it to safetensors")
    return tensors


def _unreadable(file: Path, error: Exception, advice: str) -> ConfigError:
    if not isinstance(error, OSError) and _starts_with(file, _LFS_MARK):
        return ConfigError(f"{file} is a pointer of git-lfs, not the weights; run `git lfs pull` in its folder")
    return ConfigError(f"{file} cannot be read as tensors ({_first_line(error)}); {advice}")


def _starts_with(file: Path, mark: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
