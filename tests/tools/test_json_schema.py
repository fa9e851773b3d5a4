"""Sloppy schemas made proper, judged by jsonschema's own description of draft 2020-12."""

import copy
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdserve.tools.json_schema import SchemaError, normalize_schema


def is_proper(schema: Any) -> bool:
    return jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA).is_valid(schema)


def test_the_judge_refuses_sloppy_schemas():
    for sloppy in ({"type": "int"}, {"items": [{}]}, {"properties": {"a": None}}, {"anyOf": [{"required": True}]}):
        assert not is_proper(sloppy)


@pytest.mark.parametrize(
    ("sloppy", "proper"),
    [
        *(({"type": name}, {"type": "integer"}) for name in ("int", "INT", " Integer ", "long", "int64")),
        *(({"type": name}, {"type": "number"}) for name in ("float", "Double", "decimal", "number")),
        *(({"type": name}, {"type": "string"}) for name in ("str", "String", "STRING", "text")),
        *(({"type": name}, {"type": "boolean"}) for name in ("bool", "Boolean")),
        *(({"type": name}, {"type": "array"}) for name in ("list", "List", "tuple", "set", "List[Any]")),
        *(({"type": name}, {"type": "object"}) for name in ("dict", "map", "Dict[str, Any]", "typing.Dict[str, int]")),
        *(({"type": name}, {"type": "null"}) for name in ("None", "NoneType", "nil")),
        *(({"type": name}, {}) for name in ("any", "Any", "", "Foo", "Foo[int]", "list[", "mixed", [], [None, "any"])),
        ({"type": "date"}, {"type": "string", "format": "date"}),
        ({"type": "datetime", "format": "x"}, {"type": "string", "format": "x"}),
        ({"type": "list[int]"}, {"type": "array", "items": {"type": "integer"}}),
        ({"type": "integer", "enum": ["1", "20"]}, {"type": "integer", "enum": [1, 20]}),
        ({"type": "boolean", "enum": ["True", "false"]}, {"type": "boolean", "enum": [True, False]}),
        ({"type": "string", "enum": [1, 2.5]}, {"type": "string", "enum": ["1", "2.5"]}),
        ({"type": "array", "enum": ["a"]}, {"type": "array", "items": {"enum": ["a"]}}),
        (
            {"type": "array", "items": {"type": "int"}, "enum": ["1"]},
            {"type": "array", "items": {"type": "integer", "enum": [1]}},
        ),
        *(
            ({"type": kind, "enum": values}, {"type": kind, "enum": values})
            for kind, values in (
                ("integer", [1, "2"]),
                ("integer", ["one"]),
                ("array", [["a"]]),
                ("string", [None]),
                ("object", ["a"]),
                ("boolean", ["yes"]),
            )
        ),
        ({"type": "List[Optional[str]]"}, {"type": "array", "items": {"type": ["string", "null"]}}),
        ({"items": {"const": 1}, "type": "list[int]"}, {"items": {"const": 1}, "type": "array"}),
        ({"type": "Optional[float]"}, {"type": ["number", "null"]}),
        ({"type": ["str", "int"]}, {"type": ["string", "integer"]}),
        ({"type": ["str", "STRING", None]}, {"type": ["string", "null"]}),
        ({"type": ["str", "string"]}, {"type": "string"}),
        ({"type": ["str", "any"]}, {}),
        ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
        ({"type": ["str", "null"], "nullable": True}, {"type": ["string", "null"]}),
        ({"nullable": True}, {}),
        ({"type": None, "description": None, "enum": None, "items": None, "required": None}, {}),
        ({"properties": None, "$defs": None, "anyOf": None, "additionalProperties": None}, {}),
        ({"default": None, "const": None}, {"default": None, "const": None}),
        ({"enum": [None, 1, "a"]}, {"enum": [None, 1, "a"]}),
        ({"anyOf": []}, {}),
        ({"anyOf": {"type": "int"}}, {"anyOf": [{"type": "integer"}]}),
        ({"items": [{"type": "int"}]}, {"prefixItems": [{"type": "integer"}]}),
        ({"items": []}, {}),
        (
            {"items": [{"type": "int"}], "additionalItems": {"type": "str"}},
            {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}},
        ),
        ({"items": {"type": "int"}, "additionalItems": False}, {"items": {"type": "integer"}}),
        ({"minimum": 3, "exclusiveMinimum": True}, {"exclusiveMinimum": 3}),
        ({"maximum": 3, "exclusiveMaximum": False}, {"maximum": 3}),
        ({"exclusiveMaximum": True}, {}),
        ({"required": "a"}, {"required": ["a"]}),
        ({"required": ["a", "b", "a"]}, {"required": ["a", "b"]}),
        (
            {"properties": {"a": {"type": "int", "required": True}, "b": {"required": False}}, "required": ["c"]},
            {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["c", "a"]},
        ),
        (
            {"properties": {"a": "str", "b": "The city.", "c": None, "d": True}},
            {"properties": {"a": {"type": "string"}, "b": {"description": "The city."}, "c": {}, "d": True}},
        ),
        (
            {"dependencies": {"a": ["b"], "c": {"type": "dict"}}},
            {"dependencies": {"a": ["b"], "c": {"type": "object"}}},
        ),
        ({"dependentRequired": {"a": ["b", "b"]}}, {"dependentRequired": {"a": ["b"]}}),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "x-order": [1]}, {"x-order": [1]}),
    ],
)
def test_sloppy_becomes_proper(sloppy, proper):
    before = copy.deepcopy(sloppy)
    normal = normalize_schema(sloppy, "s")
    assert normal == proper
    assert list(normal) == list(proper) or "type" not in proper
    assert is_proper(normal)
    assert sloppy == before


