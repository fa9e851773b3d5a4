"""The sampling defaults that a model's makers ship in generation_config.json. Owns no defaults of its own."""

from pathlib import Path

import msgspec

from lmdserve.engine.api import ConfigError

from .model_folder import read_json_object
from .protocol import SamplingFields

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_generation_defaults(folder: Path) -> dict[str, float | int]:
    """Return the sampling values that generation_config.json sets; none where it says `"do_sample": false`.

    With do_sample false the file describes greedy search, and its other values are leftovers that transformers ignores
    too; a server's clients expect sampling unless they ask for temperature 0.
    """
    path = folder / "generation_config.json"
    config = read_json_object(path)
    if config.get("do_sample") is False:
        return {}
    defaults: dict[str, float | int] = {}
    for key in SAMPLING_KEYS:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: {key!r} is {value!r}, which is not a number; correct or remove it")
        defaults[key] = value
    try:
        msgspec.convert(defaults, SamplingFields)  # what a request may not ask for is no default either
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}; correct or remove it") from None
    return defaults
