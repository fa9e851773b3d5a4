"""The JSON of one block of calls, turned into events while it arrives: one call or a list of calls.

Owns what may stand between and around the calls of a block: brackets, commas, semicolons, a code fence. A call itself
is `json_call.py`'s, and the markers around the block belong to each format.
"""

from collections.abc import Callable, Iterator

from .api import Event
from .json_call import ANY_CALL, CallRules, JsonCall
from .json_scanner import ScanState, skip_whitespace

_FENCE_LENGTH = 3


class JsonBlock:
    """Reads one block; `feed` it until it is closed or its state is INVALID."""

    def __init__(
        self,
        indices: Iterator[int],
        rules: CallRules = ANY_CALL,
        *,
        may_be_fenced: bool = True,
        may_be_sequence: bool = False,
    ) -> None:
        """`may_be_fenced`: a code fence around the JSON is dropped; `may_be_sequence`: calls may follow one another."""
        self.state = ScanState.OPEN  # INVALID: what is left of the text does not belong to the block
        self.num_calls = 0  # calls that ended
        self._indices = indices
        self._rules = rules
        self._may_be_fenced = may_be_fenced
        self._may_be_sequence = may_be_sequence
        self._call = JsonCall(indices, rules)
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
        if text[position] == "`" and self._may_be_fenced and self._num_fence_backticks == 0:
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
        num_calls = self.num_calls
        position = self._feed_call(text, position)
        if self.num_calls > num_calls:
            self._begin_tail()
        return position

    def _next_in_sequence(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position < len(text):
            self._call = JsonCall(self._indices, self._rules)
            self._step = self._single_call
        return position

    def _next_item(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position < len(text):
            self._call = JsonCall(self._indices, self._rules)
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
        if self._may_be_sequence and text[position] in ";{":
            self._is_whole = False
            self._step = self._next_in_sequence
            return position + (text[position] == ";")
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
