"""Text to calibrate with: files, named data sets from local copies, and which windows a seed gives.

A token is a character here, so that what a window holds can be read. Windows are compared with the loops that LMDeploy
and GPTQ publish, written out below from their description.
"""

import builtins
import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize.text import (
    BUILTIN,
    TokenSource,
    TokenStream,
    calibration_windows,
    evaluation_windows,
    held_out_text,
    read_text,
)

BOS = 1


def encode(text: str) -> list[int]:
    return [BOS, *map(ord, text)]


def encode_chat(messages: list[dict[str, Any]]) -> list[int]:
    return [2, *map(ord, "|".join(f"{message['role']}:{message['content']}" for message in messages))]


def read(source: str | Path, **options: Any) -> TokenSource:
    defaults: dict[str, Any] = {"data_dir": None, "split": "calibration", "encode": encode, "encode_chat": encode_chat}
    return read_text(str(source), **(defaults | options))


def text_of(token_ids: Any) -> str:
    return "".join("^" if token_id == BOS else chr(token_id) for token_id in token_ids)


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- files ---


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n二\n", encoding="utf-8")
    assert text_of(read(tmp_path / "a.txt").stream()) == "^One.\n二\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_rows_are_joined_by_a_blank_line_and_encoded_as_one_text(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"text": "one"}, {"content": "two", "text": None}, "three"])
    assert text_of(read(path).stream()) == "^one\n\ntwo\n\nthree"


def test_json_may_be_one_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(' [{"text": "one"}, "two"]')
    assert text_of(read(tmp_path / "a.json").stream()) == "^one\n\ntwo"


def test_chats_go_through_the_models_template(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}
    path = write_rows(tmp_path / "chat.jsonl", [{"text": "one"}, {"text": "two"}, chat, {"text": "three"}])
    assert text_of(read(path).stream()) == "^one\n\ntwo\x02user:Hi|assistant:Yes?^three"
    with pytest.raises(ConfigError, match="no chat template"):
        read(path, encode_chat=None)


