"""What a run has done so far, on disk: one file a finished layer, and what it must match to be gone on with.

Owns the folder `.quantize` in the output folder. A file is complete or not there: it is written under another name,
flushed to the disk and renamed, so a process may be killed at any moment.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..api import ConfigError

_FOLDER = ".quantize"
_STATE = "state.json"


class LayerStore:
    """The finished layers of one run."""

    def __init__(self, output: Path) -> None:
        self._folder = output / _FOLDER

    def exists(self) -> bool:
        """Say whether a run was begun here and not finished."""
        return (self._folder / _STATE).is_file()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Start a run; whatever an earlier one left is removed."""
        self.remove()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / _STATE, json.dumps(dict(identity), indent=2).encode())

    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """Return what the run here was begun with that is something else in `identity`; None when nothing is."""
        try:
            known = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._folder} cannot be resumed ({error}); give --overwrite to start anew") from None
        keys = sorted(key for key in {*identity, *known} if identity.get(key) != known.get(key))
        return "; ".join(f"{key} was {known.get(key)!r} and is {identity.get(key)!r}" for key in keys) or None

    def num_finished(self) -> int:
        """Return how many layers from the first on are finished."""
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def save(self, layer: int, tensors: Mapping[str, torch.Tensor], notes: Any) -> None:
        """Store a finished layer's tensors by their names on disk, and `notes`, which JSON can hold."""
        save_atomically(self._path(layer), tensors, {"notes": json.dumps(notes)})

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Return a finished layer's tensors."""
        with safe_open(self._path(layer), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary

    def num_bytes(self, layer: int) -> int:
        """Return what a finished layer takes."""
        return self._path(layer).stat().st_size

    def notes(self, layer: int) -> Any:
        """Return what was noted of a finished layer."""
        with safe_open(self._path(layer), framework="pt") as file:
            return json.loads(file.metadata()["notes"])

    def remove(self) -> None:
        """Remove everything, and the output folder too if there is nothing else in it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05}.safetensors"


def save_atomically(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is complete or not there, whatever happens; OSError when the disk takes no more."""
    temporary = path.with_name(path.name + ".part")
    temporary.touch()
    mode = temporary.stat().st_mode  # safetensors makes files that only their owner reads
    try:
        save_file(dict(tensors), temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    temporary.chmod(mode)
    _commit(temporary, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is complete or not there, whatever happens."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    _commit(temporary, path)


def _commit(temporary: Path, path: Path) -> None:
    """Flush a file to the disk and give it its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
