"""Parameters and tool definitions as users type them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmdserve.clients.settings import SettingError, load_tools, parse_params, tool_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("   ", {}),
        ("temperature=0.8 top_p=0.8 max_tokens=20", {"temperature": 0.8, "top_p": 0.8, "max_tokens": 20}),
        ("temperature=0", {"temperature": 0}),
        ("ignore_eos=true", {"ignore_eos": True}),
        ('stop=["a b", "c=d"]  seed=5', {"stop": ["a b", "c=d"], "seed": 5}),
        ('stop="two words"', {"stop": "two words"}),
        ("stop=END", {"stop": "END"}),
        ("stop=null", {"stop": "null"}),
        ("tool_choice=auto", {"tool_choice": "auto"}),
        ('logit_bias={"5": -100}', {"logit_bias": {"5": -100}}),
        ("seed= top_k=3", {"seed": None, "top_k": 3}),
        ("seed=", {"seed": None}),
    ],
)
def test_assignments_are_read(text: str, expected: dict[str, Any]) -> None:
    assert parse_params(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperatur=1", "unknown parameter 'temperatur'; did you mean 'temperature'"),
        ("zzz=1", "unknown parameter 'zzz'; known: temperature, top_p"),
        ("n=2", "unknown parameter 'n'"),
        ("temperature", "'temperature' is not of the form name=value"),
        ("temperature 0.8", "'temperature' is not of the form name=value"),
        ("top_k=1 oops", "'oops' is not of the form name=value"),
        ("temperature=hot", "temperature takes a number, not 'hot'"),
        ("temperature=true", "temperature takes a number, not True"),
        ("seed=1.5", "seed takes a whole number, not 1.5"),
        ("ignore_eos=1", "ignore_eos takes true or false, not 1"),
        ("stop=5", "stop takes text or a JSON list, not 5"),
        ('stop=["a"', "the value of stop is not valid JSON"),
        ('logit_bias=["a"]', "logit_bias takes a JSON object"),
    ],
)
def test_a_wrong_assignment_is_explained(text: str, expected: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_params(text)
    assert expected in str(caught.value)


ADD = {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}}


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "function", "function": ADD}],
        [ADD],
        {"tools": [{"type": "function", "function": ADD}]},
        [{"type": "function", **ADD}],
    ],
)
def test_tools_come_out_in_openais_shape(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(content))
    assert load_tools(path) == [{"type": "function", "function": ADD}]


def test_a_tool_of_another_type_is_left_to_the_server(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([ADD, {"type": "code_interpreter"}]))
    tools = load_tools(path)
    assert tools[1] == {"type": "code_interpreter"}
    assert [tool_name(tool) for tool in tools] == ["add", "code_interpreter"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no list of tools"),
        ("5", "holds no list of tools"),
        ('{"functions": []}', "holds no list of tools"),
        ("[5]", "tool 1 is not a JSON object"),
        ('[{"name": "a"}, {"name": ""}]', "tool 2 has no function with a name"),
        ('[{"type": "function", "function": "add"}]', "tool 1 has no function with a name"),
        ('[{"name": "a", "parameters": []}]', "the parameters of 'a' are not a JSON schema object"),
        ('[{"name": "a"}, {"name": "a"}]', "defines 'a' twice"),
    ],
)
def test_a_wrong_tool_file_is_explained(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    with pytest.raises(SettingError) as caught:
        load_tools(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot read .*none\.json: No such file"):
        load_tools(tmp_path / "none.json")


def test_bytes_that_are_not_text_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(SettingError, match="is not valid JSON"):
        load_tools(path)