def test_a_folder_is_all_its_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    write_rows(tmp_path / "a.jsonl", ["first"])
    (tmp_path / "weights.bin").write_bytes(b"\0\xff")
    assert text_of(read(tmp_path).stream()) == "^first\n\nsecond"


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"label": 3}\n', "line 2 has no text"),
        ("a.jsonl", b'{"messages": []}\n', "line 1 has no text"),
        ("a.json", b'[{"text": "one"}, 3]', "row 2 has no text"),
        ("a.txt", b"caf\xe9", "no UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "no UTF-8"),
        ("a.json.gz", b"not gzip", "cannot be read"),
        ("a.json.gz", gzip.compress(b'"one"' * 99)[:-9], "cannot be read"),
        ("a.jsonl.zst", b"", "unpack it first"),
        ("a.pdf", b"", "known are .txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_a_source_that_is_nothing_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wikitext2, c4, ptb, ptb_new, pileval .* builtin"):
        read("wikitext-103")
    with pytest.raises(ConfigError, match="no text files"):
        read(tmp_path)


def test_parquet_needs_a_reader_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real_import = builtins.__import__

    def without_pyarrow(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"label": [0, 1], "text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert text_of(read(tmp_path / "a.parquet").stream()) == "^one\n\ntwo"
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="as parquet"):
        read(tmp_path / "b.parquet")


# --- windows ---

LETTERS = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz", k=5000))


def test_windows_of_a_stream_are_those_of_the_published_loop() -> None:
    token_ids = encode(LETTERS)
    random.seed(11)
    starts = [random.randint(0, len(token_ids) - 64) for _ in range(20)]
    expected = torch.tensor([token_ids[start : start + 64] for start in starts])
    assert torch.equal(calibration_windows(TokenStream("x", token_ids), num_samples=20, seqlen=64, seed=11), expected)


def test_the_seed_decides_which_windows() -> None:
    source = TokenStream("x", encode(LETTERS))
    one, again, two = (calibration_windows(source, num_samples=4, seqlen=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_a_window_may_be_the_whole_text_and_no_more() -> None:
    source = TokenStream("short.txt", list(range(10)))
    assert calibration_windows(source, num_samples=2, seqlen=10, seed=0).tolist() == [list(range(10))] * 2
    with pytest.raises(ConfigError, match=r"short.txt has 10 tokens and a window has 11"):
        calibration_windows(source, num_samples=2, seqlen=11, seed=0)


def test_evaluation_cuts_the_text_without_overlap() -> None:
    source = TokenStream("x", list(range(103)))
    assert evaluation_windows(source, seqlen=10, max_tokens=None).tolist() == torch.arange(100).view(10, 10).tolist()
    assert evaluation_windows(source, seqlen=10, max_tokens=25).tolist() == torch.arange(20).view(2, 10).tolist()
    with pytest.raises(ConfigError, match=r"103 tokens to evaluate and a window has 104"):
        evaluation_windows(source, seqlen=104, max_tokens=None)
    with pytest.raises(ConfigError, match=r"9 tokens to evaluate and a window has 10"):
        evaluation_windows(source, seqlen=10, max_tokens=9)


# --- named data sets ---

WIKI_ROWS = ["", " = Valkyria = \n", "", " It was released in 2011 . \n", ""]


@pytest.mark.parametrize(
    "place",
    [
        "data/train.jsonl",
        "data/wikitext2/train-00000-of-00001.jsonl",
        "data/wikitext2/wikitext-2-raw-v1/train.jsonl.gz",
        "data/datasets--Salesforce--wikitext/snapshots/b08601e/wikitext-2-raw-v1/train-00000-of-00001.jsonl",
        "data/hub/datasets--wikitext/snapshots/b08601e/wikitext-2-raw-v1/train.jsonl",
        "hub/datasets--Salesforce--wikitext/snapshots/b08601e/wikitext-2-raw-v1/train-00000-of-00001.jsonl",
    ],
)
def test_a_local_copy_is_found_in_every_usual_place(tmp_path: Path, place: str) -> None:
    write_rows(tmp_path / place, [{"text": row} for row in WIKI_ROWS])
    data_dir = tmp_path / "data" if place.startswith("data") else None
    assert text_of(read("wikitext2", data_dir=data_dir).stream()) == "^" + "\n\n".join(WIKI_ROWS)


def test_wikitext_is_the_small_raw_one_and_its_splits_are_told_apart(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "datasets--wikitext" / "snapshots" / "0"
    for folder in ("wikitext-103-raw-v1", "wikitext-2-v1", "wikitext-2-raw-v1"):
        for split in ("train", "validation", "test"):
            write_rows(snapshot / folder / f"{split}-00000-of-00001.jsonl", [{"text": f"{folder} {split}"}])
    assert text_of(read("wikitext2").stream()) == "^wikitext-2-raw-v1 train"
    assert text_of(read("wikitext2", split="evaluation").stream()) == "^wikitext-2-raw-v1 test"
    shutil.rmtree(snapshot / "wikitext-2-raw-v1")
    with pytest.raises(ConfigError, match="no local copy of wikitext2"):
        read("wikitext2")


def test_wikitexts_raw_file_gives_the_rows_that_the_hub_publishes(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.raw").write_text(" \n = Valkyria = \n \n It was\u2028released in 2011 . \n \n", "utf-8")
    expected = ["", " = Valkyria = \n", "", " It was\u2028released in 2011 . \n", ""]
    assert text_of(read("wikitext2", data_dir=tmp_path).stream()) == "^" + "\n\n".join(expected)


def test_ptb_joins_its_sentences_in_two_ways(tmp_path: Path) -> None:
    (tmp_path / "ptb.train.txt").write_text(" aer banknote \n no it was n't \n")
    (tmp_path / "ptb.valid.txt").write_text(" consumers may \n want to \n")
    write_rows(tmp_path / "test.jsonl", [{"sentence": "one"}, {"sentence": "two"}])
    assert text_of(read("ptb", data_dir=tmp_path).stream()) == "^aer banknote\n\nno it was n't"
    assert text_of(read("ptb_new", data_dir=tmp_path).stream()) == "^aer banknote no it was n't"
    assert text_of(read("ptb", data_dir=tmp_path, split="evaluation").stream()) == "^consumers may\n\nwant to"
    assert text_of(read("ptb_new", data_dir=tmp_path, split="evaluation").stream()) == "^one two"


def c4_rows() -> list[str]:
    source = random.Random(5)
    return [LETTERS[: source.randint(20, 200)] + str(number) for number in range(200)]


def test_c4_draws_documents_until_one_is_long_enough(tmp_path: Path) -> None:
    rows = c4_rows()
    write_rows(tmp_path / "c4" / "en" / "c4-train.00000-of-01024.json.gz", [{"text": row, "url": "-"} for row in rows])
    random.seed(7)
    expected = []
    for _ in range(16):
        while True:
            token_ids = encode(rows[random.randint(0, len(rows) - 1)])
            if len(token_ids) >= 128:
                break
        start = random.randint(0, len(token_ids) - 128)
        expected.append(token_ids[start : start + 128])
    source = read("c4", data_dir=tmp_path)
    assert calibration_windows(source, num_samples=16, seqlen=128, seed=7).tolist() == expected
    with pytest.raises(ConfigError, match="none of the 200 documents of c4 has 999 tokens"):
        calibration_windows(source, num_samples=1, seqlen=999, seed=7)


def test_c4_is_evaluated_on_its_first_1100_validation_documents(tmp_path: Path) -> None:
    write_rows(tmp_path / "c4-validation.00000-of-00008.json.gz", [{"text": str(number)} for number in range(1200)])
    expected = "^" + " ".join(map(str, range(1100)))
    assert text_of(read("c4", data_dir=tmp_path, split="evaluation").stream()) == expected


def test_pileval_is_cut_from_shuffled_short_documents(tmp_path: Path) -> None:
    rows = [f" {number:03}" + "x" * random.Random(number).choice((10, 50, 700)) + "\n" for number in range(100)]
    write_rows(tmp_path / "val.jsonl", [{"text": row, "meta": {}} for row in rows])
    source = read("pileval", data_dir=tmp_path)
    windows = calibration_windows(source, num_samples=10, seqlen=128, seed=0)
    seen = text_of(windows.flatten().tolist()).split("^")[1:]
    whole = seen[:-1]  # the last is cut
    assert "".join("^" + text for text in seen) == text_of(windows.flatten().tolist())
    assert all(" " not in text and "\n" not in text and len(text) <= 511 for text in seen)
    assert set(whole) <= {row.strip() for row in rows}
    assert len(whole) == len(set(whole)) > 10
    assert whole != sorted(whole)
    with pytest.raises(ConfigError, match=r"have \d+ tokens and 99 windows of 128 need 12672"):
        calibration_windows(source, num_samples=99, seqlen=128, seed=0)
    with pytest.raises(ConfigError, match="no part to evaluate"):
        read("pileval", data_dir=tmp_path, split="evaluation")


def test_a_copy_of_another_data_set_is_not_taken(tmp_path: Path) -> None:
    write_rows(tmp_path / "wikitext2" / "train.jsonl", [{"text": "one"}])
    with pytest.raises(ConfigError, match=r"no local copy of ptb .* looked in"):
        read("ptb", data_dir=tmp_path)


def test_without_a_copy_nothing_is_downloaded_and_it_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no local copy of c4 .* Nothing is downloaded") as caught:
        read("c4")
    assert str(tmp_path / "hub") in str(caught.value)
    with pytest.raises(ConfigError, match="is no folder"):
        read("c4", data_dir=tmp_path / "absent")


# --- the text in the package ---


def test_the_text_in_the_package_is_varied_and_its_parts_differ() -> None:
    calibration, evaluation = (text_of(read(BUILTIN, split=split).stream()) for split in ("calibration", "evaluation"))
    for text in (calibration, evaluation):
        num_chinese_bytes = 3 * sum("\u4e00" <= letter <= "\u9fff" for letter in text)
        assert 0.15 < num_chinese_bytes / len(text.encode()) < 0.6
        assert "def " in text
        assert "user:" in text
    parts = {evaluation[start : start + 80] for start in range(0, len(evaluation) - 80, 500)}
    assert not any(part in calibration for part in parts)
    assert len(calibration.encode()) > 80_000


def test_a_base_model_gets_the_texts_in_the_package_without_the_chats() -> None:
    token_ids = read(BUILTIN, encode_chat=None).stream()
    assert 2 not in token_ids
    assert len(token_ids) > 20_000


def test_what_is_measured_on_was_not_calibrated_on() -> None:
    assert held_out_text("wikitext2") == "wikitext2"
    assert held_out_text("pileval") == held_out_text("/data/mine.txt") == held_out_text(BUILTIN) == BUILTIN
