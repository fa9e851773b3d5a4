"""The command `lmdserve evaluate`: one checkpoint alone, two compared, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import to_builtins

import lmdserve
from lmdserve.engine.quantize.evaluate_options import KVBits
from lmdserve.engine.quantize.evaluation import evaluate
from lmdserve.engine.quantize.text import TokenStream, evaluation_windows
from lmdserve.server.cli import main
from lmdserve.server.text import Tokenizer

DEMO = Path(lmdserve.__file__).parent / "demo" / "model"
TEXT = "The server reads the whole text, and cuts it into windows. 服务器把文字切成窗口。\n" * 20
SMALL = ("--window-tokens", "64", "--max-tokens", "256", "--device", "cpu")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """The demo model under another name, its files linked: a test that changes one writes it anew."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in DEMO.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Replace a link to a JSON file by a file of its own with this change."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.unlink()
    path.write_text(json.dumps(value), encoding="utf-8")


def swap_two_words(tokenizer: Any) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["server"], vocab["the"] = vocab["the"], vocab["server"]


def test_one_model_alone(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "demo", "--text", str(text_file), "--kv-bits", "16,4", "--json", *SMALL]) == 0
    shown = json.loads(capsys.readouterr().out)
    token_ids = Tokenizer.load(DEMO).encode(TEXT, add_bos=True)
    windows = evaluation_windows(TokenStream("text", token_ids), seqlen=64, max_tokens=256)
    expected = evaluate(DEMO, windows, device=torch.device("cpu"), kv_policies=(0, 4))
    assert (shown["text"], shown["num_tokens"], shown["window_tokens"]) == (str(text_file), 256, 64)
    assert shown["rows"] == [{"model": "model"} | to_builtins(row) for row in expected]
    assert [(row["kv_bits"], row["kl_divergence"]) for row in shown["rows"]] == [(16, None), (4, None)]
    assert all(math.isfinite(row["perplexity"]) for row in shown["rows"])


def test_two_models_as_a_table(text_file: Path, other_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(other_model), "--against", "demo", "--text", str(text_file), "--kv-bits", "16,8"]
    assert main([*arguments, *SMALL]) == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == f"256 tokens of {text_file}, in windows of 64:"
    assert head.split("  ")[0] == "model"
    assert [row.split()[:3] for row in rows] == [
        [name, "16-bit", bits] for name in ("model", "other") for bits in ("16", "8")
    ]
    assert rows[0].split()[4:] == rows[2].split()[4:]
    assert rows[0].split()[4:] == ["+0.00%", "±", "0.00%", "0.00e+00", "±", "0e+00", "100.00%"]
    assert rows[1].split()[3:] == rows[3].split()[3:]
    assert float(rows[1].split()[7]) > 0


def test_the_text_in_the_package_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "demo", "--kv-bits", "16", *SMALL]) == 0
    assert capsys.readouterr().out.startswith("256 tokens of builtin, in windows of 64:")


def test_models_of_other_tokens_are_not_compared(
    text_file: Path, other_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "demo", "--against", str(other_model), "--text", str(text_file), *SMALL]
    rewrite(other_model / "tokenizer.json", swap_two_words)
    assert main(arguments) == 2
    assert "turn this text into different tokens" in capsys.readouterr().err
    rewrite(other_model / "config.json", lambda config: config.update(vocab_size=3329))
    assert main(arguments) == 2
    assert "only models of one vocabulary can be compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["/nowhere/at/all"], "no local folder and no hub name"),
        (["demo", "--against", "/nowhere/at/all"], "no local folder and no hub name"),
        (["demo", "--text", "wikitext2"], "no local copy of wikitext2"),
        (["demo", "--text", "wikitext3"], "neither a file nor a data set"),
        (["demo", "--window-tokens", "99999999"], "give more text"),
        (["demo", "--window-tokens", "5000"], "model's context 4096"),
        (["demo", "--max-tokens", "1"], "give 2 or more"),
        (["demo", "--kv-bits", "16,3"], "'16,3' is no list of KV bits"),
        (["demo", "--dtype", "int8"], "'int8' is not one of"),
        (["demo", "--agianst", "demo"], "did you mean --against?"),
        ([], "required: A"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    try:
        status = main(["evaluate", *arguments, "--device", "cpu"])
    except SystemExit as error:
        status = int(error.code or 0)
    shown = capsys.readouterr()
    assert status == 2
    assert complaint in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_kv_bits_are_read_and_shown() -> None:
    assert KVBits("8, 16,4,8") == (8, 0, 4)
    assert str(KVBits("16,8,4")) == "16,8,4"
    for text in ("", "16;8", "2", "int8"):
        with pytest.raises(ValueError, match="no list of KV bits"):
            KVBits(text)
