"""Mistral's tool format: `[TOOL_CALLS]` and calls, to the end of the turn.

Two forms are in use, and both are read from every model. Tokenizers up to version 7 write a list,
`[TOOL_CALLS][{"name": "f", "arguments": {...}}]`; later ones a name and its arguments, `[TOOL_CALLS]f[ARGS]{...}`,
also `[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{...}` and, where `[ARGS]` got lost, `[TOOL_CALLS]f{...}`; each further call
has a marker of its own. Templates of the family refuse call ids that are not nine letters and digits, so ours are, and
ids of other forms are rewritten for the prompt.
"""

import hashlib
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .api import Event, ToolCallArguments, ToolCallEnd, ToolCallStart
from .block_parser import BlockParser, CallBlock, Mark
from .call_syntax import CallSyntax
from .json_block import JsonBlock
from .json_call import CallRules
from .json_scanner import JsonScanner, ScanState, skip_whitespace
from .mistral_template import CHAT_TEMPLATE

__all__ = ["CHAT_TEMPLATE", "MistralFormat", "MistralParser"]

_ARGS, _CALL_ID = "[ARGS]", "[CALL_ID]"
_MARKS = {"[TOOL_CALLS]": Mark.OPEN, "</s>": Mark.TURN_END}
_TOKENS = frozenset({*_MARKS, _ARGS, _CALL_ID})
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9
_NAME = re.compile(r"[\w.-]+")
_BETWEEN_NAME_AND_ARGUMENTS = re.compile(r"\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_]*\s*)?(?:\[ARGS\]\s*)?")
_MAX_HEADER_CHARS = 512  # name and id: real ones are below 100, and the header is matched from its start each time


