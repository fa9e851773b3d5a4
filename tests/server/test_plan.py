"""`lmdserve plan`: what it prints, that it needs no torch, and that impossible questions are refused in a sentence."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmdserve.server import cli

SEVEN_B = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "vocab_size": 92544,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    return tmp_path


def _table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """Return the plan's rows by their first column."""
    assert cli.main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in lines if line.startswith("  ")]
    return {row[0]: row[1:] for row in cells}


def test_a_gpu_of_a_given_size_is_planned_without_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _table(capsys, str(folder), "--gpu-memory", "24GiB", "--session-len", "4096", "--max-batch-size", "64")
    assert rows["weights"] == ["4.87 GiB"]
    assert rows["--quant-policy"][-2:] == ["sequences of 4096", "whole process"]
    sequences = {policy: int(rows[policy][4]) for policy in ("0", "8", "4")}
    assert 20 < sequences["0"] < 40
    assert 1.8 < sequences["8"] / sequences["0"] <= 2.0
    assert sequences["4"] == 64  # --max-batch-size
    assert float(rows["4"][-1].split()[0]) < float(rows["0"][-1].split()[0])


def test_the_readme_shows_what_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["plan", str(folder), "--gpu-memory", "24GiB", "--session-len", "4096"]) == 0
    assert capsys.readouterr().out.strip() in (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_a_cap_lowers_the_whole_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _table(capsys, str(folder), "--gpu-memory", "80GiB", "--max-gpu-memory", "12GiB", "--max-batch-size", "256")
    assert all(float(rows[policy][-1].split()[0]) <= 12 for policy in ("0", "8", "4"))


def test_what_does_not_fit_is_said_with_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(folder), "--gpu-memory", "4GiB"]) == 2
    message = capsys.readouterr().err
    for part in ("weights 4.87 GiB", "4.00 GiB may be taken", "lower --max-prefill-token-num (8192)"):
        assert part in message


def test_a_policy_without_a_plan_is_named_below_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(folder), "--gpu-memory", "10GiB", "--session-len", "32768"]) == 0
    printed = capsys.readouterr().out
    assert "no plan: a session of 32768 tokens needs 512 KV blocks" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "24GiB", "--device", "cpu"], "leave one of them out"),
        (["--gpu-memory", "24GiB", "--max-gpu-memory", "32GiB"], "--max-gpu-memory is 32.00 GiB and 24.00 GiB"),
    ],
)
def test_contradictions_are_refused(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_amount_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", str(folder), "--gpu-memory", "24GIBI"])
    assert "'24GIBI' is no amount of memory; write 20GiB, 20GB, 512MiB" in capsys.readouterr().err


def test_a_plan_takes_no_torch_and_little_time(folder: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from lmdserve.server.cli import main; "
        f"sys.exit(main(['plan', {str(folder)!r}, '--gpu-memory', '24GiB']))"
    )
    start_s = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)
    assert time.monotonic() - start_s < 10  # 0.2 s where nothing else runs
