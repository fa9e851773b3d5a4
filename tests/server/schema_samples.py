"""Schemas of tool arguments in great variety: hand-written ones, and ones made at random from a seed."""

import random
from typing import Any

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
WRITTEN: list[Any] = [
    None,
    {"type": "object", "properties": {}},
    CITY,
    {**CITY, "additionalProperties": False},
    {"type": "object", "properties": {"unit": {"enum": ["°C", "华氏", "\"quoted\"", "a\\b", None, 3]}},
     "required": ["unit"]},
    {"type": "object", "properties": {"名字": {"type": "string", "pattern": "^[一-十]{1,3}$"}}, "required": ["名字"],
     "additionalProperties": False},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 12}}, "required": ["n"],
     "additionalProperties": False},
    {"type": "object", "properties": {"x": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}, "required": ["x"],
     "additionalProperties": False},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date"}}, "required": ["when"],
     "additionalProperties": False},
    {"type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}}, "required": ["tree"],
     "additionalProperties": False,
     "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"},
               "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"],
               "additionalProperties": False}}},
    {"type": "dict", "properties": {"names": {"type": "list[str]", "minItems": 1, "maxItems": 2},
                                    "flag": {"type": "bool", "required": True}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}],
     "items": False, "minItems": 2}}, "required": ["a"], "additionalProperties": False},
]  # fmt: skip
SLOPPY: list[Any] = [
    {"type": "HashMap", "properties": {"a": {"type": "String"}, "b": {"type": "ArrayList", "items": "int"}}},
    {"properties": {"a": {"type": "any"}, "b": {"type": "float", "required": True}, "c": {"type": ["str", None]}}},
    {"type": "object", "properties": {"a": {"type": "string", "nullable": True}, "b": {"type": "tuple[int]"}}},
    {"type": "object", "properties": {"a": {"items": [{"type": "int"}, {"type": "bool"}], "additionalItems": False}}},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "exclusiveMinimum": True}}},
    {"type": "object", "properties": {"a": {"type": "datetime"}, "b": {"type": "Optional[int]"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "string", "format": "int32"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "list", "items": {"enum": [1, 2]}, "uniqueItems": True,
     "minItems": 2, "maxItems": 2}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 3, "not": {"const": 0}}},
     "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 5}]}}},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "minProperties": 1,
     "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "patternProperties": {"^x_": {"type": "string"}}, "additionalProperties": False},
]  # fmt: skip
"""Types of other languages, older drafts' ways, and keywords that no grammar enforces."""


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of an object whose values end soon."""
    names = rng.sample(["id", "name", "größe", "标题", "a b", "x-1", "$y", 'quote"d'], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value_schema(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _value_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    plain: list[dict[str, Any]] = [
        {"type": "string", "maxLength": rng.randint(0, 6)},
        {"type": "string", "pattern": "^[a-f]{2,4}$"},
        {"type": "integer", "minimum": rng.randint(-9, 0), "maximum": rng.randint(1, 99)},
        {"type": "number", "minimum": 0, "maximum": 10},
        {"type": "boolean"},
        {"enum": rng.sample(["red", "grün", "蓝", 1, 2.5, None, True, {"k": [1]}], 3)},
        {"const": rng.choice(["c", 7, None])},
        {"type": ["integer", "null"], "minimum": 0, "maximum": 7},
    ]
    if depth <= 0 or rng.random() < 0.6:
        return rng.choice(plain)
    return rng.choice([
        random_schema(rng, depth),
        {"type": "array", "items": _value_schema(rng, depth - 1), "maxItems": 2},
        {"anyOf": [_value_schema(rng, depth - 1), {"type": "null"}]},
    ])  # fmt: skip


def tool(name: str, parameters: Any, **members: Any) -> dict[str, Any]:
    """Return a function with these parameters."""
    function = {"name": name, **members} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}
