"""The grammar of tool calls: what a format writes around a call, and the schemas of the tools that may be called.

Owns the way from tools to a grammar's source. The text around a call is each format's (`call_syntax`), byte for byte
what its template renders; what a schema's grammar looks like is `grammar.py`'s.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .call_syntax import CallSyntax
from .code_call import CODE_TOOL_NAME
from .grammar import TEMPLATE_SPACING, GrammarError, GrammarSource, lark_text, schema_term
from .json_call import CALL_KEYS
from .relaxed_schema import NUM_HARMLESS_STEPS

_PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallGrammar:
    """The grammar of a reply's calls, to be written with or without the opener of the first one."""

    syntax: CallSyntax
    tools: Sequence[Mapping[str, Any]]  # as `normalize_tools` returns them: those that may be called
    control_ids: Mapping[str, int]
    is_parallel: bool = True

    def source(self, *, has_opener: bool) -> GrammarSource:
        """Return the source; raise GrammarError for a tool that cannot be called in this format."""
        syntax = self.syntax
        first = self._literal(syntax.opener if has_opener else "")
        again = self._literal(syntax.separator + (syntax.opener if syntax.repeats_opener else ""))
        more = f"({again} call)*" if self.is_parallel else ""
        space = '" "?' if syntax.may_be_spaced else ""
        start = (
            f"start: {first} {space} {self._literal(syntax.list_begin)} call {more} {self._literal(syntax.list_end)}\n"
        )
        has_code = any(tool["type"] == CODE_TOOL_NAME for tool in self.tools)
        if has_code and syntax.code_opener and has_opener:
            code = f"{self._literal(syntax.code_opener)} CODE\n"
            start = f"{start.rstrip()} | {code}" if self._functions() else f"start: {code}"
        return self._source_from(start)

    def source_in_text(self) -> GrammarSource:
        """Return the source of a whole reply, free text with calls in it, for an opener that is spelled as text."""
        opener = lark_text(self.syntax.opener)
        return self._source_from(
            f"start: (lead call){'*' if self.is_parallel else '?'} TAIL\n"
            f"lead[lazy]: TEXT {opener}\n"
            "TEXT: /(?s:.*)/\n"
            f"TAIL: TEXT & ~(TEXT {opener} TEXT)\n"
        )

    def _source_from(self, start: str) -> GrammarSource:
        """Return the source of what `start` says about calls."""
        syntax = self.syntax
        has_code = any(tool["type"] == CODE_TOOL_NAME for tool in self.tools)
        names = [f"call_{index}" for index, _ in enumerate(self._functions())]
        if has_code and syntax.before_code is not None:
            names.append("code")
        rules = [start + (f"call: {' | '.join(names)}\n" if names else "")]
        if "code" in names:
            rules.append(f"code: {self._literal(syntax.before_code or '')} CODE {self._literal(syntax.after_code)}\n")
        if has_code:
            rules.append("CODE: /[^\\s{\\[`](?s:.*)/ | /```python\\n[^\\s`][^`]*\\n```/\n")
        functions = self._functions()

        def text(step: int) -> str:
            return "".join([*rules, *(self._call(index, function, step) for index, function in enumerate(functions))])

        must_be_strict = all(function.get("strict") is True for function in functions)
        return GrammarSource(text(0), text, must_be_strict)

    def _functions(self) -> list[Mapping[str, Any]]:
        return [tool["function"] for tool in self.tools if tool["type"] != CODE_TOOL_NAME]

    def _call(self, index: int, function: Mapping[str, Any], step: int) -> str:
        syntax, name = self.syntax, function["name"]
        if not syntax.quotes_name and not _PLAIN_NAME.fullmatch(name):
            raise GrammarError(
                f"the name {name[:80]!r} cannot be written in this model's calls; use letters, digits, _"
            )
        shown = json.dumps(name, ensure_ascii=False) if syntax.quotes_name else name
        step = min(step, NUM_HARMLESS_STEPS) if function.get("strict") is True else step
        schema = schema_term(function["parameters"], step=step, spacing=TEMPLATE_SPACING)
        before = self._literal(syntax.before_name + shown + syntax.after_name)
        after = self._literal(syntax.after_arguments)
        if syntax.may_have_id:
            after = f'({lark_text(", ")} "\\"id\\": \\"" /[a-zA-Z0-9]{{9}}/ "\\"")? {after}'
        return f"call_{index}: {before} arguments_{index} {after}\narguments_{index}: {schema}\n"

    def _literal(self, text: str) -> str:
        """Return a text as Lark's, with its control tokens as tokens."""
        pattern = "|".join(re.escape(token) for token in sorted(self.control_ids, key=len, reverse=True))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return " ".join(
            f"<[{self.control_ids[part]}]>" if part in self.control_ids else lark_text(part) for part in parts if part
        )


def either(answer: GrammarSource, calls: GrammarSource) -> GrammarSource:
    """Return the source of a reply that is an answer or calls; both sources are in Lark's notation."""

    def text(step: int) -> str:
        parts = {"reply": "start: @answer | @calls\n"}
        for name, source in (("answer", answer), ("calls", calls)):
            own_step = min(step, NUM_HARMLESS_STEPS) if source.must_be_strict else step
            parts[name] = source.relaxed(own_step) if step and source.relaxed else source.text
        return json.dumps({"grammars": [{"name": name, "lark_grammar": part} for name, part in parts.items()]})

    return GrammarSource(text(0), text, answer.must_be_strict and calls.must_be_strict)


def is_never_a_call(schema: Any) -> bool:
    """Return whether nothing that obeys a schema can be taken for a call written as a JSON object."""
    if not isinstance(schema, Mapping):
        return False
    if schema.get("type") == "object":
        required = schema.get("required")
        return isinstance(required, list) and any(name not in CALL_KEYS for name in required)
    return schema.get("type") in ("string", "number", "integer", "boolean", "null")


def function_names(tools: Collection[Mapping[str, Any]]) -> list[str]:
    """Return what each tool is called by."""
    return [tool["function"]["name"] if tool["type"] != CODE_TOOL_NAME else CODE_TOOL_NAME for tool in tools]
