"""Typed access to a checkpoint's JSON files; every complaint names the file and the key. Owns no meaning of any key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .api import ConfigError


class ConfigKeys:
    """One JSON object with typed access; every complaint names the key and the file."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: {message}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.fail(f"key '{key}' must be an integer, not {value!r}")
        return int(value)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self.fail(f"key '{key}' must be at least 1, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(f"key '{key}' must be a number, not {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"key '{key}' must be true or false, not {value!r}")
        return value

    def section(self, key: str) -> "ConfigKeys | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(f"key '{key}' must be an object or null, not {value!r}")
        return ConfigKeys(value, self.path)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.fail(f"key '{key}' is missing; take config.json from the original checkpoint")
        return default


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; --model needs a folder in Hugging Face layout, with config.json and the weights"
            f"{_what_else_is_there(path.parent)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download the checkpoint again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object; download the checkpoint again")
    return values


def _what_else_is_there(folder: Path) -> str:
    """Return the end of an error about a folder that is no checkpoint, but something that people take for one."""
    if any(folder.glob("*.gguf")):
        return "; GGUF files are not read, so take the checkpoint that they were made from"
    if (folder / "adapter_config.json").is_file():
        return "; adapters are not read, so merge this one into its base model"
    return ""
