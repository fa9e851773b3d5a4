"""`tokenizer.model` files (SentencePiece) read and turned into a `tokenizers` pipeline. Owns the file format and the
conversion, which gives the ids that SentencePiece itself gives or refuses; knows no model family and no chat.

The file is one protobuf message, of which a dozen fields matter here; a reader of the wire format is shorter than a
dependency. Fields and defaults are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import models, normalizers

from lmdserve.engine.api import ConfigError

SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space as this character

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MODEL_PIECE, _MODEL_TRAINER_SPEC, _MODEL_NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TRAINER_MODEL_TYPE, _TRAINER_SUFFIX_SPACE, _TRAINER_BYTE_FALLBACK = 3, 24, 35
_TRAINER_UNK_ID, _TRAINER_BOS_ID, _TRAINER_EOS_ID = 40, 41, 42
_NORMALIZER_CHARSMAP, _NORMALIZER_DUMMY_PREFIX, _NORMALIZER_EXTRA_SPACES, _NORMALIZER_ESCAPE = 2, 3, 4, 5


class PieceType(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """How text is segmented."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class Piece(NamedTuple):
    """One vocabulary entry; its place in the list is its id."""

    text: str
    score: float
    type: PieceType


@dataclass(slots=True)
class SentencePieceModel:
    """What a tokenizer.model says, as far as encoding and decoding need it."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: ModelType = ModelType.UNIGRAM
    byte_fallback: bool = False
    space_is_suffix: bool = False
    unk_id: int = 0
    bos_id: int = 1  # -1: there is none
    eos_id: int = 2
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_model(path: Path) -> SentencePieceModel:
    """Return the contents of a tokenizer.model; ConfigError when it is not one or needs what we do not do."""
    try:
        model = _parse_model(memoryview(path.read_bytes()))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ConfigError(f"{path} is not a SentencePiece model ({error}); download the model again") from error
    if not model.pieces:
        raise ConfigError(f"{path} holds no vocabulary; download the model again (a Git LFS pointer looks like this)")
    if unsupported := _unsupported_feature(model):
        raise ConfigError(
            f"{path} has {unsupported}, and only BPE models that leave text as it is are supported; "
            "put the model's tokenizer.json beside it"
        )
    return model


def _unsupported_feature(model: SentencePieceModel) -> str | None:
    """Return what would make our ids differ from SentencePiece's; no family that is served has any of it."""
    if model.model_type is not ModelType.BPE:
        return f"{model.model_type.name.lower()} segmentation"
    if model.precompiled_charsmap:
        return "character normalisation"
    if model.remove_extra_whitespaces or not model.escape_whitespaces or model.space_is_suffix:
        return "its own treatment of spaces"
    return None


def _parse_model(data: memoryview) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == _MODEL_PIECE:
            model.pieces.append(_parse_piece(_message(value)))
        elif number == _MODEL_TRAINER_SPEC:
            _parse_trainer_spec(model, _message(value))
        elif number == _MODEL_NORMALIZER_SPEC:
            _parse_normalizer_spec(model, _message(value))
    return model


def _parse_piece(data: memoryview) -> Piece:
    text, score, piece_type = "", 0.0, PieceType.NORMAL
    for number, value in _fields(data):
        if number == _PIECE_TEXT:
            text = str(_message(value), "utf-8")
        elif number == _PIECE_SCORE:
            (score,) = struct.unpack("<f", _message(value))
        elif number == _PIECE_TYPE:
            piece_type = PieceType(_integer(value))
    return Piece(text, score, piece_type)


def _parse_trainer_spec(model: SentencePieceModel, data: memoryview) -> None:
    for number, value in _fields(data):
        if number == _TRAINER_MODEL_TYPE:
            model.model_type = ModelType(_integer(value))
        elif number == _TRAINER_SUFFIX_SPACE:
            model.space_is_suffix = bool(value)
        elif number == _TRAINER_BYTE_FALLBACK:
            model.byte_fallback = bool(value)
        elif number == _TRAINER_UNK_ID:
            model.unk_id = _integer(value)
        elif number == _TRAINER_BOS_ID:
            model.bos_id = _integer(value)
        elif number == _TRAINER_EOS_ID:
            model.eos_id = _integer(value)


def _parse_normalizer_spec(model: SentencePieceModel, data: memoryview) -> None:
    for number, value in _fields(data):
        if number == _NORMALIZER_CHARSMAP:
            model.precompiled_charsmap = bytes(_message(value))
        elif number == _NORMALIZER_DUMMY_PREFIX:
            model.add_dummy_prefix = bool(value)
        elif number == _NORMALIZER_EXTRA_SPACES:
            model.remove_extra_whitespaces = bool(value)
        elif number == _NORMALIZER_ESCAPE:
            model.escape_whitespaces = bool(value)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a message; fixed-width values come as their bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"cut short: a field of {length} bytes at byte {position} of {len(data)}")
        yield number, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits before byte {position}")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _integer(value: int | memoryview) -> int:
    """Return a signed varint: negative numbers are stored as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value - (1 << 64) if value >> 63 else value


def convert(model: SentencePieceModel, names: Mapping[int, str]) -> tokenizers.Tokenizer:
    """Build the pipeline for a text, dummy prefix not included. `names` renames ids and extends the vocabulary.

    Renamed pieces take no part in segmentation, so no text gives their ids.
    """
    vocabulary = [names.get(token_id, piece.text) for token_id, piece in enumerate(model.pieces)]
    vocabulary += [names[token_id] for token_id in range(len(model.pieces), max(names, default=-1) + 1)]
    pipeline = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, text in enumerate(vocabulary)},
            merges=_merges(model.pieces, names),
            unk_token=vocabulary[model.unk_id],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    pipeline.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    return pipeline


def _merges(pieces: Sequence[Piece], renamed: Iterable[int]) -> list[tuple[str, str]]:
    """Return the merges that reproduce the model: every way to halve a piece into two pieces, best score first.

    User-defined pieces have score 0, the best there is, so their merges come before all others: that is how they stay
    whole, as SentencePiece keeps them. Those that cannot be halved so ([UNUSED_TOKEN_0]) are placeholders that stay
    out of reach of text.
    """
    excluded = set(renamed)
    ids = {
        piece.text: token_id
        for token_id, piece in enumerate(pieces)
        if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED) and token_id not in excluded
    }
    ranked = []
    for text, token_id in ids.items():
        negated_score = -pieces[token_id].score
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((negated_score, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