def new_mistral_call_id() -> str:
    """Return a fresh call id in Mistral's form."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """The format of one model. `chat_template` is None where the model's own knows tools."""

    name: ClassVar[str] = "mistral"
    takes_code: ClassVar[bool] = False
    call_openers: ClassVar[frozenset[str]] = frozenset({"[TOOL_CALLS]"})
    control_tokens: frozenset[str] = frozenset(_MARKS)
    chat_template: str | None = CHAT_TEMPLATE

    @property
    def call_syntax(self) -> CallSyntax:
        """The newer form where its tokens are there, else the list."""
        if _ARGS in self.control_tokens:
            return CallSyntax(opener="[TOOL_CALLS]", after_name=_ARGS, quotes_name=False)
        return CallSyntax(
            opener="[TOOL_CALLS]",
            may_be_spaced=True,  # SentencePiece tokenizers put it there
            list_begin="[",
            before_name='{"name": ',
            after_name=', "arguments": ',
            may_have_id=True,
            after_arguments="}",
            separator=", ",
            repeats_opener=False,
            list_end="]",
        )

    @classmethod
    def for_tokens(cls, control_tokens: Collection[str], *, chat_template: str | None) -> "MistralFormat":
        """Return the format of a model that has these control tokens."""
        return cls(_TOKENS.intersection(control_tokens), chat_template)

    def template_variables(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the tools as they are."""
        return {"tools": list(tools) or None}

    def template_call_id(self, call_id: str) -> str:
        """Return an id of nine letters and digits, the same for the same id."""
        if len(call_id) == _ID_LENGTH and call_id.isascii() and call_id.isalnum():
            return call_id
        digest = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest())
        return "".join(_ID_CHARACTERS[digest // 62**place % 62] for place in range(_ID_LENGTH))

    def make_parser(self, *, match_text: bool = False, tool_names: Collection[str] | None = None) -> "MistralParser":
        """Return a parser for one reply; `match_text` recognises spelled markers too."""
        return MistralParser(match_text=match_text)


class MistralParser(BlockParser):
    """Parses one reply. A marker opens a block; the next marker or the end of the turn closes it."""

    def __init__(self, *, match_text: bool) -> None:
        super().__init__(_MARKS, match_text=match_text)

    def _make_block(self, mark: Mark) -> CallBlock:
        return _MistralBlock(self._indices)


class _MistralBlock:
    """Reads what follows one marker: JSON, or a name and its arguments."""

    def __init__(self, indices: Iterator[int]) -> None:
        self._block: CallBlock | None = None
        self._indices = indices

    @property
    def num_calls(self) -> int:
        return 0 if self._block is None else self._block.num_calls

    @property
    def state(self) -> ScanState:
        return ScanState.OPEN if self._block is None else self._block.state

    @property
    def in_string(self) -> bool:
        return self._block is not None and self._block.in_string

    @property
    def open_index(self) -> int | None:
        return None if self._block is None else self._block.open_index

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        if self._block is None:
            position = skip_whitespace(text, position)
            if position == len(text):
                return position
            is_json = text[position] in "[{"
            rules = CallRules(new_id=new_mistral_call_id)
            self._block = JsonBlock(self._indices, rules) if is_json else _NamedCall(self._indices)
        return self._block.feed(text, position, events)

    def close(self, events: list[Event], *, by_marker: bool) -> bool:
        return self._block is not None and self._block.close(events, by_marker=by_marker)


class _NamedCall:
    """Reads `name[ARGS]{...}`; only whitespace may follow."""

    def __init__(self, indices: Iterator[int]) -> None:
        self.state = ScanState.OPEN
        self.num_calls = 0
        self.open_index: int | None = None
        self._indices = indices
        self._header = ""
        self._scanner = JsonScanner()
        self._step: Callable[[str, int, list[Event]], int] = self._read_header

    @property
    def in_string(self) -> bool:
        return self._scanner.in_string

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        num_calls = self.num_calls
        while position < len(text) and self.state is ScanState.OPEN and self.num_calls == num_calls:
            position = self._step(text, position, events)
        return position

    def close(self, events: list[Event], *, by_marker: bool) -> bool:
        return self.num_calls == 1

    def _read_header(self, text: str, position: int, events: list[Event]) -> int:
        brace = text.find("{", position)
        end = len(text) if brace < 0 else brace
        self._header += text[position : min(end, position + _MAX_HEADER_CHARS + 1)]
        name = _NAME.match(self._header)
        if len(self._header) > _MAX_HEADER_CHARS or name is None or not _may_go_on(self._header[name.end() :]):
            self.state = ScanState.INVALID
        elif brace >= 0:
            if not _BETWEEN_NAME_AND_ARGUMENTS.fullmatch(self._header, name.end()):
                self.state = ScanState.INVALID
            else:
                self.open_index = next(self._indices)
                events.append(ToolCallStart(self.open_index, new_mistral_call_id(), name[0]))
                self._step = self._read_arguments
        return end

    def _read_arguments(self, text: str, position: int, events: list[Event]) -> int:
        assert self.open_index is not None
        end = self._scanner.feed(text, position)
        if self._scanner.state is ScanState.INVALID:
            self.state = ScanState.INVALID
        elif end > position:
            events.append(ToolCallArguments(self.open_index, text[position:end]))
        if self._scanner.state is ScanState.DONE:
            events.append(ToolCallEnd(self.open_index))
            self.open_index = None
            self.num_calls = 1
            self._step = self._read_tail
        return end

    def _read_tail(self, text: str, position: int, events: list[Event]) -> int:
        if text[position].isspace():
            return position + 1
        self.state = ScanState.INVALID
        return position


def _may_go_on(rest: str) -> bool:
    """Whether what follows the name so far may become what stands between it and its arguments."""
    rest = rest.lstrip()
    if rest.startswith(_CALL_ID):
        rest = rest.removeprefix(_CALL_ID).lstrip().lstrip(_ID_CHARACTERS + "_").lstrip()
        return not rest or _ARGS.startswith(rest.rstrip()) or rest.rstrip() == _ARGS
    return not rest or _ARGS.startswith(rest.rstrip()) or _CALL_ID.startswith(rest)
