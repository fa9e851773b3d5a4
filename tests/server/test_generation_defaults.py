"""generation_config.json: what counts, what does not, what is an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmdserve.engine.api import ConfigError
from lmdserve.server.generation_defaults import load_generation_defaults


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": [2, 92542], "max_length": 20}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}),
        ({"repetition_penalty": 1.05, "min_p": 0, "top_k": None}, {"repetition_penalty": 1.05, "min_p": 0}),
        ({"do_sample": False, "temperature": 0.7}, {}),
    ],
)
def test_defaults(tmp_path: Path, config: dict[str, Any], expected: dict[str, float]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert load_generation_defaults(tmp_path) == expected


def test_no_file(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path) == {}


@pytest.mark.parametrize("value", ["0.7", True, [1]])
def test_a_value_that_is_no_number(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(ConfigError, match=r"'temperature'.*not a number"):
        load_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -5), ("top_p", 7.0), ("top_k", 1.5), ("repetition_penalty", 0)]
)
def test_a_value_that_no_request_may_have(tmp_path: Path, key: str, value: float) -> None:
    """The server started, and every request got a 400 about a field that it did not have."""
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: Expected .*{key}.*correct or remove it"):
        load_generation_defaults(tmp_path)
