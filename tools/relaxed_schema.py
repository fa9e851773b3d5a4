"""JSON schemas with less in them: without the keywords that no grammar can be made of, for answers checked when whole.

Owns what each step leaves out. Leaving a keyword out allows more, never less: the final check sees the schema as it was
sent. llguidance's own leniency ignores what it does not know; this is for what it stumbles over.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from .json_schema import SUBSCHEMA_KEYWORDS, SUBSCHEMA_LIST_KEYWORDS, SUBSCHEMA_MAP_KEYWORDS, JsonObject

NUM_STEPS = 3
NUM_HARMLESS_STEPS = 1  # the first ones leave out what says nothing
# Those of the standard. Others ("int32", "uint", "cuid") are a generator's notes; no validator knows them.
_FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"}
    | {"uri", "uri-reference", "uri-template", "iri", "iri-reference", "uuid", "regex"}
    | {"json-pointer", "relative-json-pointer"}
)
_COUNTS_OF_PROPERTIES = frozenset({"minProperties", "maxProperties"})
_BESIDE_A_REFERENCE = frozenset({"$ref", "$defs", "definitions", "$id", "$anchor", "title", "description", "default"})


def relaxed(schema: Any, step: int) -> Any:
    """Return the schema of a step, without all that the earlier ones leave out.

    1: without formats that the standard does not know; 2: without patterns that no grammar follows; 3: without numbers
    of properties, overlapping patterns of names, and what stands beside a reference.
    """
    return _edited(schema, (_without_notes, _without_patterns, _without_obstacles)[step - 1])


def _edited(schema: Any, edit: Callable[[JsonObject], JsonObject]) -> Any:
    """Return a schema with all of its subschemas edited. The caller bounds the depth."""
    if not isinstance(schema, Mapping):
        return schema
    proper: JsonObject = {}
    for keyword, value in schema.items():
        if keyword in SUBSCHEMA_KEYWORDS and isinstance(value, Mapping):
            proper[keyword] = _edited(value, edit)
        elif (keyword in SUBSCHEMA_LIST_KEYWORDS or keyword == "items") and isinstance(value, list):
            proper[keyword] = [_edited(item, edit) for item in value]
        elif keyword in SUBSCHEMA_MAP_KEYWORDS and isinstance(value, Mapping):
            proper[keyword] = {name: _edited(item, edit) for name, item in value.items()}
        else:
            proper[keyword] = value
    return edit(proper)


def _without_notes(schema: JsonObject) -> JsonObject:
    if schema.get("format") not in _FORMATS:
        schema.pop("format", None)
    return schema


def _without_patterns(schema: JsonObject) -> JsonObject:
    schema = _without_notes(schema)
    if "pattern" in schema and not _is_regular(schema["pattern"]):
        del schema["pattern"]
    named = schema.get("patternProperties")
    if isinstance(named, dict):
        schema["patternProperties"] = {pattern: value for pattern, value in named.items() if _is_regular(pattern)}
    return schema


def _without_obstacles(schema: JsonObject) -> JsonObject:
    schema = _without_patterns(schema)
    if "$ref" in schema:
        return {keyword: value for keyword, value in schema.items() if keyword in _BESIDE_A_REFERENCE}
    if len(schema.get("patternProperties", ())) > 1:
        del schema["patternProperties"]
    return {keyword: value for keyword, value in schema.items() if keyword not in _COUNTS_OF_PROPERTIES}


@lru_cache(1024)
def _is_regular(pattern: Any) -> bool:
    """Return whether a grammar can follow a pattern: the language has look-around and back references, too."""
    from llguidance import LLMatcher

    if not isinstance(pattern, str) or re.search(r"\(\?<?[=!]", pattern):
        return False
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern))
