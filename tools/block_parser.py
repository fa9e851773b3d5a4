"""A reply as content with blocks of calls in it, between markers: what most formats have in common.

Owns what is content and what is a block. What cannot be read is content, with its markers, from the end of the last
good call on. A turn's end is never content, except where it is spelled in text that goes on. Whitespace that stands
alone before, between or after calls is dropped. Which marker opens what, and what a block holds, is each format's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from itertools import count
from typing import Protocol

from .api import ContentDelta, Event, Piece, ToolCallAborted
from .json_scanner import ScanState
from .markers import Marker, MarkerLexer


class Mark(Enum):
    """What a marker does."""

    OPEN = "opens a block"
    CLOSE = "closes a block"
    TURN_END = "ends the turn"
    PLUGIN = "says that a block holds calls"
    INTERPRETER = "says that a block holds code"


class CallBlock(Protocol):
    """What a block holds, turned into events while it arrives."""

    @property
    def num_calls(self) -> int:
        """How many calls ended."""

    @property
    def state(self) -> ScanState:
        """INVALID: what is left of the text does not belong to the block."""

    @property
    def open_index(self) -> int | None:
        """The call that began and has not ended."""

    @property
    def in_string(self) -> bool:
        """True when the next character belongs to a string, where a spelled marker is text."""

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        """Read on; return right behind the end of a call, or where the block broke, or `len(text)`."""

    def close(self, events: list[Event], *, by_marker: bool) -> bool:
        """End the block; return False when what was read since its last call is no part of a good block."""


class BlockParser(ABC):
    """Parses one reply. It is in content, in a block whose kind is not known yet, or in a block.

    `_raw` is the text of a block since its beginning or its last good call: what becomes content if it goes wrong.
    `_gap` is whitespace that becomes content if content follows, and is dropped with `_raw` if a call does.
    """

    drops_newline = False  # before a call that follows text: where the template puts it there, it is no content

    def __init__(self, marks: Mapping[str, Mark], *, match_text: bool) -> None:
        self._lexer = MarkerLexer(marks, match_text=match_text)
        self._indices = count()
        self._events: list[Event] = []
        self._raw: list[str] | None = None  # None: in content
        self._block: CallBlock | None = None
        self._gap: list[str] | None = []  # None: the text so far ends in content
        self._gap_ends_reply = False  # the gap is dropped if the reply ends here
        self._newline = ""  # the last of the content, if `drops_newline`
        self._close_is_due = False  # a block was left, with a good call, before its closing marker came

    @abstractmethod
    def _make_block(self, mark: Mark) -> CallBlock | None:
        """Return what reads the block that this mark opens, or None if another marker will tell."""

    @property
    def in_call(self) -> bool:
        """Whether a block is open."""
        return self._raw is not None

    def feed(self, piece: Piece) -> list[Event]:
        """Take the next piece and return what it settles."""
        self._events = []
        for token in self._lexer.feed(piece):
            if isinstance(token, Marker):
                self._take_marker(token)
            else:
                self._take_text(token)
        return self._events

    def finish(self) -> list[Event]:
        """Return what was held, now that the reply is over."""
        self._events = []
        for text in self._lexer.finish():
            self._take_text(text)
        if self._raw is not None:
            self._leave_block(is_good=self._block is not None and self._block.close(self._events, by_marker=False))
        self._release_newline()
        if self._gap and not self._gap_ends_reply:
            self._events.append(ContentDelta("".join(self._gap)))
        return self._events

    def _take_text(self, text: str) -> None:
        position = 0
        if self._block is not None:
            position = self._feed_block(text)
        elif self._raw is not None:
            if text.isspace():
                self._raw.append(text)
                return
            self._leave_block(is_good=False)
        self._add_content(text[position:])

    def _take_marker(self, marker: Marker[Mark]) -> None:
        block = self._block
        if self._raw is None:
            self._take_marker_in_content(marker)
        elif block is None:
            self._take_kind(marker)
        elif marker.kind in (Mark.PLUGIN, Mark.INTERPRETER) or (block.in_string and not marker.by_id):
            self._take_text(marker.text)
        else:
            self._leave_block(is_good=block.close(self._events, by_marker=True))
            self._take_marker_in_content(marker)

    def _take_marker_in_content(self, marker: Marker[Mark]) -> None:
        if marker.kind is Mark.OPEN:
            self._open_block(marker.kind, marker.text)
        elif marker.kind is Mark.TURN_END:
            self._end_turn(marker)
        elif marker.kind is Mark.CLOSE and self._close_is_due:
            self._close_is_due = False
        else:
            self._add_content(marker.text)

    def _open_block(self, mark: Mark, raw_text: str) -> None:
        self._raw = [*(self._gap or []), self._newline, raw_text]
        self._gap, self._newline = None, ""
        self._close_is_due = False
        self._block = self._make_block(mark)

    def _take_kind(self, marker: Marker[Mark]) -> None:
        if marker.kind not in (Mark.PLUGIN, Mark.INTERPRETER):
            self._leave_block(is_good=False)
            self._take_marker_in_content(marker)
            return
        assert self._raw is not None
        self._raw.append(marker.text)
        self._block = self._make_block(marker.kind)

    def _feed_block(self, text: str) -> int:
        """Feed `text` to the block; return where the block ended, if it did, or `len(text)`."""
        position = 0
        while position < len(text) and self._block is not None:
            assert self._raw is not None
            num_calls = self._block.num_calls
            end = self._block.feed(text, position, self._events)
            if self._block.num_calls > num_calls:
                self._raw.clear()
            else:
                self._raw.append(text[position:end])
            if self._block.state is ScanState.INVALID:
                self._leave_block(is_good=False)
            position = end
        return position

    def _leave_block(self, *, is_good: bool) -> None:
        """Go back to content. What the block has left over is content, unless it `is_good` and that was syntax."""
        assert self._raw is not None
        raw_text, self._raw = "".join(self._raw), None
        block, self._block = self._block, None
        if block is not None and block.num_calls:
            self._gap, self._gap_ends_reply = [], True
            self._close_is_due = True
        if is_good:
            return
        if block is not None and block.open_index is not None:
            self._events.append(ToolCallAborted(block.open_index, raw_text))
            self._gap = None
        else:
            self._add_content(raw_text)

    def _end_turn(self, marker: Marker[Mark]) -> None:
        self._release_newline()
        if self._gap and not self._gap_ends_reply:
            self._events.append(ContentDelta("".join(self._gap)))
            self._gap = None
        spelling = [] if marker.by_id else [marker.text]
        self._gap, self._gap_ends_reply = [*(self._gap or []), *spelling], True
        self._close_is_due = False

    def _add_content(self, text: str) -> None:
        text, self._newline = self._newline + text, ""
        if self.drops_newline and text.endswith("\n"):
            text, self._newline = text[:-1], "\n"
        self._show(text)

    def _release_newline(self) -> None:
        newline, self._newline = self._newline, ""
        self._show(newline)

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._gap is not None:
            self._gap.append(text)
            if text.isspace():
                return
            text, self._gap = "".join(self._gap), None
        self._events.append(ContentDelta(text))
