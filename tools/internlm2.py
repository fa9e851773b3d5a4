"""InternLM2's tool format: how the prompt tells of tools, and how the reply calls them.

A call is `<|action_start|><|plugin|>\\n{"name": "f", "parameters": {...}}<|action_end|>`, an interpreter block is
`<|action_start|><|interpreter|>\\n` code `<|action_end|>`; either may be followed by more. Models and the engines in
front of them vary it, and all of this is read as calls too: whitespace around markers, the key `arguments`, members in
any order, a list of calls in one action, a fence around the JSON, no end marker.

What cannot be read is content, with its markers, from the end of the last good call on. `<|im_end|>` ends the turn and
is never content, except where it is spelled in text that goes on. Whitespace that stands alone before, between or
after calls is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import ClassVar

from .api import ContentDelta, Event, Piece, ToolCallAborted
from .code_call import CODE_TOOL_NAME, CodeCall
from .internlm2_template import CHAT_TEMPLATE
from .json_call import JsonCall
from .json_scanner import ScanState, skip_whitespace
from .markers import Marker, MarkerLexer

__all__ = ["CHAT_TEMPLATE", "CODE_TOOL_NAME", "InternLM2Format", "InternLM2Parser"]

_FENCE_LENGTH = 3


class _Kind(Enum):
    ACTION_START = "action start"
    ACTION_END = "action end"
    PLUGIN = "plugin"
    INTERPRETER = "interpreter"
    TURN_END = "turn end"


# Tokenizers made before January 2024 have the same ids under their reserved names.
_KINDS = {
    "<|action_start|>": _Kind.ACTION_START,
    "<|action_end|>": _Kind.ACTION_END,
    "<|plugin|>": _Kind.PLUGIN,
    "<|interpreter|>": _Kind.INTERPRETER,
    "<|im_end|>": _Kind.TURN_END,
    "[UNUSED_TOKEN_144]": _Kind.ACTION_START,
    "[UNUSED_TOKEN_143]": _Kind.ACTION_END,
    "[UNUSED_TOKEN_141]": _Kind.PLUGIN,
    "[UNUSED_TOKEN_142]": _Kind.INTERPRETER,
    "[UNUSED_TOKEN_145]": _Kind.TURN_END,
}


@dataclass(frozen=True, slots=True)
class InternLM2Format:
    """The format of InternLM2, InternLM2.5 and InternLM3. `chat_template` is None where the model's own knows tools."""

    control_tokens: ClassVar[frozenset[str]] = frozenset(
        {"<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>", "<|im_end|>"}
    )
    name: ClassVar[str] = "internlm2"
    chat_template: str | None = CHAT_TEMPLATE

    def make_parser(self, *, match_text: bool = False) -> "InternLM2Parser":
        """Return a parser for one reply; `match_text` recognises spelled markers too."""
        return InternLM2Parser(match_text=match_text)


class InternLM2Parser:
    """Parses one reply. It is in content, in an action whose kind is not known yet, or in a block.

    `_raw` is the text of an action since its beginning or its last good call: what becomes content if it goes wrong.
    `_gap` is whitespace that becomes content if content follows, and is dropped with `_raw` if a call does.
    """

    def __init__(self, *, match_text: bool) -> None:
        self._lexer = MarkerLexer(_KINDS, match_text=match_text)
        self._indices = count()
        self._events: list[Event] = []
        self._raw: list[str] | None = None  # None: in content
        self._block: _PluginBlock | CodeCall | None = None
        self._gap: list[str] | None = []  # None: the text so far ends in content
        self._gap_ends_reply = False  # the gap is dropped if the reply ends here
        self._action_end_is_due = False  # an action was left, with a good call, before its end marker came

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
            self._leave_action(is_good=self._block is not None and self._block.close(self._events, by_marker=False))
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
            self._leave_action(is_good=False)
        self._add_content(text[position:])

    def _take_marker(self, marker: Marker[_Kind]) -> None:
        block = self._block
        if self._raw is None:
            self._take_marker_in_content(marker)
        elif block is None:
            self._take_kind(marker)
        elif marker.kind in (_Kind.PLUGIN, _Kind.INTERPRETER) or (block.in_string and not marker.by_id):
            self._take_text(marker.text)
        else:
            self._leave_action(is_good=block.close(self._events, by_marker=True))
            self._take_marker_in_content(marker)

    def _take_marker_in_content(self, marker: Marker[_Kind]) -> None:
        if marker.kind is _Kind.ACTION_START:
            self._raw = [*(self._gap or []), marker.text]
            self._gap = None
            self._action_end_is_due = False
        elif marker.kind is _Kind.TURN_END:
            self._end_turn(marker)
        elif marker.kind is _Kind.ACTION_END and self._action_end_is_due:
            self._action_end_is_due = False
        else:
            self._add_content(marker.text)

    def _take_kind(self, marker: Marker[_Kind]) -> None:
        if marker.kind not in (_Kind.PLUGIN, _Kind.INTERPRETER):
            self._leave_action(is_good=False)
            self._take_marker_in_content(marker)
            return
        assert self._raw is not None
        self._raw.append(marker.text)
        self._block = _PluginBlock(self._indices) if marker.kind is _Kind.PLUGIN else CodeCall(self._indices)

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
                self._leave_action(is_good=False)
            position = end
        return position

    def _leave_action(self, *, is_good: bool) -> None:
        """Go back to content. What the action has left over is content, unless it `is_good` and that was syntax."""
        assert self._raw is not None
        raw_text, self._raw = "".join(self._raw), None
        block, self._block = self._block, None
        if block is not None and block.num_calls:
            self._gap, self._gap_ends_reply = [], True
            self._action_end_is_due = True
        if is_good:
            return
        if block is not None and block.open_index is not None:
            self._events.append(ToolCallAborted(block.open_index, raw_text))
            self._gap = None
        else:
            self._add_content(raw_text)

    def _end_turn(self, marker: Marker[_Kind]) -> None:
        if self._gap and not self._gap_ends_reply:
            self._events.append(ContentDelta("".join(self._gap)))
            self._gap = None
        spelling = [] if marker.by_id else [marker.text]
        self._gap, self._gap_ends_reply = [*(self._gap or []), *spelling], True
        self._action_end_is_due = False

    def _add_content(self, text: str) -> None:
        if self._gap is not None:
            self._gap.append(text)
            if not text or text.isspace():
                return
            text, self._gap = "".join(self._gap), None
        if text:
            self._events.append(ContentDelta(text))


