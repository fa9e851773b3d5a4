"""The files of a checkpoint folder's text side: which tokenizer counts, and the small JSON files, read with errors that
name the file. Owns no meaning of their fields.
"""

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


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer file that counts; ConfigError where there is none."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"{folder} has neither a tokenizer.json nor a tokenizer.model; "
        "copy the model's tokenizer files there, or give a folder that has them"
    )
