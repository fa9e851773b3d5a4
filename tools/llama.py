"""Llama 3.1's tool format: a reply that is a call is JSON from its first character, or begins with `<|python_tag|>`.

`{"name": "f", "parameters": {...}}` is a call of a function; several may follow one another, with semicolons between
them, or stand in a list. As such a reply has no marker, it counts only where its members are a call's and its name is
one of the tools offered: JSON that is an answer stays an answer. Behind `<|python_tag|>` stands such JSON too, or a
built-in tool, `brave_search.call(query="...")`, or code for the interpreter. What of it was not offered is content.

Calls after other text are content too: the format has no way to tell them from it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .block_parser import BlockParser, CallBlock, Mark
from .call_syntax import CallSyntax
from .code_call import CODE_TOOL_NAME
from .json_block import JsonBlock
from .json_call import CALL_KEYS, CallRules
from .llama_template import CHAT_TEMPLATE
from .python_tag_call import PythonTagCall

__all__ = ["CHAT_TEMPLATE", "REQUIRED_TOKENS", "LlamaFormat", "LlamaParser"]

_MARKS = {"<|python_tag|>": Mark.OPEN, "<|eom_id|>": Mark.TURN_END, "<|eot_id|>": Mark.TURN_END}
REQUIRED_TOKENS = frozenset(_MARKS)


@dataclass(frozen=True, slots=True)
class LlamaFormat:
    """The format of Llama 3.1, 3.2 and 3.3. `chat_template` is None where the model's own knows tools."""

    name: ClassVar[str] = "llama3"
    takes_code: ClassVar[bool] = True
    call_syntax: ClassVar[CallSyntax] = CallSyntax(
        before_name='{"name": ',
        after_name=', "parameters": ',
        after_arguments="}",
        separator="; ",
        code_opener="<|python_tag|>",
    )
    control_tokens: ClassVar[frozenset[str]] = REQUIRED_TOKENS
    call_openers: ClassVar[frozenset[str]] = frozenset({"<|python_tag|>"})
    chat_template: str | None = CHAT_TEMPLATE

    def template_variables(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the functions as tools, and the interpreter as the built-in tool that it is here."""
        functions = [tool for tool in tools if tool.get("type") != CODE_TOOL_NAME]
        built_in = {} if len(functions) == len(tools) else {"builtin_tools": [CODE_TOOL_NAME]}
        return {"tools": functions or None, **built_in}

    def template_call_id(self, call_id: str) -> str:
        """Return the id; the prompt does not show it."""
        return call_id

    def make_parser(self, *, match_text: bool = False, tool_names: Collection[str] | None = None) -> "LlamaParser":
        """Return a parser for one reply; `match_text` recognises spelled markers too."""
        return LlamaParser(match_text=match_text, tool_names=tool_names)


class LlamaParser(BlockParser):
    """Parses one reply. The block of a reply that is JSON has no marker."""

    def __init__(self, *, match_text: bool, tool_names: Collection[str] | None) -> None:
        super().__init__(_MARKS, match_text=match_text)
        self._tool_names = tool_names
        self._rules = CallRules(keys=CALL_KEYS, names=tool_names)
        self._is_at_start = True

    def _make_block(self, mark: Mark) -> CallBlock:
        self._is_at_start = False
        return PythonTagCall(self._indices, self._rules)

    def _take_text(self, text: str) -> None:
        if self._is_at_start and not text.isspace():
            self._is_at_start = False
            if text.lstrip()[0] in "{[":
                self._raw, self._gap = self._gap, None
                self._block = JsonBlock(self._indices, self._rules, may_be_fenced=False, may_be_sequence=True)
        super()._take_text(text)
