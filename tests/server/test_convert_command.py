"""The command `lmdserve convert`, from a quantized checkpoint to one that is served; errors are one sentence."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lmdserve.server.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random AWQ checkpoint with a tokenizer."""
    spec = spec_from_file_location("random_model", ROOT / "benchmarks" / "random_model.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("models") / "tiny-awq"
    script.write_model(script.SHAPES["tiny"], "awq", folder)
    return folder


def test_a_converted_checkpoint_has_all_that_serving_needs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiny-gptq"
    assert main(["convert", str(model), str(output), "--to", "gptq"]) == 0
    assert capsys.readouterr().out == f"{output}: gptq, 10 linears converted, 0.00 GB; lmdserve --model {output}\n"
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    copied = {path.name for path in model.iterdir() if path.suffix == ".json"} - {"model.safetensors.index.json"}
    assert {path.name for path in output.iterdir()} == copied | {"model.safetensors"}
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert "model.layers.1.attention.wqkv.g_idx" in file.keys()  # noqa: SIM118, no dictionary
    assert main(["plan", str(output), "--gpu-memory", "4GiB"]) == 0
    assert "gptq weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["SRC", "OUT"], "--to is missing"),
        (["SRC", "OUT", "--to", "fp8"], "'fp8' is not one of awq, gptq, compressed-tensors, hf"),
        (["SRC", "SRC", "--to", "gptq"], "no empty folder"),
        (["SRC", "OUT", "--to", "gptq", "--dtype", "float16"], "leave it out"),
        (["/nowhere/at/all", "OUT", "--to", "gptq"], "no local folder and no hub name"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], complaint: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SRC": str(model), "OUT": str(tmp_path / "out")}
    try:
        status = main(["convert", *(places.get(argument, argument) for argument in arguments)])
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
