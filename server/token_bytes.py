"""What bytes each token of a vocabulary stands for. Owns the reading of a tokenizer's decoder; decodes nothing itself.

A streaming decoder may only use rules that need no later token. Byte-level and byte-fallback decoders allow that: every
token is a fixed run of bytes, and the text is the UTF-8 of all runs in order, but for one leading space that
SentencePiece's dummy prefix put there. A decoder that cannot be described so is refused at start-up.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmdserve.engine.api import ConfigError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE_BYTES = (range(33, 127), range(161, 173), range(174, 256))


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How a tokenizer's decoder turns tokens into text."""

    is_byte_level: bool = False  # token text is bytes, spelt with GPT-2's printable alphabet
    has_byte_pieces: bool = False  # tokens such as <0xE4> stand for one byte
    replacements: tuple[tuple[str, str], ...] = ()  # applied to each token's text
    strips_leading_space: bool = False  # one space at the very start of the text goes

    @property
    def utf8_errors(self) -> str:
        """The codec error handler: one U+FFFD for each maximal broken run, or for each byte where bytes are tokens.

        Both are what the reference decoders print (GPT-2's and SentencePiece's). "surrogateescape" marks single bytes;
        whoever decodes with it replaces the marks.
        """
        return "surrogateescape" if self.has_byte_pieces else "replace"


def decoding_rules(decoder: Mapping[str, Any] | None, source: str) -> DecodingRules:
    """Return the rules that a tokenizer.json's `decoder` describes; ConfigError naming `source` if it has others."""
    is_byte_level = has_byte_pieces = strips_leading_space = False
    replacements: list[tuple[str, str]] = []
    for step in _steps(decoder):
        match step:
            case {"type": "ByteLevel"}:
                is_byte_level = True
            case {"type": "ByteFallback"}:
                has_byte_pieces = True
            case {"type": "Fuse"}:
                pass  # all tokens are joined anyway
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strips_leading_space = start == 1
            case {"type": "Metaspace", "replacement": str(symbol)}:
                replacements.append((symbol, " "))
                strips_leading_space = step.get("prepend_scheme", "always") != "never"
            case _:
                kind = step.get("type", step)
                raise ConfigError(
                    f"{source}: the decoder step {kind!r} is not supported; byte-level and byte-fallback decoders are"
                )
    if not is_byte_level and not replacements:
        raise ConfigError(f"{source} has no decoder, so tokens cannot be turned into text; convert the tokenizer again")
    return DecodingRules(is_byte_level, has_byte_pieces, tuple(replacements), strips_leading_space)


def token_byte_table(vocabulary: Mapping[str, int], literal: Collection[str], rules: DecodingRules) -> list[bytes]:
    """Return each id's bytes. Tokens in `literal` stand for their own text; ids without a token are empty."""
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    byte_of_symbol = _byte_of_symbol()
    for text, token_id in vocabulary.items():
        if text in literal:
            table[token_id] = text.encode()
        elif rules.is_byte_level:
            table[token_id] = _byte_level_bytes(text, byte_of_symbol)
        else:
            table[token_id] = _piece_bytes(text, rules)
    return table


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _byte_of_symbol() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = [byte for span in _PRINTABLE_BYTES for byte in span]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(text: str, byte_of_symbol: Mapping[str, int]) -> bytes:
    try:
        return bytes(map(byte_of_symbol.__getitem__, text))
    except KeyError:
        return text.encode()  # not in the alphabet: the token was added as plain text


def _piece_bytes(text: str, rules: DecodingRules) -> bytes:
    if rules.has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(text)):
        return bytes([int(byte[1], 16)])
    for old, new in rules.replacements:
        text = text.replace(old, new)
    return text.encode()
