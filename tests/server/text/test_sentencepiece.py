"""Our reading of tokenizer.model against SentencePiece itself: contents, ids and text, for every kind of model."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from lmdserve.engine.api import ConfigError
from lmdserve.server.sentencepiece import PieceType, convert, read_model
from lmdserve.server.text import Tokenizer

KINDS = {
    "bpe": {},
    "bpe_llama2": {"add_dummy_prefix": True},
    "bpe_no_byte_fallback": {"byte_fallback": False, "add_dummy_prefix": True},
    "bpe_user_defined": {"user_defined_symbols": ["——", "……"], "required_chars": "—…", "add_dummy_prefix": True},
}
FRAGMENTS = (
    " ", "  ", "    ", "\n", "\t", "the", "fox", "again", " and", "狐狸", "西瓜", "喜欢", "——", "……", "—", "…",
    "é", "½", "Ｆｕｌｌ", "ﬁ", "😀", "👩‍👩‍👧", "▁", "3.14", "\u0301", "русский", "<s>", "</s>", "<unk>", "<0x41>",
    "A", "z", ".",
)  # fmt: skip


def _random_texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    return ["", " ", *("".join(source.choices(FRAGMENTS, k=source.randint(1, 14))) for _ in range(count))]


@pytest.fixture(scope="module", params=KINDS)
def model_path(request: pytest.FixtureRequest, train_sentencepiece: Callable[..., Path]) -> Path:
    return train_sentencepiece(**KINDS[request.param]) / "tokenizer.model"


@pytest.fixture(scope="module")
def reference(model_path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_path))


def test_reads_what_sentencepiece_reads(model_path: Path, reference: sentencepiece.SentencePieceProcessor) -> None:
    model = read_model(model_path)
    assert len(model.pieces) == reference.get_piece_size()
    assert (model.unk_id, model.bos_id, model.eos_id) == (reference.unk_id(), reference.bos_id(), reference.eos_id())
    for token_id, piece in enumerate(model.pieces):
        assert piece.text == reference.id_to_piece(token_id)
        assert piece.score == reference.get_score(token_id)
        assert (piece.type is PieceType.CONTROL) == reference.is_control(token_id)
        assert (piece.type is PieceType.BYTE) == reference.is_byte(token_id)
        assert (piece.type is PieceType.UNKNOWN) == reference.is_unknown(token_id)


def test_encodes_as_sentencepiece(model_path: Path, reference: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = Tokenizer.load(model_path.parent)
    for text in _random_texts(seed=1, count=1500):
        assert tokenizer.encode(text) == reference.encode(text), repr(text)


def test_decodes_as_sentencepiece(model_path: Path, reference: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = Tokenizer.load(model_path.parent)
    for text in _random_texts(seed=2, count=500):
        ids = reference.encode(text)
        if reference.unk_id() not in ids:  # shown as " ⁇ " there; here it is a control token
            assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


def test_decodes_broken_bytes_as_sentencepiece(train_sentencepiece: Callable[..., Path]) -> None:
    """Random ids hold every way in which UTF-8 can be broken, and one U+FFFD stands for each broken byte."""
    folder = train_sentencepiece()
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.load(folder)
    ordinary = [
        i for i in range(reference.get_piece_size()) if not (reference.is_control(i) or reference.is_unknown(i))
    ]
    byte_ids = [i for i in ordinary if reference.is_byte(i)]
    source = random.Random(3)
    for _ in range(2000):
        ids = source.choices(byte_ids if source.random() < 0.7 else ordinary, k=source.randint(1, 12))
        assert tokenizer.decode(ids) == reference.decode(ids), ids


def test_internlm2_encodes_as_sentencepiece(internlm2_folder: Path, internlm2_tokenizer: Tokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(internlm2_folder / "tokenizer.model"))
    for text in _random_texts(seed=4, count=3000):
        assert internlm2_tokenizer.encode(text) == reference.encode(text), repr(text)


def test_renamed_pieces_are_never_found_in_text(train_sentencepiece: Callable[..., Path]) -> None:
    model = read_model(train_sentencepiece() / "tokenizer.model")
    renamed = next(i for i, piece in enumerate(model.pieces) if len(piece.text) > 3)
    pipeline = convert(model, {renamed: "<|mark|>"})
    for text in (model.pieces[renamed].text, "<|mark|>"):
        assert renamed not in pipeline.encode(text).ids


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no vocabulary"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:f868\n", "not a SentencePiece model"),
        (b"\x0a\xff\x01short", "cut short"),
        (b"\x0a", "not a SentencePiece model"),
        (b"\xff" * 40, "longer than 64 bits"),
        (b"\x0a\x05\x0a\x03\xff\xfe\xfd", "not a SentencePiece model"),
    ],
)
def test_refuses_what_is_no_model(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "unigram segmentation"),
        ({"model_type": "word"}, "word segmentation"),
        ({"treat_whitespace_as_suffix": True}, "treatment of spaces"),
        ({"remove_extra_whitespaces": True}, "treatment of spaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character normalisation"),
    ],
)
def test_refuses_kinds_it_cannot_reproduce(
    train_sentencepiece: Callable[..., Path], options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=f"{complaint}.*tokenizer.json"):
        read_model(train_sentencepiece(**options) / "tokenizer.model")
