"""What a run has done so far, on disk: one file a finished layer, and what it must match to be gone on with.

Owns the folder `.quantize` in the output folder. A file is complete or not there, so a process may be killed at any
moment.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..api import ConfigError
from ..atomic_write import write_json, write_tensors

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
        write_json(self._folder / _STATE, identity)

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
        write_tensors(self._path(layer), tensors, {"notes": json.dumps(notes)})

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Return a finished layer's tensors."""
        with safe_open(self._path(layer), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary

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