class _PluginBlock:
    """Reads the JSON of one action: one call or a list of calls, with a fence around it or not."""

    def __init__(self, indices: Iterator[int]) -> None:
        self.state = ScanState.OPEN  # INVALID: what is left of the text does not belong to the block
        self.num_calls = 0  # calls that ended
        self._indices = indices
        self._call = JsonCall(indices)
        self._events: list[Event] = []
        self._num_fence_backticks = 0
        self._num_closing_backticks = 0
        self._is_whole = False  # the JSON is over; only a closing fence and whitespace may follow
        self._step: Callable[[str, int], int] = self._opening

    @property
    def in_string(self) -> bool:
        return self._call.in_string

    @property
    def open_index(self) -> int | None:
        return None if self._call.state is ScanState.DONE else self._call.index

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        """Read on from `position`; return right behind the end of a call, or where the block broke, or `len(text)`."""
        self._events = events
        num_calls = self.num_calls
        while position < len(text) and self.state is ScanState.OPEN and self.num_calls == num_calls:
            position = self._step(text, position)
        return position

    def close(self, events: list[Event], *, by_marker: bool) -> bool:
        """End the block; whole JSON is good with and without an end marker, anything less is not."""
        return self._is_whole and self._num_closing_backticks in (0, _FENCE_LENGTH)

    def _opening(self, text: str, position: int) -> int:
        if text[position].isspace():
            return position + 1
        if text[position] == "`" and self._num_fence_backticks == 0:
            self._step = self._opening_fence
            return position
        if text[position] == "[":
            self._step = self._next_item
            return position + 1
        self._step = self._single_call
        return position

    def _opening_fence(self, text: str, position: int) -> int:
        if text[position] != "`":
            return self._fail(position)
        self._num_fence_backticks += 1
        if self._num_fence_backticks == _FENCE_LENGTH:
            self._step = self._fence_language
        return position + 1

    def _fence_language(self, text: str, position: int) -> int:
        if text[position].isalnum():
            return position + 1
        self._step = self._opening
        return position

    def _single_call(self, text: str, position: int) -> int:
        position = self._feed_call(text, position)
        if self.num_calls:
            self._begin_tail()
        return position

    def _next_item(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position < len(text):
            self._call = JsonCall(self._indices)
            self._step = self._list_item
        return position

    def _list_item(self, text: str, position: int) -> int:
        num_calls = self.num_calls
        position = self._feed_call(text, position)
        if self.num_calls > num_calls:
            self._step = self._after_item
        return position

    def _after_item(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] == ",":
            self._step = self._next_item
        elif text[position] == "]":
            self._begin_tail()
        else:
            return self._fail(position)
        return position + 1

    def _begin_tail(self) -> None:
        self._is_whole = True
        self._step = self._tail

    def _tail(self, text: str, position: int) -> int:
        if text[position] == "`" and self._num_closing_backticks < self._num_fence_backticks:
            self._num_closing_backticks += 1
            return position + 1
        if text[position].isspace() and self._num_closing_backticks in (0, _FENCE_LENGTH):
            return position + 1
        return self._fail(position)

    def _feed_call(self, text: str, position: int) -> int:
        position = self._call.feed(text, position, self._events)
        if self._call.state is ScanState.DONE:
            self.num_calls += 1
        elif self._call.state is ScanState.INVALID:
            self.state = ScanState.INVALID
        return position

    def _fail(self, position: int) -> int:
        self.state = ScanState.INVALID
        return position
