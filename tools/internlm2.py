"""InternLM2's tool format: how the prompt tells of tools, and how the reply calls them.

A call is `<|action_start|><|plugin|>\\n{"name": "f", "parameters": {...}}<|action_end|>`, an interpreter block is
`<|action_start|><|interpreter|>\\n` code `<|action_end|>`; either may be followed by more. Models and the engines in
front of them vary it, and all of this is read as calls too: whitespace around markers, the key `arguments`, members in
any order, a list of calls in one action, a fence around the JSON, no end marker.

InternLM2.5 writes calls the same way. InternLM3's makers document no format of its own; its tokens are these, so it is
served with this one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .block_parser import BlockParser, CallBlock, Mark
from .call_syntax import CallSyntax
from .code_call import CODE_TOOL_NAME, CodeCall
from .internlm2_template import CHAT_TEMPLATE
from .json_block import JsonBlock

__all__ = ["CHAT_TEMPLATE", "CODE_TOOL_NAME", "InternLM2Format", "InternLM2Parser"]

# Tokenizers made before January 2024 have the same ids under their reserved names.
_MARKS = {
    "<|action_start|>": Mark.OPEN,
    "<|action_end|>": Mark.CLOSE,
    "<|plugin|>": Mark.PLUGIN,
    "<|interpreter|>": Mark.INTERPRETER,
    "<|im_end|>": Mark.TURN_END,
    "[UNUSED_TOKEN_144]": Mark.OPEN,
    "[UNUSED_TOKEN_143]": Mark.CLOSE,
    "[UNUSED_TOKEN_141]": Mark.PLUGIN,
    "[UNUSED_TOKEN_142]": Mark.INTERPRETER,
    "[UNUSED_TOKEN_145]": Mark.TURN_END,
}


@dataclass(frozen=True, slots=True)
class InternLM2Format:
    """The format of InternLM2, InternLM2.5 and InternLM3. `chat_template` is None where the model's own knows tools."""

    control_tokens: ClassVar[frozenset[str]] = frozenset(
        {"<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>", "<|im_end|>"}
    )
    call_openers: ClassVar[frozenset[str]] = frozenset({"<|action_start|>"})
    takes_code: ClassVar[bool] = True
    call_syntax: ClassVar[CallSyntax] = CallSyntax(
        opener="<|action_start|>",
        before_name='<|plugin|>\n{"name": ',
        after_name=', "parameters": ',
        after_arguments="}<|action_end|>",
        before_code="<|interpreter|>\n",
        after_code="<|action_end|>",
    )
    name: ClassVar[str] = "internlm2"
    chat_template: str | None = CHAT_TEMPLATE

    def template_variables(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the tools as they are; the template knows the interpreter."""
        return {"tools": list(tools) or None}

    def template_call_id(self, call_id: str) -> str:
        """Return the id; the prompt does not show it."""
        return call_id

    def make_parser(self, *, match_text: bool = False, tool_names: Collection[str] | None = None) -> "InternLM2Parser":
        """Return a parser for one reply; `match_text` recognises spelled markers too."""
        return InternLM2Parser(match_text=match_text)


class InternLM2Parser(BlockParser):
    """Parses one reply. An action is a block, whose kind the marker after the first one tells."""

    def __init__(self, *, match_text: bool) -> None:
        super().__init__(_MARKS, match_text=match_text)

    def _make_block(self, mark: Mark) -> CallBlock | None:
        if mark is Mark.PLUGIN:
            return JsonBlock(self._indices)
        return CodeCall(self._indices) if mark is Mark.INTERPRETER else None
