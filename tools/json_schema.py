"""Turns a sloppy JSON Schema into a proper one (draft 2020-12), or says which field cannot be understood.

Owns the schema language; what a tool is besides its schema belongs to `schema.py`. Two rules decide everything:

* What has one evident meaning is written the proper way: type names of programming languages, `null` for "not given",
  OpenAPI's `nullable`, older drafts' tuples and exclusive limits, `required` as a boolean on the property, an `enum` of
  strings for another type (numbers in quotes, what an array's items are).
* A type nobody knows is no constraint; a keyword whose value cannot be read (`enum: "a"`) is an error.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]

MAX_NESTING = 64  # of a schema or tool; real ones stay below 20, and recursion is safe to here
_TYPE_NAMES: dict[str, tuple[str, ...]] = {
    "string": ("string", "str", "text", "char", "varchar"),
    "integer": ("integer", "int", "int32", "int64", "long", "short", "byte"),
    "number": ("number", "float", "double", "decimal", "float32", "float64", "numeric", "real"),
    "boolean": ("boolean", "bool"),
    "array": ("array", "list", "tuple", "set", "sequence", "arraylist"),
    "object": ("object", "dict", "dictionary", "map", "mapping", "hashmap", "struct", "json"),
    "null": ("null", "none", "nonetype", "nil", "void"),
}
_TYPES = {name: proper for proper, names in _TYPE_NAMES.items() for name in names}
_STRING_FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "uri", "uuid", "ipv4", "ipv6", "hostname"}
)
_STRING_FORMAT_NAMES = {"datetime": "date-time", "url": "uri", **{name: name for name in _STRING_FORMATS}}

SUBSCHEMA_KEYWORDS = frozenset(
    {"items", "additionalItems", "contains", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"}
    | {"propertyNames", "not", "if", "then", "else", "contentSchema"}
)
SUBSCHEMA_LIST_KEYWORDS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SUBSCHEMA_MAP_KEYWORDS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_STRING_KEYWORDS = frozenset(
    {"$ref", "$dynamicRef", "$anchor", "$dynamicAnchor", "$id", "$comment", "title", "description", "format"}
    | {"pattern", "contentEncoding", "contentMediaType"}
)
_NUMBER_KEYWORDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_COUNT_KEYWORDS = frozenset(
    {"minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties"}
)
_BOOLEAN_KEYWORDS = frozenset({"uniqueItems", "deprecated", "readOnly", "writeOnly"})
_LIST_KEYWORDS = frozenset({"enum", "examples"})
_NULL_IS_A_VALUE = frozenset({"default", "const"})
_NOT_KEPT = frozenset({"nullable", "$schema"})  # OpenAPI's, read below; and the name of a draft that is ours now
_MAX_TYPE_NAME = 100  # characters: bounds the recursion into `list[list[...]]`


_DRAFTS = {
    "draft-04": "http://json-schema.org/draft-04/schema#",
    "draft-06": "http://json-schema.org/draft-06/schema#",
    "draft-07": "http://json-schema.org/draft-07/schema#",
    "2019-09": "https://json-schema.org/draft/2019-09/schema",
    "2020-12": "https://json-schema.org/draft/2020-12/schema",
}


class SchemaError(ValueError):
    """A part of a schema that has no evident meaning; `param` is its path."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param} {problem}")
        self.param = param


def normalize_schema(schema: object, path: str) -> JsonObject | bool:
    """Return `schema` as a proper JSON Schema, leaving the argument as it is.

    A name of a type stands for that type, another string for a description, and None for anything at all.
    Raises SchemaError with `path` and the way from there. The caller bounds the depth.
    """
    if schema is None:
        return {}
    if isinstance(schema, bool):
        return schema
    if isinstance(schema, str):
        return _type_keywords(schema) or {"description": schema}
    if not isinstance(schema, Mapping):
        raise SchemaError(path, f"must be a JSON Schema object, not {describe(schema)}")
    if not all(isinstance(keyword, str) for keyword in schema):
        raise SchemaError(path, "must have strings as keys")
    return _normalize_object(schema, path)


def is_nested_deeper_than(value: object, limit: int) -> bool:
    """Return whether a JSON value has more than so many lists and objects inside each other."""
    level: list[object] = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return any(isinstance(child, Mapping | list | tuple) for child in level)


def with_known_draft(schema: Mapping[str, Any]) -> JsonObject:
    """Return the schema under the proper name of its draft; an unknown name is left out, as it means the newest."""
    name = schema.get("$schema")
    draft = next((uri for sign, uri in _DRAFTS.items() if isinstance(name, str) and sign in name), None)
    others = {keyword: value for keyword, value in schema.items() if keyword != "$schema"}
    return others if draft is None else {"$schema": draft, **others}


