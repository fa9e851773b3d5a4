"""Files that are complete or not there, whatever ends their writer: another name, a flush to the disk, a rename."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; OSError when the disk takes no more."""
    part = part_of(path)
    part.touch()
    mode = part.stat().st_mode  # safetensors makes files that only their owner reads
    try:
        save_file(dict(tensors), part, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    part.chmod(mode)
    _commit(part, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read too; OSError when the disk takes no more."""
    part = part_of(path)
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _commit(part, path)


def part_of(path: Path) -> Path:
    """Return where a file lies while it is being written."""
    return path.with_name(path.name + ".part")


def _commit(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
