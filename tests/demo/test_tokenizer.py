"""The shipped tokenizer: lossless, InternLM2's ids at both ends, and blind to a word's surroundings."""

import json
import unicodedata
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import lmdserve.demo
from lmdserve.demo.corpus.dialogue import CONTROL_TOKENS
from lmdserve.demo.tokenizer import JSON_MARKS

TOKENIZER = Tokenizer.from_file(str(Path(lmdserve.demo.__file__).parent / "model" / "tokenizer.json"))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_ids_of_control_tokens(model_folder: Path) -> None:
    size = TOKENIZER.get_vocab_size()
    assert size == json.loads((model_folder / "config.json").read_text())["vocab_size"]
    assert [TOKENIZER.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert [TOKENIZER.token_to_id(token) for token in CONTROL_TOKENS] == list(range(size - 6, size))
    stops = json.loads((model_folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, TOKENIZER.token_to_id("<|im_end|>")]


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(ids(TOKENIZER, text), skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(
    word=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12),
    before=st.sampled_from([" ", '"', '": "', "_", "(", "《", "：", "\n", "-", "/", ", "]),
    after=st.sampled_from([" ", '"', '"}', "_", ")", "》", "，", "\n", ".", '", "', "。"]),
)
def test_a_word_is_cut_the_same_anywhere(word: str, before: str, after: str) -> None:
    parts = [token for part in (before, word, after) for token in ids(TOKENIZER, part)]
    assert ids(TOKENIZER, before + word + after) == parts


def test_json_marks_are_one_token() -> None:
    assert all(len(ids(TOKENIZER, mark)) == 1 for mark in JSON_MARKS)


def test_digits_and_chinese_characters_stand_alone() -> None:
    assert len(ids(TOKENIZER, "20391")) == 5
    common = "狐狸西瓜你好天气"
    assert [len(ids(TOKENIZER, character)) for character in common] == [1] * len(common)
    assert len(ids(TOKENIZER, common)) == len(common)
    rare = unicodedata.lookup("CJK UNIFIED IDEOGRAPH-9F98")
    assert TOKENIZER.decode(ids(TOKENIZER, rare)) == rare
