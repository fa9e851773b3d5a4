"""`lmdserve quantize` as a process: what it prints, how it ends, and that a killed run goes on where it was."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lmdserve.engine.api import ConfigError
from lmdserve.server import quantize_command

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FEW = ("--calib-samples", "4", "--calib-seqlen", "128", "--device", "cpu", "--skip-evaluation")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute as the processes of ENVIRONMENT do: sums depend on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file but the report, which tells times."""
    files = [path for path in folder.iterdir() if path.stem != "report"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def end_in_layer(layer: int, signal_number: int, *arguments: str) -> int:
    """Send the signal as soon as this layer is worked on; return the exit status."""
    command = [sys.executable, "-m", "lmdserve", "quantize", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if json.loads(line)["layer"] == layer)
        process.send_signal(signal_number)
        process.stdout.read()
        return process.wait(30)


def test_a_run_that_is_ended_twice_goes_on_to_the_same_bytes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, one_thread: None
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert quantize_command.lite(["auto_awq", "demo", "--work_dir", str(whole), "--search-scale", "False", *FEW]) == 0
    printed = capsys.readouterr()
    assert f"{whole} is ready" in printed.out
    assert "search layer 8 of 8" in printed.err, "there is no terminal, so progress is lines"

    again = ["demo", "--work-dir", str(parts), "--resume", "--progress", "json", "--no-search-scale", *FEW]
    assert end_in_layer(2, signal.SIGKILL, *again) == -signal.SIGKILL
    assert end_in_layer(5, signal.SIGTERM, *again) == 128 + signal.SIGTERM
    assert [path.name for path in parts.iterdir()] == [".quantize"]
    assert quantize_command.quantize(again) == 0
    lines = json_lines(capsys.readouterr().out)
    assert lines[-1] == {"phase": "done", "output": str(parts), "report": str(parts / "report.json")}
    assert {"phase", "layer", "num_layers", "percent", "seconds_left"} == lines[0].keys()
    percents = [float(str(line["percent"])) for line in lines[:-1]]
    assert percents == sorted(percents)
    assert digests(parts) == digests(whole)


def test_bad_input_is_one_line_of_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    arguments = ["demo", "--work-dir", str(tmp_path / "out"), "--calib-dataset", str(text), "--progress", "json"]
    assert quantize_command.quantize(arguments) == 2
    first, error = json_lines(capsys.readouterr().out)
    assert first["phase"] == "read"
    assert error["phase"] == "error"
    assert "short.txt has" in str(error["message"])
    assert "a window has 2048" in str(error["message"])
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lmdserve.engine.atomic_write.save_file", fill)
    arguments = ["demo", "--work-dir", str(tmp_path / "out"), "--calib-samples", "0", "--skip-evaluation", "--resume"]
    assert quantize_command.quantize(arguments) == 1
    assert "No space left on device (os error 28)); what is done is kept" in capsys.readouterr().err
    assert quantize_command.quantize([*arguments, "--progress", "json"]) == 1
    error = json_lines(capsys.readouterr().out)[-1]
    assert error["phase"] == "error"
    assert "No space left on device" in str(error["message"])


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no local folder"):
        quantize_command.quantize(["./no-such-model", "--progress", "none"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--calib-sample", "3"], "did you mean --calib-samples?"),
        (["demo", "--w-bits", "8"], "'8' is not one of 4"),
        (["demo", "--w-group-size", "48"], "'48' is not one of 32, 64, 128, -1"),
        (["demo", "--trust-remote-code"], "unknown option --trust-remote-code"),
    ],
)
def test_options_that_do_not_exist(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        quantize_command.quantize(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_other_methods_of_lite_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`lmdserve lite` has no 'auto_gptq' \(did you mean auto_awq\?\)"):
        quantize_command.lite(["auto_gptq", "demo"])