@pytest.mark.parametrize("keyword", ["items", "contains", "additionalProperties", "not", "if", "then", "else"])
def test_nested_schema(keyword):
    assert normalize_schema({keyword: {"type": "int"}}, "s") == {keyword: {"type": "integer"}}


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf", "prefixItems"])
def test_nested_list_of_schemas(keyword):
    schema = {keyword: [{"type": "int"}, {"items": {"type": "str"}}]}
    assert normalize_schema(schema, "s") == {keyword: [{"type": "integer"}, {"items": {"type": "string"}}]}


@pytest.mark.parametrize("keyword", ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
def test_nested_map_of_schemas(keyword):
    """A property may be called like a keyword."""
    schema = {keyword: {"type": {"type": "int"}, "required": {"type": "bool"}}}
    assert normalize_schema(schema, "s") == {keyword: {"type": {"type": "integer"}, "required": {"type": "boolean"}}}


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        (3, "s"),
        ([], "s"),
        ({1: 2}, "s"),
        ({"type": 3}, "s.type"),
        ({"type": {"type": "string"}}, "s.type"),
        ({"type": ["string", 1]}, "s.type[1]"),
        ({"required": 1}, "s.required"),
        ({"required": ["a", 1]}, "s.required[1]"),
        ({"required": {"a": True}}, "s.required"),
        ({"enum": "a"}, "s.enum"),
        ({"description": 1}, "s.description"),
        ({"minimum": "1"}, "s.minimum"),
        ({"minimum": True}, "s.minimum"),
        ({"exclusiveMinimum": "1"}, "s.exclusiveMinimum"),
        ({"multipleOf": 0}, "s.multipleOf"),
        ({"maximum": float("inf")}, "s.maximum"),
        ({"minLength": -1}, "s.minLength"),
        ({"maxItems": 1.5}, "s.maxItems"),
        ({"uniqueItems": "yes"}, "s.uniqueItems"),
        ({"properties": ["a"]}, "s.properties"),
        ({"anyOf": "x"}, "s.anyOf"),
        ({"dependentRequired": {"a": 1}}, "s.dependentRequired.a"),
        ({"properties": {"a": {"anyOf": [{}, {"items": {"type": 1}}]}}}, "s.properties.a.anyOf[1].items.type"),
        ({"items": [{}, {"enum": 1}]}, "s.items[1].enum"),
        ({"$defs": {"d": 1}}, "s.$defs.d"),
    ],
)
def test_what_means_nothing_is_named(schema, param):
    with pytest.raises(SchemaError) as caught:
        normalize_schema(schema, "s")
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param} must ")


def test_a_very_long_type_name_does_not_recurse():
    assert normalize_schema({"type": "list[" * 5000 + "]" * 5000}, "s") == {}


KEYWORDS = [
    *("type", "properties", "required", "items", "anyOf", "enum", "description", "default", "additionalProperties"),
    *("prefixItems", "minimum", "exclusiveMinimum", "multipleOf", "maxItems", "uniqueItems", "format", "nullable"),
    *("additionalItems", "dependencies", "dependentRequired", "$defs", "not", "examples", "title", "deprecated", "x"),
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.floats(-2, 2)
    | st.sampled_from(["int", "str", "string", "dict", "list[int]", "any", "Optional[bool]", "a b", "", "date"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS), children, max_size=4)
        | st.dictionaries(st.sampled_from("ab"), children, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=5))
def test_whatever_comes_it_is_proper_or_an_error_and_stays_as_it_is(schema):
    try:
        normal = normalize_schema(schema, "s")
    except SchemaError:
        return
    assert is_proper(normal)
    assert normalize_schema(normal, "s") == normal


PROPER_KEYWORDS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["integer", "string", ["array", "null"], "object"]),
        "enum": st.lists(st.integers(0, 3), max_size=3, unique=True).map(lambda values: [*values, 9, "a", [], {}]),
        "minimum": st.integers(0, 3),
        "required": st.lists(st.sampled_from("ab"), max_size=2, unique=True),
        "maxItems": st.integers(0, 2),
    },
)
PROPER = st.recursive(
    PROPER_KEYWORDS,
    lambda schemas: st.builds(
        lambda own, nested: {**own, **nested},
        PROPER_KEYWORDS,
        st.fixed_dictionaries(
            {},
            optional={
                "properties": st.dictionaries(st.sampled_from("ab"), schemas, max_size=2),
                "items": schemas,
                "anyOf": st.lists(schemas, min_size=1, max_size=2),
                "not": schemas,
            },
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(PROPER)
def test_a_proper_schema_is_left_alone(schema):
    assert is_proper(schema)
    assert normalize_schema(schema, "s") == schema
