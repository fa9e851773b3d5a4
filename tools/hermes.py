"""The Hermes tool format, which Qwen2.5 and Qwen3 write.

A call is `<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>`; several stand one after another, each in its
own tags. Also read as calls: the key `parameters`, a list of calls or a fence inside the tags, no closing tag. Where
the tags are tokens of the model they count by id only; models that were taught the format without tokens for it spell
the tags, and then the spelling counts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .block_parser import BlockParser, CallBlock, Mark
from .call_syntax import CallSyntax
from .hermes_template import CHAT_TEMPLATE
from .json_block import JsonBlock

__all__ = ["CHAT_TEMPLATE", "TAGS", "HermesFormat", "HermesParser"]

TAGS = frozenset({"<tool_call>", "</tool_call>"})
_MARKS = {
    "<tool_call>": Mark.OPEN,
    "</tool_call>": Mark.CLOSE,
    "<|im_end|>": Mark.TURN_END,
    "<|eot_id|>": Mark.TURN_END,
}


@dataclass(frozen=True, slots=True)
class HermesFormat:
    """The format of one model. `chat_template` is None where the model's own knows tools."""

    name: ClassVar[str] = "hermes"
    takes_code: ClassVar[bool] = False
    call_syntax: ClassVar[CallSyntax] = CallSyntax(
        opener="<tool_call>",
        before_name='\n{"name": ',
        after_name=', "arguments": ',
        after_arguments="}\n</tool_call>",
        separator="\n",
    )
    control_tokens: frozenset[str] = TAGS | {"<|im_end|>"}
    chat_template: str | None = CHAT_TEMPLATE

    @classmethod
    def for_tokens(cls, control_tokens: Collection[str], *, chat_template: str | None) -> "HermesFormat":
        """Return the format of a model that has these control tokens."""
        return cls(frozenset(_MARKS).intersection(control_tokens), chat_template)

    @property
    def call_openers(self) -> frozenset[str]:
        """The opening tag, where it is a token."""
        return self.control_tokens & {"<tool_call>"}

    def template_variables(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the tools as they are."""
        return {"tools": list(tools) or None}

    def template_call_id(self, call_id: str) -> str:
        """Return the id; the prompt does not show it."""
        return call_id

    def make_parser(self, *, match_text: bool = False, tool_names: Collection[str] | None = None) -> "HermesParser":
        """Return a parser for one reply; tags that are no tokens are recognised by their spelling."""
        return HermesParser(match_text=match_text or not self.control_tokens >= TAGS)


class HermesParser(BlockParser):
    """Parses one reply."""

    drops_newline = True

    def __init__(self, *, match_text: bool) -> None:
        super().__init__(_MARKS, match_text=match_text)

    def _make_block(self, mark: Mark) -> CallBlock:
        return JsonBlock(self._indices)
