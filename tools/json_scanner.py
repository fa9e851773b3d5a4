"""Finds the end of one JSON value whose text arrives in pieces, and says at once when it cannot be JSON.

Owns the grammar (RFC 8259, strict: no trailing commas, no NaN, no raw control characters in strings) and nothing
else: it keeps no text and builds no values. Every character is looked at once, whatever the pieces; memory is one
list entry per open bracket, and nesting does not recurse.
"""

import re
from collections.abc import Callable
from enum import Enum

_WHITESPACE = " \t\n\r"
_DIGITS = "0123456789"
_HEX_DIGITS = frozenset(_DIGITS + "abcdefABCDEF")
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}

# A number's parts: from each, the characters that may follow and the part they lead to.
_NUMBER_PARTS: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", **dict.fromkeys("123456789", "integer")},
    "zero": {".": "point", "e": "exponent", "E": "exponent"},
    "integer": {**dict.fromkeys(_DIGITS, "integer"), ".": "point", "e": "exponent", "E": "exponent"},
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), "e": "exponent", "E": "exponent"},
    "exponent": {"+": "exponent sign", "-": "exponent sign", **dict.fromkeys(_DIGITS, "exponent digits")},
    "exponent sign": dict.fromkeys(_DIGITS, "exponent digits"),
    "exponent digits": dict.fromkeys(_DIGITS, "exponent digits"),
}
_NUMBER_STARTS = {"-": "minus", "0": "zero", **dict.fromkeys("123456789", "integer")}
_NUMBER_MAY_END = frozenset({"zero", "integer", "fraction", "exponent digits"})


class ScanState(Enum):
    """Whether a value that is being scanned can go on."""

    OPEN = "open"
    DONE = "done"
    INVALID = "invalid"


def skip_whitespace(text: str, position: int) -> int:
    """Return the first position from `position` on that holds no JSON whitespace."""
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


class JsonScanner:
    """Scans one value. `feed` it until `state` leaves OPEN; whitespace before the value counts as part of it.

    A bare number is DONE only when a character that is not part of it arrives.
    """

    def __init__(self) -> None:
        self.state = ScanState.OPEN
        self.in_string = False
        self._closers: list[str] = []  # the bracket that ends each open container, outermost first
        self._in_key = False
        self._literal_rest = ""
        self._number_part = ""
        self._hex_digits_left = 0
        self._step: Callable[[str, int], int] = self._value

    def feed(self, text: str, position: int = 0) -> int:
        """Scan `text` from `position`; return where the value ended, where it turned invalid, or `len(text)`."""
        while position < len(text) and self.state is ScanState.OPEN:
            position = self._step(text, position)
        return position

    def _value(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        return self._value_start(text, position) if position < len(text) else position

    def _value_start(self, text: str, position: int) -> int:
        character = text[position]
        if character == '"':
            self._begin_string(in_key=False)
        elif character == "{":
            self._closers.append("}")
            self._step = self._first_key
        elif character == "[":
            self._closers.append("]")
            self._step = self._first_item
        elif character in _LITERALS:
            self._literal_rest = _LITERALS[character]
            self._step = self._literal
        elif character in _NUMBER_STARTS:
            self._number_part = _NUMBER_STARTS[character]
            self._step = self._number
        else:
            return self._fail(position)
        return position + 1

    def _first_key(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position < len(text) and text[position] == "}":
            return self._close_container(position)
        return self._key(text, position)

    def _key(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] != '"':
            return self._fail(position)
        self._begin_string(in_key=True)
        return position + 1

    def _colon(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] != ":":
            return self._fail(position)
        self._step = self._value
        return position + 1

    def _first_item(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] == "]":
            return self._close_container(position)
        return self._value_start(text, position)

    def _after_value(self, text: str, position: int) -> int:
        position = skip_whitespace(text, position)
        if position == len(text):
            return position
        if text[position] == self._closers[-1]:
            return self._close_container(position)
        if text[position] != ",":
            return self._fail(position)
        self._step = self._key if self._closers[-1] == "}" else self._value
        return position + 1

    def _begin_string(self, *, in_key: bool) -> None:
        self.in_string = True
        self._in_key = in_key
        self._step = self._string

    def _string(self, text: str, position: int) -> int:
        if run := _STRING_RUN.match(text, position):
            return run.end()
        if text[position] == "\\":
            self._step = self._escape
        elif text[position] == '"':
            self.in_string = False
            if self._in_key:
                self._step = self._colon
            else:
                self._end_value()
        else:
            return self._fail(position)
        return position + 1

    def _escape(self, text: str, position: int) -> int:
        if text[position] == "u":
            self._hex_digits_left = 4
            self._step = self._hex_digit
        elif text[position] in '"\\/bfnrt':
            self._step = self._string
        else:
            return self._fail(position)
        return position + 1

    def _hex_digit(self, text: str, position: int) -> int:
        if text[position] not in _HEX_DIGITS:
            return self._fail(position)
        self._hex_digits_left -= 1
        if self._hex_digits_left == 0:
            self._step = self._string
        return position + 1

    def _literal(self, text: str, position: int) -> int:
        if text[position] != self._literal_rest[0]:
            return self._fail(position)
        self._literal_rest = self._literal_rest[1:]
        if not self._literal_rest:
            self._end_value()
        return position + 1

    def _number(self, text: str, position: int) -> int:
        following = _NUMBER_PARTS[self._number_part].get(text[position])
        if following is not None:
            self._number_part = following
            return position + 1
        if self._number_part not in _NUMBER_MAY_END:
            return self._fail(position)
        self._end_value()
        return position

    def _close_container(self, position: int) -> int:
        self._closers.pop()
        self._end_value()
        return position + 1

    def _end_value(self) -> None:
        if self._closers:
            self._step = self._after_value
        else:
            self.state = ScanState.DONE

    def _fail(self, position: int) -> int:
        self.state = ScanState.INVALID
        return position
