"""Which output format a request asks for, under any of its names: a grammar's source and the field it came from.

Owns the fields and their shapes: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`, SGLang's
`regex`, LMDeploy's `regex_schema`, and our own `grammar` and `choice`. Compiling is `output_rules.py`'s.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lmdserve.tools.grammar import (
    GrammarSource,
    choice_source,
    json_schema_source,
    lark_source,
    regex_source,
)
from lmdserve.tools.json_schema import with_known_draft

from .errors import BadRequestError, UnsupportedFieldError


class OutputFormat(NamedTuple):
    """What an answer has to be; `make_source` may raise GrammarError, and take as long as the grammar is large.

    `schema` is the JSON Schema of it, where it has one.
    """

    param: str
    make_source: Callable[[], GrammarSource]
    schema: Any = None


def output_format(fields: Mapping[str, Any]) -> OutputFormat | None:
    """Return what these fields of a request ask for; None: any text. Raises BadRequestError."""
    found = [wanted for name, value in fields.items() if value is not None and (wanted := _READERS[name](name, value))]
    if len(found) > 1:
        raise BadRequestError(
            f"{found[0].param} and {found[1].param} both say what the answer has to be; send one of them",
            param=found[1].param,
        )
    return found[0] if found else None


def _from_response_format(param: str, value: Mapping[str, Any]) -> OutputFormat | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _json(f"{param}.type", {"type": "object"})
    if kind == "json_schema":
        return _from_json_schema(f"{param}.json_schema", value.get("json_schema"))
    if kind in ("regex", "regex_schema"):
        return _regex(f"{param}.{kind}", value.get(kind))
    if kind == "grammar":
        return _grammar(f"{param}.grammar", value.get("grammar"))
    if kind == "structural_tag":
        raise UnsupportedFieldError(
            f'{param}.type "structural_tag" is not supported; use tools, or a grammar', param=f"{param}.type"
        )
    raise BadRequestError(
        f'{param}.type must be "text", "json_object", "json_schema", "regex_schema" or "grammar"; '
        f"got {str(kind)[:80]!r}",
        param=f"{param}.type",
    )


def _from_json_schema(param: str, value: Any) -> OutputFormat:
    if not isinstance(value, Mapping) or "schema" not in value:
        raise BadRequestError(f"{param}.schema is missing; it is required", param=f"{param}.schema")
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise BadRequestError(f"{param}.strict must be true or false", param=f"{param}.strict")
    return _json(f"{param}.schema", value["schema"], must_be_strict=strict is True)


def _from_structured_outputs(param: str, value: Mapping[str, Any]) -> OutputFormat | None:
    readers: dict[str, Callable[[str, Any], OutputFormat | None]] = {
        "json": _json_or_text,
        "json_object": lambda name, wanted: _json(name, {"type": "object"}) if wanted else None,
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
    }
    for name, part in value.items():
        if name not in readers and part not in (None, False):
            raise UnsupportedFieldError(f"{param}.{name} is not supported", param=f"{param}.{name}")
    asked = [(name, part) for name, part in value.items() if part not in (None, False)]
    if len(asked) != 1:
        raise BadRequestError(f"{param} must have one of {', '.join(readers)}; it has {len(asked)}", param=param)
    name, part = asked[0]
    return readers[name](f"{param}.{name}", part)


def _json(param: str, schema: Any, *, must_be_strict: bool = False) -> OutputFormat:
    if not isinstance(schema, Mapping | bool):
        raise BadRequestError(f"{param} must be a JSON Schema object", param=param)
    proper = with_known_draft(schema) if isinstance(schema, Mapping) else schema
    return OutputFormat(param, lambda: json_schema_source(proper, must_be_strict=must_be_strict), proper)


def _json_or_text(param: str, schema: Any) -> OutputFormat:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"{param} is a string that is not JSON: {error}", param=param) from error
    return _json(param, schema)


def _regex(param: str, pattern: Any) -> OutputFormat:
    text = _text(param, pattern)
    return OutputFormat(param, lambda: regex_source(text))


def _grammar(param: str, grammar: Any) -> OutputFormat:
    text = _text(param, grammar)
    return OutputFormat(param, lambda: lark_source(text))


def _choice(param: str, choices: Any) -> OutputFormat:
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise BadRequestError(f"{param} must be a list of strings that are not empty", param=param)
    return OutputFormat(param, lambda: choice_source(choices))


def _text(param: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"{param} must be a string that is not empty", param=param)
    return value


_READERS: Mapping[str, Callable[[str, Any], OutputFormat | None]] = {
    "response_format": _from_response_format,
    "structured_outputs": _from_structured_outputs,
    "regex": _regex,
    "grammar": _grammar,
    "choice": _choice,
    "guided_json": _json_or_text,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
}
FORMAT_FIELDS = tuple(_READERS)
