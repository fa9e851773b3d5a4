"""What follows Llama's `<|python_tag|>`, turned into the events of calls while it arrives.

Owns telling the three apart: JSON calls, one call of a built-in tool, `name.call(key="value")`, and code. Code and
JSON are passed on as they are generated. A built-in call is held until the turn ends, as its Python literals have to be
read whole before they can be written as JSON.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from .api import Event, ToolCallArguments, ToolCallEnd, ToolCallStart
from .code_call import CODE_TOOL_NAME, CodeCall
from .json_block import JsonBlock
from .json_call import CallRules, is_unicode
from .json_scanner import ScanState

_NAME = re.compile(r"[A-Za-z_]\w*")
_CALL = ".call("
_MAX_NAME_CHARS = 128  # the built-in tools' have 12 and 13; the name is matched from its start each time
_MAX_BUILTIN_CHARS = 20_000  # read in one go, in some milliseconds; longer calls are code


class PythonTagCall:
    """Reads the block. `rules.names` are the tools that were offered; nothing else is a call."""

    def __init__(self, indices: Iterator[int], rules: CallRules) -> None:
        self.state = ScanState.OPEN
        self._indices = indices
        self._rules = rules
        self._json: JsonBlock | None = None
        self._code: CodeCall | None = None
        self._num_builtin_calls = 0
        self._held: list[str] = []  # what came while its kind was not certain
        self._opening = ""  # what of it can be the opening of a built-in call
        self._step: Callable[[str, int, list[Event]], int] = self._find_kind

    @property
    def num_calls(self) -> int:
        return self._num_builtin_calls + sum(block.num_calls for block in self._blocks)

    @property
    def in_string(self) -> bool:
        return any(block.in_string for block in self._blocks)

    @property
    def open_index(self) -> int | None:
        return next((block.open_index for block in self._blocks if block.open_index is not None), None)

    @property
    def _blocks(self) -> list[JsonBlock | CodeCall]:
        return [block for block in (self._json, self._code) if block is not None]

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        """Read on; return right behind the end of a call, or where the block broke, or `len(text)`."""
        num_calls = self.num_calls
        while position < len(text) and self.state is ScanState.OPEN and self.num_calls == num_calls:
            position = self._step(text, position, events)
        return position

    def close(self, events: list[Event], *, by_marker: bool) -> bool:
        """End the block. Code that no marker ended was cut off, and is not to be run."""
        if self._code is None and self._json is None:
            call = _read_builtin("".join(self._held))
            if call is not None and self._is_offered(call[0]):
                self._send_builtin(*call, events)
                return True
            self._begin_code(events)
        if self._code is not None:
            return by_marker and self._code.close(events, by_marker=True)
        return self._json is not None and self._json.close(events, by_marker=by_marker)

    def _find_kind(self, text: str, position: int, events: list[Event]) -> int:
        """Take text until it cannot be a built-in call any more; `close` reads what can."""
        character = text[position]
        if not self._opening and character in "{[":
            self._json = JsonBlock(self._indices, self._rules, may_be_fenced=False, may_be_sequence=True)
            self._step = self._read_json
            return position
        self._held.append(character)
        if not self._opening and character.isspace():
            return position + 1
        self._opening += character
        if not _may_be_builtin(self._opening):
            self._begin_code(events)
        elif self._opening.endswith(_CALL):
            self._step = self._read_builtin_on
        return position + 1

    def _read_builtin_on(self, text: str, position: int, events: list[Event]) -> int:
        self._held.append(text[position:])
        return len(text)

    def _read_json(self, text: str, position: int, events: list[Event]) -> int:
        assert self._json is not None
        end = self._json.feed(text, position, events)
        if self._json.num_calls or self._json.open_index is not None:
            self._held = []
        else:
            self._held.append(text[position:end])
        if self._json.state is ScanState.INVALID:
            if self._held:
                self._json = None
                self._begin_code(events)
            else:
                self.state = ScanState.INVALID
        return end

    def _begin_code(self, events: list[Event]) -> None:
        """What came is code, if an interpreter was offered."""
        if not self._is_offered(CODE_TOOL_NAME):
            self.state = ScanState.INVALID
            return
        self._code = CodeCall(self._indices)
        self._code.feed("".join(self._held), 0, events)
        self._held = []
        self._step = self._code.feed

    def _is_offered(self, name: str) -> bool:
        return self._rules.names is None or name in self._rules.names

    def _send_builtin(self, name: str, arguments: str, events: list[Event]) -> None:
        index = next(self._indices)
        events += [ToolCallStart(index, self._rules.new_id(), name), ToolCallArguments(index, arguments)]
        events.append(ToolCallEnd(index))
        self._num_builtin_calls = 1


def _may_be_builtin(text: str) -> bool:
    """Whether `text` is the beginning of `name.call(`, or goes on behind it."""
    name = _NAME.match(text)
    if name is None or name.end() > _MAX_NAME_CHARS:
        return False
    rest = text[name.end() : name.end() + len(_CALL)]
    return _CALL.startswith(rest)


def _read_builtin(text: str) -> tuple[str, str] | None:
    """Return the name and arguments (JSON) of `name.call(key=literal, ...)`, or None for anything else."""
    if len(text) > _MAX_BUILTIN_CHARS:
        return None
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Attribute):
            return None
        target = call.func.value
        if call.func.attr != "call" or not isinstance(target, ast.Name):
            return None
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in arguments:
                return None
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        encoded = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return (target.id, encoded) if is_unicode(encoded) else None