def describe(value: object) -> str:
    """Return what kind of JSON value this is, for messages."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (type(None), "null"),
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        ((list, tuple), "an array"),
        (Mapping, "an object"),
    )
    return next((kind for types, kind in kinds if isinstance(value, types)), type(value).__name__)


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _normalize_object(schema: Mapping[str, Any], path: str) -> JsonObject:
    proper: JsonObject = {}
    for keyword, value in schema.items():
        if keyword in _NOT_KEPT or (value is None and keyword not in _NULL_IS_A_VALUE):
            continue
        where = f"{path}.{keyword}"
        if keyword == "type":
            for meant, meaning in _normalize_type(value, where).items():
                proper.setdefault(meant, meaning)
        elif keyword == "required":
            proper.update(_normalize_required(value, where))
        else:
            proper[keyword] = _normalize_keyword(keyword, value, where)
    _hoist_required(proper, schema.get("properties"))
    _drop_empty(proper)
    _modernize_tuple(proper)
    for limit in ("Minimum", "Maximum"):
        _modernize_exclusive_limit(proper, limit)
    _fit_enum(proper)
    if schema.get("nullable") is True:
        _allow_null(proper)
    return proper


def _normalize_keyword(keyword: str, value: Any, path: str) -> Any:
    if keyword == "items" and isinstance(value, list | tuple):
        return [normalize_schema(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if keyword in SUBSCHEMA_KEYWORDS:
        return normalize_schema(value, path)
    if keyword in SUBSCHEMA_LIST_KEYWORDS:
        schemas = [value] if isinstance(value, Mapping) else _expect(list | tuple, "an array of schemas", value, path)
        return [normalize_schema(item, f"{path}[{index}]") for index, item in enumerate(schemas)]
    if keyword in SUBSCHEMA_MAP_KEYWORDS:
        schemas = _expect(Mapping, "an object of schemas", value, path)
        return {name: normalize_schema(item, f"{path}.{name}") for name, item in schemas.items()}
    if keyword in _SCALAR_CHECKS:
        is_good, expected = _SCALAR_CHECKS[keyword]
        if not is_good(value):
            raise SchemaError(path, f"must be {expected}, not {describe(value)}")
    if keyword == "dependencies":
        return _normalize_dependencies(_expect(Mapping, "an object", value, path), path)
    if keyword == "dependentRequired":
        lists = _expect(Mapping, "an object", value, path)
        return {name: _unique_strings(names, f"{path}.{name}") for name, names in lists.items()}
    return value


def _normalize_type(value: object, path: str) -> JsonObject:
    """Return the keywords that say what `value`, under the keyword "type", means."""
    if isinstance(value, str):
        return _type_keywords(value)
    if not isinstance(value, list | tuple):
        raise SchemaError(path, f"must be a type name or an array of type names, not {describe(value)}")
    types: list[str] = []
    for index, name in enumerate(value):
        if name is not None and not isinstance(name, str):
            raise SchemaError(f"{path}[{index}]", f"must be a type name, not {describe(name)}")
        proper = "null" if name is None else _type_keywords(name).get("type")
        if proper is None:
            return {}  # one of them is no constraint, so all of them together are none
        types += proper if isinstance(proper, list) else [proper]
    types = list(dict.fromkeys(types))
    if not types:
        return {}
    return {"type": types[0] if len(types) == 1 else types}


def _type_keywords(name: str) -> JsonObject:
    """Return the keywords a type name stands for; none for a name that constrains nothing or is not known."""
    plain = name.strip().lower().replace("_", "-")
    if plain in _TYPES:
        return {"type": _TYPES[plain]}
    if plain in _STRING_FORMAT_NAMES:
        return {"type": "string", "format": _STRING_FORMAT_NAMES[plain]}
    generic, bracket, arguments = plain.partition("[")
    generic = generic.rpartition(".")[2]
    if not bracket or not arguments.endswith("]") or len(name) > _MAX_TYPE_NAME:
        return {}
    if generic == "optional":
        keywords = _type_keywords(arguments[:-1])
        _allow_null(keywords)
        return keywords
    if generic in _TYPES:
        item = _type_keywords(arguments[:-1])
        return {"type": "array", "items": item} if _TYPES[generic] == "array" and item else {"type": _TYPES[generic]}
    return {}


def _normalize_required(value: object, path: str) -> JsonObject:
    if isinstance(value, bool):  # draft 3's, on the property itself: `_hoist_required` of the parent reads it
        return {}
    return {"required": _unique_strings([value] if isinstance(value, str) else value, path)}


def _normalize_dependencies(dependencies: Mapping[str, Any], path: str) -> JsonObject:
    return {
        name: _unique_strings(value, f"{path}.{name}")
        if isinstance(value, list | tuple)
        else normalize_schema(value, f"{path}.{name}")
        for name, value in dependencies.items()
    }


def _unique_strings(value: object, path: str) -> list[str]:
    names = _expect(list | tuple, "an array of property names", value, path)
    for index, name in enumerate(names):
        _expect(str, "a property name", name, f"{path}[{index}]")
    return list(dict.fromkeys(names))


def _hoist_required(proper: JsonObject, properties: object) -> None:
    """Add to `required` the properties that call themselves required."""
    if not isinstance(properties, Mapping):
        return
    named = [name for name, value in properties.items() if isinstance(value, Mapping) and value.get("required") is True]
    if named:
        proper["required"] = list(dict.fromkeys([*proper.get("required", []), *named]))


def _drop_empty(proper: JsonObject) -> None:
    for keyword in SUBSCHEMA_LIST_KEYWORDS:
        if proper.get(keyword) == []:
            del proper[keyword]


def _modernize_tuple(proper: JsonObject) -> None:
    """Write `items: [..]` and `additionalItems` of older drafts as `prefixItems` and `items`."""
    additional = proper.pop("additionalItems", None)
    if not isinstance(proper.get("items"), list):
        return
    prefix = proper.pop("items")
    if prefix:
        proper["prefixItems"] = prefix
    if additional is not None:
        proper["items"] = additional


def _modernize_exclusive_limit(proper: JsonObject, limit: str) -> None:
    """Write draft 4's `minimum: 3, exclusiveMinimum: true` as `exclusiveMinimum: 3`."""
    exclusive = proper.get(f"exclusive{limit}")
    if not isinstance(exclusive, bool):
        return
    del proper[f"exclusive{limit}"]
    if exclusive and limit.lower() in proper:
        proper[f"exclusive{limit}"] = proper.pop(limit.lower())


