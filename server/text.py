"""Text to token ids and back: the tokenizer, the streaming decoder, the stop-string matcher. Knows no messages (that is
chat.py) and no files (tokenizer_backend.py).

Two promises hold everywhere. Text never becomes a control token: only an explicit `ControlToken` does. And decoding a
stream of tokens costs time linear in its length, whatever the chunks.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tokenizers

from lmdserve.tools.api import ControlToken

from .tokenizer_backend import TokenizerBackend, load_backend

_SURROGATE = re.compile("[\ud800-\udfff]")  # also how "surrogateescape" marks a byte that is not UTF-8
_REPLACEMENT_CHARACTER = "\ufffd"


class TextTooLongError(ValueError):
    """A text with more characters than the allowed number of tokens can stand for; it was not encoded."""

    def __init__(self, num_chars: int) -> None:
        super().__init__(f"the text has {num_chars} characters")
        self.num_chars = num_chars


class Tokenizer:
    """A model's tokenizer. Immutable and safe to share between threads; encoding releases the GIL.

    1 MB of text takes up to a second to encode. So `max_tokens`, where it is given, refuses with TextTooLongError what
    is longer than that many times the longest token, before it is encoded.
    """

    def __init__(self, backend: TokenizerBackend) -> None:
        self._backend = backend
        self._token_by_id = {i: ControlToken(text, i) for text, i in backend.control_token_ids.items()}
        self._control_pattern = _control_pattern(backend)
        unknown = backend.control_token_ids.get(backend.named_tokens.get("unk_token", ""))
        self._unreachable_ids = frozenset(self._token_by_id) - {unknown}  # no text may give them
        self._longest_token_bytes = max(map(len, backend.token_bytes), default=1)
        self._whole_texts: dict[int, str | None] = {}  # of the tokens asked for so far
        self.vocab_size = len(backend.token_bytes)
        self.bos_token_id = backend.bos_token_id
        self.eos_token_ids = backend.eos_token_ids
        self.control_tokens: Mapping[str, int] = MappingProxyType(backend.control_token_ids)
        self.named_tokens: Mapping[str, str] = MappingProxyType(backend.named_tokens)  # "bos_token": "<s>", ...

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load the tokenizer of a checkpoint folder; ConfigError when its files are missing or broken."""
        return cls(load_backend(folder))

    def encode(self, text: str, *, add_bos: bool = False, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a text; what spells a control token is text like any other.

        `add_bos` puts BOS first for models whose tokenizer does so by default, and nothing for the others.
        """
        self._check_length(len(text), max_tokens)
        bos = [self.bos_token_id] if add_bos and self._backend.adds_bos and self.bos_token_id is not None else []
        return bos + self._encode_span(text, begins_text=True)

    def encode_segments(self, segments: Sequence[str | ControlToken], *, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a prompt made of text spans and control tokens; each span is encoded as a whole."""
        self._check_length(sum(map(len, segments)), max_tokens)
        ids: list[int] = []
        begins_text = True
        for segment in segments:
            if isinstance(segment, ControlToken):
                ids.append(segment.token_id)
                begins_text = self._backend.text_prefix != "" and segment.token_id == self.bos_token_id
            else:
                ids += self._encode_span(segment, begins_text=begins_text)
                begins_text = False
        return ids

    def split_control(self, text: str) -> list[str | ControlToken]:
        """Split a rendered template at the control tokens it spells; empty spans are left out."""
        if self._control_pattern is None:
            return [text] if text else []
        segments: list[str | ControlToken] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                segments.append(text[end : match.start()])
            spelling = match[0] if match[0] in self.control_tokens else match[0].strip()
            segments.append(self._token_by_id[self.control_tokens[spelling]])
            end = match.end()
        if end < len(text):
            segments.append(text[end:])
        return segments

    def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
        """Return the text of some ids; control tokens are left out unless `keep_control`."""
        decoder = IncrementalDecoder(self)
        pieces = [*decoder.feed(ids), decoder.flush()]
        return "".join(piece for piece in pieces if keep_control or not isinstance(piece, ControlToken))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; b"" for ids the tokenizer does not know (padded vocabularies)."""
        return self._backend.token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """Return one token's text by itself, U+FFFD for bytes that are no text alone."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def whole_text(self, token_id: int) -> str | None:
        """Return the text of a token that is text by itself, whatever comes before or after; None for all others.

        Others are control tokens that a reader must never see, and tokens with a part of a character in them.
        """
        try:
            return self._whole_texts[token_id]
        except KeyError:
            text = self._whole_texts[token_id] = self._find_whole_text(token_id)
            return text

    def _find_whole_text(self, token_id: int) -> str | None:
        if self.special_token(token_id) is not None:
            return None
        try:
            return self.token_bytes(token_id).decode("utf-8")
        except UnicodeDecodeError:
            return None

    def special_token(self, token_id: int) -> ControlToken | None:
        """Return the control token with this id if a reader must never see it as text, else None."""
        return self._token_by_id[token_id] if token_id in self._backend.special_token_ids else None

    def new_byte_decoder(self) -> codecs.IncrementalDecoder:
        """Return a UTF-8 decoder with this tokenizer's way of showing broken bytes."""
        return codecs.getincrementaldecoder("utf-8")(self._backend.rules.utf8_errors)

    @property
    def strips_leading_space(self) -> bool:
        """Whether a decoded text loses one space at its very start."""
        return self._backend.rules.strips_leading_space

    def _check_length(self, num_chars: int, max_tokens: int | None) -> None:
        if max_tokens is not None and num_chars > max_tokens * self._longest_token_bytes:
            raise TextTooLongError(num_chars)

    def _encode_span(self, text: str, *, begins_text: bool) -> list[int]:
        ids = self._run_encoder(text, begins_text=begins_text)
        if self._unreachable_ids.isdisjoint(ids) or self._control_pattern is None:
            return ids
        # Some segmentations take any vocabulary entry they see (unigram models, `ignore_merges`), control tokens too:
        # cut each spelling in two, so that no part holds a whole one.
        cuts = [match.start() + 1 for match in self._control_pattern.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [
            token_id
            for i, part in enumerate(parts)
            for token_id in self._run_encoder(part, begins_text=begins_text and i == 0)
        ]

    def _run_encoder(self, text: str, *, begins_text: bool) -> list[int]:
        if begins_text and text:
            text = self._backend.text_prefix + text
        encoder = self._backend.encoder if begins_text else self._backend.continuation
        try:
            return _ids(encoder, text)
        except TypeError:  # the library's word for lone surrogates: JSON can spell them, but they are no text
            return _ids(encoder, _SURROGATE.sub(_REPLACEMENT_CHARACTER, text))


def _ids(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    """Encode as a batch of one: the library's `encode` holds the GIL, 1 MB of text for 0.6 s, and all streams wait."""
    return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _control_pattern(backend: TokenizerBackend) -> re.Pattern[str] | None:
    """Return a pattern for any control token, longest first, with the white space that some tokens swallow."""
    if not backend.control_tokens:
        return None
    return re.compile(
        "|".join(
            (r"\s*" if token.swallows_left else "") + re.escape(text) + (r"\s*" if token.swallows_right else "")
            for text, token in sorted(backend.control_tokens.items(), key=lambda item: -len(item[0]))
        )
    )


class IncrementalDecoder:
    """Turns one sequence's tokens into text while they come. Holds at most one incomplete character.

    Control tokens come out as `ControlToken` pieces, in their place; an incomplete character before one is broken.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.new_byte_decoder()
        self._drops_space = tokenizer.strips_leading_space
        self._is_between_characters = not self._drops_space

    def feed_one(self, token_id: int) -> list[str | ControlToken]:
        """Take the next token; return what `feed` returns. Nearly every token is a piece by itself: 0.3 us, not 1."""
        if self._is_between_characters:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return [text] if text else []
        return self.feed((token_id,))

    def feed(self, token_ids: Iterable[int]) -> list[str | ControlToken]:
        """Take the next tokens; return what is certain now, in order, without empty strings."""
        pieces: list[str | ControlToken] = []
        pending = bytearray()
        for token_id in token_ids:
            control = self._tokenizer.special_token(token_id)
            if control is None:
                pending += self._tokenizer.token_bytes(token_id)
                continue
            if text := self._text(pending, is_final=True):
                pieces.append(text)
            pieces.append(control)
            pending.clear()
        if text := self._text(pending, is_final=False):
            pieces.append(text)
        self._is_between_characters = not self._drops_space and self._bytes.getstate() == (b"", 0)
        return pieces

    def flush(self) -> str:
        """Return what is still held: the stream has ended, and an incomplete character shows as U+FFFD."""
        return self._text(b"", is_final=True)

    def _text(self, data: bytes | bytearray, *, is_final: bool) -> str:
        text = self._bytes.decode(bytes(data), is_final)
        text = _SURROGATE.sub(_REPLACEMENT_CHARACTER, text)
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


class StopResult(NamedTuple):
    """Text that is certain to come before any stop string, and the stop string that ended the text, if one did."""

    text: str
    matched: str | None


class StopStrings:
    """Finds the first of some stop strings in a stream of text and never lets a character of it out.

    The first is the one that is complete first, and of those that end together the longest: the result does not depend
    on where the text is cut into chunks. One Knuth-Morris-Pratt automaton per stop string; linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; give at least one character")
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_kmp_fallbacks(stop) for stop in self._stops]
        self._matched_lengths = [0] * len(stops)
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> StopResult:
        """Take more text; return what may be shown. After a match nothing more comes out."""
        if self._matched is not None:
            return StopResult("", self._matched)
        if not self._stops:
            return StopResult(text, None)
        visible = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            self._matched = self._advance(character)
            if self._matched is not None:
                self._held = ""
                return StopResult(visible[: position - len(self._matched)], self._matched)
        cut = len(visible) - max(self._matched_lengths)
        self._held = visible[cut:]
        return StopResult(visible[:cut], None)

    def flush(self) -> str:
        """Return the text that was held as a possible beginning of a stop string: the stream has ended."""
        held, self._held = self._held, ""
        self._matched_lengths = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        """Advance every automaton; return the longest stop string that is complete now."""
        complete = None
        for i, (stop, fallbacks) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            length = self._matched_lengths[i]
            while length and stop[length] != character:
                length = fallbacks[length]
            if stop[length] == character:
                length += 1
            self._matched_lengths[i] = length
            if length == len(stop) and complete is None:
                complete = stop
        return complete


def _kmp_fallbacks(stop: str) -> list[int]:
    """Return, for each number of matched characters, how many stay matched when the next one differs."""
    fallbacks = [0, 0]
    for end in range(1, len(stop)):
        length = fallbacks[end]
        while length and stop[length] != stop[end]:
            length = fallbacks[length]
        fallbacks.append(length + 1 if stop[length] == stop[end] else 0)
    return fallbacks
