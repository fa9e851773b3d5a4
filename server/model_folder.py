"""The small JSON files of a checkpoint folder, read with errors that name the file. Owns no meaning of their fields."""

import json
from pathlib import Path
from typing import Any

from lmdserve.engine.api import ConfigError


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in `path`, {} where there is no such file; ConfigError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a JSON {type(value).__name__} where an object belongs; download the model again"
        )
    return value
