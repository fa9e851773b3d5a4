"""The tokenizer and the streaming decoder: exact ids, no forged control tokens, and text that never depends on chunks.

References: recorded ids of InternLM2's tokenizer, and the `tokenizers` library on the same files.
"""

import json
import random
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdserve.engine.api import ConfigError
from lmdserve.server.text import IncrementalDecoder, TextTooLongError, Tokenizer
from lmdserve.tools.api import ControlToken

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA2 = ["<s>", "</s>"]
WriteTokenizer = Callable[..., Path]


@pytest.fixture(scope="module")
def recorded(shared_fixtures: Path) -> dict[str, Any]:
    return json.loads((shared_fixtures / "internlm2_token_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["byte_level", "prefix_everywhere", "prefix_first"])
def folder(request: pytest.FixtureRequest, write_tokenizer_json: WriteTokenizer) -> Path:
    """A tokenizer of each kind, with control tokens that are special, not special, and fond of white space."""
    greedy = tokenizers.AddedToken("<|end|>", special=True, rstrip=True)
    visible = tokenizers.AddedToken("<tool_call>", special=False, normalized=False)
    return write_tokenizer_json(
        request.param, [*LLAMA2, *CHATML, greedy, visible], tokenizer_config={"eos_token": "</s>"}
    )


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _texts(control_tokens: list[str], seed: int) -> list[str]:
    source = random.Random(seed)
    fragments = [
        *control_tokens,
        " ",
        "\n",
        "the end",
        "The  fox ",
        "狐狸",
        "é",
        "<|",
        "|>",
        "im_end",
        "\u0301",
        "\x00",
    ]
    return ["".join(source.choices(fragments, k=source.randint(1, 12))) for _ in range(400)]


# --- InternLM2's real vocabulary against recorded ids ---


def test_internlm2_plain_texts(internlm2_tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    for row in recorded["plain"]:
        assert internlm2_tokenizer.encode(row["text"]) == row["ids"], row["name"]
        assert internlm2_tokenizer.decode(row["ids"]) == row["decoded"], row["name"]


def test_internlm2_chats(internlm2_tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    for row in recorded["chat"]:
        segments = internlm2_tokenizer.split_control(row["text"])
        assert internlm2_tokenizer.encode_segments(segments) == row["ids"], row["name"]
        assert internlm2_tokenizer.decode(row["ids"], keep_control=True) == row["text"], row["name"]


def test_internlm2_forged_control_tokens(internlm2_tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    """The pieces that became control tokens are still spelt [UNUSED_TOKEN_141..146] in the file; SentencePiece itself
    turns that text into them."""
    for row in recorded["forged_control_tokens"]:
        assert internlm2_tokenizer.encode(row["text"]) == row["transformers_5_autotokenizer_ids"]
    for text in recorded["special_tokens"]:
        assert set(internlm2_tokenizer.encode(f"a{text}b")).isdisjoint(recorded["special_tokens"].values())


def test_internlm2_control_tokens(internlm2_tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    assert dict(internlm2_tokenizer.control_tokens) == recorded["special_tokens"]
    assert internlm2_tokenizer.vocab_size == 92544
    assert internlm2_tokenizer.bos_token_id == 1
    assert internlm2_tokenizer.eos_token_ids == {2}
    assert internlm2_tokenizer.encode("Hello", add_bos=True) == [1, 9843]


def test_internlm2_nul(internlm2_tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    row = recorded["nul_character"]
    ids = internlm2_tokenizer.encode(row["text"])
    assert ids == row["ids_by_version"]["tokenizers / transformers 5.23 AutoTokenizer"]
    assert internlm2_tokenizer.decode(ids) == row["text"]


def test_internlm2_broken_characters(internlm2_tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    row = recorded["byte_fallback_stream"]
    for num_tokens, expected in enumerate(row["prefix_decodes"], start=1):
        assert internlm2_tokenizer.decode(row["ids"][:num_tokens]) == expected


def test_internlm2_names_from_the_configuration_win(shared_fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(shared_fixtures / "tokenizer_internlm2.model")
    record = {"content": "<|turn|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"92543": record}}))
    control_tokens = Tokenizer.load(tmp_path).control_tokens
    assert control_tokens["<|turn|>"] == 92543
    assert control_tokens["<|im_end|>"] == 92542
    assert "<|im_start|>" not in control_tokens


# --- every kind of tokenizer.json against the library on the same file ---


def test_a_template_text_gets_the_ids_the_library_gives(folder: Path, tokenizer: Tokenizer) -> None:
    """Here control tokens are meant, so the library may find them in the text itself."""
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in _texts([*LLAMA2, *CHATML, "<|end|>", "<tool_call>"], seed=1):
        ids = tokenizer.encode_segments(tokenizer.split_control(text))
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)


def test_plain_text_gets_the_ids_of_a_library_without_control_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    reference = tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": [], "post_processor": None}))
    for text in _texts([*LLAMA2, *CHATML, "<|end|>", "<tool_call>"], seed=2):
        assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)


def test_decodes_as_the_library(folder: Path, tokenizer: Tokenizer) -> None:
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in _texts(["<tool_call>"], seed=3):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


def test_decodes_random_bytes_as_the_library(write_tokenizer_json: WriteTokenizer) -> None:
    """Byte-level vocabularies show one U+FFFD for each maximal broken run, as the library does."""
    folder = write_tokenizer_json("byte_level", CHATML)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.control_tokens.values()]
    source = random.Random(4)
    for _ in range(2000):
        ids = source.choices(ordinary, k=source.randint(1, 12))
        assert tokenizer.decode(ids) == reference.decode(ids), ids


# --- control tokens ---


def test_no_text_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    control_ids = set(tokenizer.control_tokens.values())
    for text in _texts(list(tokenizer.control_tokens), seed=5):
        ids = tokenizer.encode(text)
        assert control_ids.isdisjoint(ids), repr(text)


def test_a_segmentation_that_takes_whole_words_cannot_forge_either(tmp_path: Path) -> None:
    """A unigram model prefers any vocabulary entry, and `<|im_end|>` is one of them."""
    pieces = [("<unk>", 0.0), *((character, -5.0) for character in "abi<|>_mend"), ("<|im_end|>", -1.0)]
    pipeline = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    pipeline.decoder = tokenizers.decoders.Metaspace()
    pipeline.add_special_tokens(["<unk>", "<|im_end|>"])
    pipeline.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("<|im_end|>", "a<|im_end|><|im_end|>b", "?<|im_end|>?"):
        ids = tokenizer.encode(text)
        assert tokenizer.control_tokens["<|im_end|>"] not in ids
        if "?" not in text:
            assert tokenizer.decode(ids) == text


def test_markup_is_control_even_if_not_special(tokenizer: Tokenizer) -> None:
    """Qwen's <tool_call> is an ordinary added token: only a template may write it, but readers see it in answers."""
    token_id = tokenizer.control_tokens["<tool_call>"]
    assert tokenizer.split_control("a<tool_call>b") == ["a", "<tool_call>", "b"]
    assert tokenizer.decode([token_id]) == "<tool_call>"
    assert tokenizer.special_token(token_id) is None


def test_split_control_finds_the_longest_and_keeps_ids(write_tokenizer_json: WriteTokenizer) -> None:
    tokenizer = Tokenizer.load(write_tokenizer_json("byte_level", ["<|a", "<|a|>"]))
    segments = tokenizer.split_control("x<|a|><|a y")
    assert segments == ["x", "<|a|>", "<|a", " y"]
    assert [segment.token_id for segment in segments if isinstance(segment, ControlToken)] == [
        tokenizer.control_tokens["<|a|>"],
        tokenizer.control_tokens["<|a"],
    ]
    assert tokenizer.split_control("") == []


def test_without_control_tokens_everything_is_text(write_tokenizer_json: WriteTokenizer) -> None:
    tokenizer = Tokenizer.load(write_tokenizer_json("byte_level", []))
    assert tokenizer.split_control("<|im_end|>") == ["<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"


def test_lone_surrogates_are_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_encoding_a_long_text_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    """The library's `encode` holds the GIL: 1 MB of text kept every stream waiting for most of a second."""
    text = "The quick brown fox jumps over the lazy dog. " * 8000
    ticks = 0
    is_over = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not is_over.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = ticks
    tokenizer.encode(text)
    during = ticks - before
    is_over.set()
    ticker.join()
    assert during >= 5  # with the GIL held, 0 or 1


def test_text_that_cannot_fit_is_not_encoded(tokenizer: Tokenizer) -> None:
    longest = max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
    assert tokenizer.encode("a" * 3 * longest, max_tokens=3)
    with pytest.raises(TextTooLongError) as refusal:
        tokenizer.encode("a" * (3 * longest + 1), max_tokens=3)
    assert refusal.value.num_chars == 3 * longest + 1
    with pytest.raises(TextTooLongError):
        tokenizer.encode_segments(["a" * 3 * longest, "a"], max_tokens=3)


# --- single tokens ---


def test_token_bytes_concatenate_to_the_text(internlm2_tokenizer: Tokenizer) -> None:
    text = "狐狸 👩‍👩‍👧 naïve\n"
    ids = internlm2_tokenizer.encode(text)
    assert b"".join(internlm2_tokenizer.token_bytes(i) for i in ids).decode() == text
    assert internlm2_tokenizer.token_text(ids[0]) == "狐狸"
    assert internlm2_tokenizer.token_bytes(3) == b"\x00"
    assert internlm2_tokenizer.token_text(92542) == "<|im_end|>"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_beyond_the_vocabulary_are_empty(tokenizer: Tokenizer, token_id: int) -> None:
    """Models pad their vocabulary, and random weights do choose padding."""
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([token_id]) == ""


# --- BOS and EOS ---


@pytest.mark.parametrize(
    ("config", "control_tokens", "expected_bos"),
    [
        ({}, ["<s>"], [0]),  # the file's own post-processor adds it
        ({"bos_token": "<s>", "add_bos_token": False}, ["<s>"], []),
        ({"bos_token": "<b>"}, ["<b>"], []),  # named, but not put before a text
        ({"bos_token": {"content": "<b>"}, "add_bos_token": True}, ["<b>"], [0]),
        ({"bos_token": None}, ["<|endoftext|>"], []),
    ],
)
def test_add_bos_does_what_the_model_expects(
    write_tokenizer_json: WriteTokenizer, config: dict[str, Any], control_tokens: list[str], expected_bos: list[int]
) -> None:
    tokenizer = Tokenizer.load(write_tokenizer_json("byte_level", control_tokens, tokenizer_config=config))
    expected = [tokenizer.bos_token_id for _ in expected_bos]
    assert None not in expected
    assert tokenizer.encode("fox", add_bos=True) == expected + tokenizer.encode("fox")


def test_eos_ids_are_those_of_all_files(write_tokenizer_json: WriteTokenizer) -> None:
    tokenizer = Tokenizer.load(
        write_tokenizer_json(
            "byte_level",
            CHATML,
            tokenizer_config={"eos_token": "<|im_end|>"},
            config={"eos_token_id": 6},
            generation_config={"eos_token_id": [7, 8]},
        )
    )
    assert tokenizer.eos_token_ids == {tokenizer.control_tokens["<|im_end|>"], 6, 7, 8}


def test_a_token_named_by_the_configuration_is_control(write_tokenizer_json: WriteTokenizer) -> None:
    """Some files list no added tokens at all; the end of sequence must not be typed all the same."""
    folder = write_tokenizer_json("prefix_first", [], tokenizer_config={"eos_token": "the"})
    tokenizer = Tokenizer.load(folder)
    assert set(tokenizer.control_tokens) == {"the"}
    assert tokenizer.control_tokens["the"] in tokenizer.eos_token_ids


# --- the streaming decoder ---


def _stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str | ControlToken]:
    decoder = IncrementalDecoder(tokenizer)
    bounds = [0, *sorted(cuts), len(ids)]
    pieces = [piece for start, end in pairwise(bounds) for piece in decoder.feed(ids[start:end])]
    tail = decoder.flush()
    return [*pieces, tail] if tail else pieces


def _merged(pieces: list[str | ControlToken]) -> list[str]:
    """Join neighbouring text, so that streams cut in different places compare equal."""
    merged: list[str] = []
    for piece in pieces:
        if merged and not isinstance(piece, ControlToken) and not isinstance(merged[-1], ControlToken):
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_stream_is_the_same_however_it_is_cut(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=40))
    pieces = _stream(tokenizer, ids, cuts)
    assert "" not in pieces
    assert _merged(pieces) == _merged(_stream(tokenizer, ids, []))
    assert "".join(pieces) == tokenizer.decode(ids, keep_control=True)
    assert "".join(p for p in pieces if not isinstance(p, ControlToken)) == tokenizer.decode(ids)
    decoder = IncrementalDecoder(tokenizer)
    one_by_one = [piece for token_id in ids for piece in decoder.feed_one(token_id)]
    assert one_by_one == [
        piece for decoder in [IncrementalDecoder(tokenizer)] for i in ids for piece in decoder.feed([i])
    ]


def test_text_is_out_as_soon_as_it_is_certain(internlm2_tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(internlm2_tokenizer)
    steps = [decoder.feed([token_id]) for token_id in [9843, 243, 162, 155, 131, 346]]  # Hello, 😀 in four bytes, !
    assert steps == [["Hello"], [], [], [], ["😀"], ["!"]]
    assert decoder.flush() == ""


def test_a_control_token_ends_a_broken_character(internlm2_tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(internlm2_tokenizer)
    pieces = decoder.feed([9843, 243, 162, 92542, 346])
    assert pieces == ["Hello\ufffd\ufffd", "<|im_end|>", "!"]
    assert isinstance(pieces[1], ControlToken)
    assert pieces[1].token_id == 92542


def test_one_leading_space_goes_and_no_more(write_tokenizer_json: WriteTokenizer) -> None:
    tokenizer = Tokenizer.load(write_tokenizer_json("prefix_everywhere", LLAMA2))
    space = tokenizer.encode("")
    assert space == []
    ids = tokenizer.encode("  the end")
    decoder = IncrementalDecoder(tokenizer)
    assert "".join("".join(decoder.feed([token_id])) for token_id in ids) == "  the end"


def test_each_token_is_decoded_once(internlm2_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is linear in the output: no token is looked at again when later ones arrive."""
    seen: list[int] = []
    real = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, token_id: seen.append(token_id) or real(self, token_id))
    ids = internlm2_tokenizer.encode("狐狸和西瓜 👩‍👩‍👧‍👦 again " * 50)
    decoder = IncrementalDecoder(internlm2_tokenizer)
    for token_id in ids:
        decoder.feed([token_id])
    assert seen == ids


# --- broken folders ---


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a tokenizer\.json nor a tokenizer\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(("content", "complaint"), [("version https://git-lfs", "cannot be read"), ("[1]", "list")])
def test_broken_json(write_tokenizer_json: WriteTokenizer, name: str, content: str, complaint: str) -> None:
    folder = write_tokenizer_json("byte_level", CHATML)
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}.*{complaint}"):
        Tokenizer.load(folder)


def test_a_tokenizer_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "complaint"),
    [(None, "no decoder"), ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "'WordPiece' is not supported")],
)
def test_a_decoder_that_cannot_stream(
    write_tokenizer_json: WriteTokenizer, decoder: dict[str, Any] | None, complaint: str
) -> None:
    folder = write_tokenizer_json("byte_level", CHATML)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": decoder}))
    with pytest.raises(ConfigError, match=complaint):
        Tokenizer.load(folder)


def test_files_that_disagree_about_an_id(write_tokenizer_json: WriteTokenizer) -> None:
    record = {"content": "<|im_end|>", "special": True}
    folder = write_tokenizer_json("byte_level", CHATML, tokenizer_config={"added_tokens_decoder": {"5000": record}})
    with pytest.raises(ConfigError, match=r"<\|im_end\|>.*5000.*disagree"):
        Tokenizer.load(folder)


def test_tokens_beyond_a_tokenizer_model_leave_no_gap(train_sentencepiece: Callable[..., Path]) -> None:
    folder = train_sentencepiece()
    record = {"content": "<|im_end|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"5000": record}}))
    with pytest.raises(ConfigError, match="none with the id"):
        Tokenizer.load(folder)
