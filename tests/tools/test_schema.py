"""What a request's tools may be."""

import copy

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdserve.tools.json_schema import MAX_NESTING
from lmdserve.tools.schema import ToolSchemaError, normalize_tools

NOTHING = {"type": "object", "properties": {}}


def function(**members):
    return {"type": "function", "function": {"name": "f", **members}}


def test_no_tools():
    assert normalize_tools(None) == []
    assert normalize_tools([]) == []


@pytest.mark.parametrize(
    ("tool", "parameters"),
    [
        (function(), NOTHING),
        (function(parameters=None), NOTHING),
        (function(parameters={}), {"type": "object"}),
        ({"name": "f"}, NOTHING),
        ({"type": "function", "name": "f", "parameters": None}, NOTHING),
        ({"function": {"name": "f"}}, NOTHING),
        (function(parameters={"type": "dict", "properties": None}), NOTHING),
        (function(parameters={"properties": None, "required": None}), NOTHING),
        (function(parameters={"type": ["object", "null"]}), {"type": "object"}),
        (function(parameters={"type": "any"}), {"type": "object"}),
        (
            function(parameters={"properties": {"a": {"type": "int"}}, "required": ["a"]}),
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        ),
        (
            {"name": "f", "parameters": [{"name": "q", "type": "STRING", "description": "?"}], "required": ["q"]},
            {"type": "object", "properties": {"q": {"type": "string", "description": "?"}}, "required": ["q"]},
        ),
        (
            {"name": "f", "parameters": [{"name": "a", "type": "NUMBER", "required": True}, {"name": "b"}]},
            {"type": "object", "properties": {"a": {"type": "number"}, "b": {}}, "required": ["a"]},
        ),
        ({"name": "f", "parameters": []}, NOTHING),
    ],
)
def test_the_forms_of_a_function(tool, parameters):
    before = copy.deepcopy(tool)
    (normal,) = normalize_tools([tool])
    assert normal == function(parameters=parameters)
    jsonschema.Draft202012Validator.check_schema(normal["function"]["parameters"])
    assert tool == before


def test_members_stay_in_the_order_that_prompts_show():
    tool = {"description": "d", "strict": False, "parameters": NOTHING, "name": "f", "returns": "a number"}
    (normal,) = normalize_tools([tool])
    assert list(normal["function"]) == ["name", "description", "parameters", "strict", "returns"]
    assert normal["function"]["returns"] == "a number"


def test_the_order_of_schema_keywords_is_the_callers():
    schema = {"description": "d", "type": "dict", "required": ["b"], "properties": {"b": {}, "a": {}}}
    (normal,) = normalize_tools([function(parameters=schema)])
    assert list(normal["function"]["parameters"]) == list(schema)
    assert list(normal["function"]["parameters"]["properties"]) == ["b", "a"]


def test_the_interpreter_is_a_tool():
    assert normalize_tools([{"type": "code_interpreter", "container": None}]) == [{"type": "code_interpreter"}]


def test_a_tool_may_be_offered_twice():
    assert normalize_tools([{"name": "f"}, {"name": "f"}]) == [function(parameters=NOTHING)] * 2


def test_a_null_description_is_none():
    assert normalize_tools([function(description=None)]) == [function(parameters=NOTHING)]


def nested(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("tools", "param", "words"),
    [
        ({"name": "f"}, "tools", "array"),
        ("f", "tools", "array"),
        (["f"], "tools[0]", "a string"),
        ([None], "tools[0]", "null"),
        ([{"name": "f"}, {"type": "function", "function": {}}], "tools[1].function.name", "null"),
        ([{}], "tools[0].name", "null"),
        ([{"type": "function"}], "tools[0].function.name", "null"),
        ([{"name": "f"}, {"name": "g"}, {"name": "f", "parameters": {"title": "T"}}], "tools[2]", '"f"'),
        ([{"type": "function", "function": None}], "tools[0].function", "null"),
        ([{"type": "web_search"}], "tools[0].type", '"web_search"'),
        ([{"type": 1, "name": "f"}], "tools[0].type", "a number"),
        ([function(name="")], "tools[0].function.name", '""'),
        ([function(name=" \n")], "tools[0].function.name", "not empty"),
        ([function(name=7)], "tools[0].function.name", "a number"),
        ([function(description=7)], "tools[0].function.description", "a number"),
        ([function(parameters="x")], "tools[0].function.parameters", "a string"),
        ([function(parameters=True)], "tools[0].function.parameters", "a boolean"),
        ([function(parameters={"type": "str"})], "tools[0].function.parameters.type", '"str"'),
        ([function(parameters={"type": ["int", "null"]})], "tools[0].function.parameters.type", "an array"),
        ([function(parameters=[{"type": "int"}])], "tools[0].function.parameters[0]", "name"),
        ([{"name": "f", "parameters": [{"name": "a", "enum": 1}]}], "tools[0].parameters[0].enum", "a number"),
        (
            [function(parameters={"properties": {"a": {"items": {"type": 1}}}})],
            "tools[0].function.parameters.properties.a.items.type",
            "a number",
        ),
        ([function(parameters={"default": nested(MAX_NESTING)})], "tools[0]", f"{MAX_NESTING} levels"),
        ([function(parameters=nested(100_000))], "tools[0]", f"{MAX_NESTING} levels"),
    ],
)
def test_what_cannot_be_a_tool_is_named(tools, param, words):
    with pytest.raises(ToolSchemaError) as caught:
        normalize_tools(tools)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)
    assert words in str(caught.value)


def test_the_deepest_nesting_that_is_accepted():
    assert normalize_tools([function(parameters={"default": nested(MAX_NESTING - 4)})])
    schema: dict = {"type": "int"}
    for _ in range((MAX_NESTING - 6) // 2):
        schema = {"properties": {"x": schema}}
    assert normalize_tools([function(parameters=schema)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "parameters", "required", "properties"]), children
        )
    ),
    max_leaves=15,
)


@given(JSON)
def test_any_json_is_tools_or_a_named_error(tools):
    try:
        normal = normalize_tools(tools)
    except ToolSchemaError:
        return
    assert normalize_tools(normal) == normal
