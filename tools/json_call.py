"""One call written as a JSON object, `{"name": "f", "parameters": {...}}`, turned into events while it arrives.

Owns the meaning of the object's members, which several formats share; what stands around the object belongs to each
format. The rules:

* Arguments are the first member named `parameters` or `arguments` that is not null. They must be an object, and are
  passed on as written. No such member means `{}`; other members are checked to be JSON and dropped.
* `name` must be there once, a string that is not empty. Arguments that come before it wait for it.
* `ToolCallStart` goes out with the first character of the arguments, so that most malformed calls are known to be
  malformed before anything of them was sent.
"""

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from .api import Event, ToolCallArguments, ToolCallEnd, ToolCallStart, new_call_id
from .json_scanner import JsonScanner, ScanState, skip_whitespace

ARGUMENT_KEYS = frozenset({"parameters", "arguments"})
CALL_KEYS = frozenset({"name", "type", "id"}) | ARGUMENT_KEYS


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """What sets one format's calls apart from another's. The defaults take any object that is a call."""

    keys: Collection[str] | None = None  # the members that an object may have if it is to be a call
    names: Collection[str] | None = None  # the functions that can be called
    new_id: Callable[[], str] = new_call_id


ANY_CALL = CallRules()


class JsonCall:
    """Scans one call. `feed` it until `state` leaves OPEN; the first character must be the `{`.

    `indices` gives the call's index, and is asked only if the call starts.
    """

    def __init__(self, indices: Iterator[int], rules: CallRules = ANY_CALL) -> None:
        self.state = ScanState.OPEN
        self.index: int | None = None  # not None once ToolCallStart went out
        self._indices = indices
        self._rules = rules
        self._events: list[Event] = []
        self._scanner = JsonScanner()
        self._name: str | None = None
        self._has_arguments = False
        self._captured: list[str] = []  # text of the key or name being scanned
        self._waiting_arguments: list[str] = []  # arguments that came before the name
        self._step: Callable[[str, int], int] = self._open

    @property
    def in_string(self) -> bool:
        """True when the next character belongs to a JSON string."""
        return self._scanner.in_string

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        """Scan `text` from `position`, append to `events`, return where the call ended or broke, or `len(text)`."""
        self._events = events
        while position < len(text) and self.state is ScanState.OPEN:
            position = self._step(text, position)
        return position

    def _open(self, text: str, position: int) -> int:
        if text[position] != "{":
            return self._fail(position)
        self._step = self._first_key
        return position + 1

    def _first_key(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position < len(text) and text[position] == "}":
            return self._close(position)
        return self._key_start(text, position)

    def _key_start(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] != '"':
            return self._fail(position)
        self._begin(self._key)
        return position

    def _key(self, text: str, position: int) -> int:
        end = self._scan_captured(text, position)
        if self._scanner.state is ScanState.DONE:
            self._step = self._colon
        return end

    def _colon(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] != ":":
            return self._fail(position)
        self._step = self._value_start
        return position + 1

    def _value_start(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        key = json.loads("".join(self._captured))
        if self._rules.keys is not None and key not in self._rules.keys:
            return self._fail(position)
        if key == "name":
            if self._name is not None or text[position] != '"':
                return self._fail(position)
            self._begin(self._name_value)
        elif key in ARGUMENT_KEYS and not self._has_arguments and text[position] != "n":
            if text[position] != "{":
                return self._fail(position)
            self._has_arguments = True
            self._begin(self._arguments_value)
        else:
            self._begin(self._other_value)
        return position

    def _name_value(self, text: str, position: int) -> int:
        end = self._scan_captured(text, position)
        if self._scanner.state is not ScanState.DONE:
            return end
        name = json.loads("".join(self._captured))
        if not name or not is_unicode(name) or (self._rules.names is not None and name not in self._rules.names):
            return self._fail(end)
        self._name = name
        if self._has_arguments:
            self._send_arguments("".join(self._waiting_arguments))
        self._step = self._after_value
        return end

    def _arguments_value(self, text: str, position: int) -> int:
        end = self._scan(text, position)
        if self._name is None:
            self._waiting_arguments.append(text[position:end])
        else:
            self._send_arguments(text[position:end])
        return end

    def _other_value(self, text: str, position: int) -> int:
        return self._scan(text, position)

    def _after_value(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] == "}":
            return self._close(position)
        if text[position] != ",":
            return self._fail(position)
        self._step = self._key_start
        return position + 1

    def _begin(self, step: Callable[[str, int], int]) -> None:
        self._scanner = JsonScanner()
        self._captured = []
        self._step = step

    def _scan(self, text: str, position: int) -> int:
        end = self._scanner.feed(text, position)
        if self._scanner.state is ScanState.INVALID:
            return self._fail(end)
        if self._scanner.state is ScanState.DONE:
            self._step = self._after_value
        return end

    def _scan_captured(self, text: str, position: int) -> int:
        end = self._scan(text, position)
        self._captured.append(text[position:end])
        return end

    def _send_arguments(self, fragment: str) -> None:
        if not fragment:
            return
        if self.index is None:
            assert self._name is not None
            self.index = next(self._indices)
            self._events.append(ToolCallStart(self.index, self._rules.new_id(), self._name))
        self._events.append(ToolCallArguments(self.index, fragment))

    def _close(self, position: int) -> int:
        if self._name is None:
            return self._fail(position)
        if not self._has_arguments:
            self._send_arguments("{}")
        assert self.index is not None
        self._events.append(ToolCallEnd(self.index))
        self.state = ScanState.DONE
        return position + 1

    def _fail(self, position: int) -> int:
        self.state = ScanState.INVALID
        return position


def is_unicode(text: str) -> bool:
    """Return False for text with lone surrogates (`"\\ud800"` is JSON), which no reply could carry."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
