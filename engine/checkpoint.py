"""Where a model's files are and what tensors they hold: hub names to folders, and weight files to (name, tensor).

Owns the reading of safetensors and of pytorch .bin files (weights only: no pickled code runs). Knows no model.
"""

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .api import ConfigError

_DEMO_NAME = "demo"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_METADATA_PATTERNS = ["*.json", "*.model", "*.jinja", "*.txt"]
_SAFETENSORS_STEM = "model"
_BIN_STEM = "pytorch_model"


def resolve_model_folder(model: str, revision: str | None) -> Path:
    """Return the folder of `demo`, of a local path, or of a hub name: brought up to date, or as cached when offline.

    Raises ConfigError when it is none of these, or when `revision` is given for something without revisions.
    """
    folder = _demo_folder() if model == _DEMO_NAME else Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision {revision} is for hub names, and {model} is a local folder; leave it out")
        return folder
    if model == _DEMO_NAME:
        raise ConfigError(
            f"the demo model is not in this installation ({folder} is missing); install the package again"
        )
    if folder.exists():
        raise ConfigError(f"{model} is a file; --model needs the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(model):
        raise ConfigError(f"{model} is no local folder and no hub name such as internlm/internlm2_5-1_8b-chat")
    return _download(model, revision)


def _demo_folder() -> Path:
    return Path(__file__).parent.parent / "demo" / "model"


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = list_repo_files(name, revision=revision)
        weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_METADATA_PATTERNS, weights]))
    except GatedRepoError:
        reason = "its owner wants you to accept terms on its page; then set HF_TOKEN to your access token"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision}; check --revision"
    except RepositoryNotFoundError:
        reason = "the hub has no such model; check the name, or set HF_TOKEN for a private one"
    except Exception as error:  # any failure of the network or the disk ends the same way for the user
        with suppress(Exception):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        reason = f"the download failed ({_first_line(error)}); check the network, or give a local folder"
    raise ConfigError(f"{name} is no local folder, and it cannot be had from the hub: {reason}")


class Checkpoint:
    """The weight files of one folder, read one tensor at a time in the order they are stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _weight_files(folder)
        self._is_safetensors = self._files[0].suffix == ".safetensors"

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors; no weight is read for it."""
        names: list[str] = []
        for file in self._files:
            names.extend(self._open_safetensors(file).keys() if self._is_safetensors else _load_bin(file))
        return names

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor once, memory-mapped from its file."""
        for file in self._files:
            if self._is_safetensors:
                opened = self._open_safetensors(file)
                for name in opened.offset_keys():
                    yield name, opened.get_tensor(name)
            else:
                yield from _load_bin(file).items()

    def _open_safetensors(self, file: Path) -> Any:  # safe_open has no annotations
        try:
            return safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} cannot be read ({_first_line(error)}); download the checkpoint again") from None


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
        raise ConfigError(
            f"{file} cannot be read as tensors only ({_first_line(error)}); convert it to safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{file} holds no dictionary of tensors; convert it to safetensors")
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
