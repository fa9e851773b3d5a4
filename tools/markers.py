"""Finds control markers in a reply that arrives in pieces.

Owns telling a marker from text: by id always, and by spelling in a lexer made with `match_text`, for callers that
have lost the ids. What a marker means where it stands is the parser's business; a spelled marker keeps its spelling so
that it can be taken as text after all.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from .api import ControlToken, Piece

Kind = TypeVar("Kind")


class Marker(NamedTuple, Generic[Kind]):
    """A control marker; `by_id` is False for one that was merely spelled."""

    kind: Kind
    text: str
    by_id: bool


class MarkerLexer(Generic[Kind]):
    """Splits pieces into text and markers. `kinds` maps each marker's text to what it is, in the parser's terms."""

    def __init__(self, kinds: Mapping[str, Kind], *, match_text: bool) -> None:
        self._kinds = kinds
        self._pattern = re.compile("|".join(map(re.escape, kinds))) if match_text else None
        self._proper_prefixes = {text[:end] for text in kinds for end in range(1, len(text))}
        self._max_held = max(map(len, kinds)) - 1
        self._held = ""  # text that may be the beginning of a marker

    def feed(self, piece: Piece) -> Iterator[str | Marker[Kind]]:
        """Yield the markers and texts (none empty) `piece` settles; a control token that is none of ours is text."""
        if isinstance(piece, ControlToken):
            kind = self._kinds.get(piece)
            if kind is not None:
                yield from self.finish()
                yield Marker(kind, str(piece), by_id=True)
                return
        if self._pattern is not None:
            yield from self._split(self._held + piece)
        elif piece:
            yield str(piece)

    def finish(self) -> Iterator[str]:
        """Yield the text that was held."""
        if self._held:
            yield self._held
            self._held = ""

    def _split(self, text: str) -> Iterator[str | Marker[Kind]]:
        assert self._pattern is not None
        start = 0
        for match in self._pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
            yield Marker(self._kinds[match.group()], match.group(), by_id=False)
            start = match.end()
        held_from = self._find_marker_beginning(text, start)
        self._held = text[held_from:]
        if held_from > start:
            yield text[start:held_from]

    def _find_marker_beginning(self, text: str, start: int) -> int:
        """Return where the longest end of `text` begins that a marker may begin with, `len(text)` if there is none."""
        for position in range(max(start, len(text) - self._max_held), len(text)):
            if text[position:] in self._proper_prefixes:
                return position
        return len(text)