def _fit_enum(proper: JsonObject) -> None:
    """Make sense of an `enum` none of whose values has the schema's type, where it has one sense."""
    values, kind = proper.get("enum"), proper.get("type")
    if not values or not isinstance(kind, str) or any(describe(value) in _KINDS_OF[kind] for value in values):
        return
    items = proper.get("items", {})
    if kind == "array" and isinstance(items, dict) and "enum" not in items:
        del proper["enum"]
        proper["items"] = {**items, "enum": values}
        _fit_enum(proper["items"])
        return
    read = [_READ_AS.get(kind, _as_it_is)(value) for value in values]
    if all(describe(value) in _KINDS_OF[kind] for value in read):
        proper["enum"] = read


def _as_it_is(value: object) -> object:
    return value


def _read_json(value: object) -> object:
    """Return what a string says as JSON, `"True"` included."""
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _written(value: object) -> object:
    return json.dumps(value) if describe(value) == "a number" else value


_KINDS_OF = {
    "string": ("a string",),
    "integer": ("a number",),
    "number": ("a number",),
    "boolean": ("a boolean",),
    "array": ("an array",),
    "object": ("an object",),
    "null": ("null",),
}
_READ_AS: dict[str, Callable[[object], object]] = {
    "integer": _read_json,
    "number": _read_json,
    "boolean": _read_json,
    "string": _written,
}


def _allow_null(proper: JsonObject) -> None:
    types = proper.get("type")
    if types is None:
        return
    listed = types if isinstance(types, list) else [types]
    proper["type"] = listed if "null" in listed else [*listed, "null"]


def _expect(types: Any, expected: str, value: Any, path: str) -> Any:
    if not isinstance(value, types):
        raise SchemaError(path, f"must be {expected}, not {describe(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)  # type: ignore[operator, call-overload]


def _is_limit(value: object) -> bool:
    return _is_number(value) or isinstance(value, bool)


_SCALAR_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(_STRING_KEYWORDS, (lambda value: isinstance(value, str), "a string")),
    **dict.fromkeys(_NUMBER_KEYWORDS, (_is_number, "a number")),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), (_is_limit, "a number")),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),  # type: ignore[operator]
    **dict.fromkeys(_COUNT_KEYWORDS, (_is_count, "a count (a whole number from 0 on)")),
    **dict.fromkeys(_BOOLEAN_KEYWORDS, (lambda value: isinstance(value, bool), "a boolean")),
    **dict.fromkeys(_LIST_KEYWORDS, (lambda value: isinstance(value, list | tuple), "an array")),
}
