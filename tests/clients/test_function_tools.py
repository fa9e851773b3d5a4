"""Functions as tools: schemas against hand-written ones and jsonschema, and calls with good and bad arguments."""

import asyncio
import enum
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest

from lmdserve.clients.function_tools import FunctionToolError, function_tool, function_tools, load_function_tools


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


def weather(city: str, unit: Unit = Unit.CELSIUS, *, days: int = 1) -> dict[str, Any]:
    """Forecast the weather.

    Looks a few days ahead.

    Args:
        city: The city's name,
            in English: any spelling
        days (int): How many days

    Returns:
        city: not a parameter here
    """
    return {"city": city, "unit": unit.name, "days": days, "天气": "晴"}


def test_a_schema_from_signature_and_docstring() -> None:
    assert function_tool(weather).definition == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast the weather.\n\nLooks a few days ahead.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city's name, in English: any spelling"},
                    "unit": {"enum": ["c", "f"]},
                    "days": {"type": "integer", "description": "How many days", "default": 1},
                },
                "required": ["city"],
            },
        },
    }


def test_other_docstrings() -> None:
    def sphinx(a: int, b: str) -> None:
        """Do it.

        :param a: The first
        :param str b: The second
        :returns: nothing
        """

    def annotated(a: Annotated[int, "From the annotation"], b: Any) -> None:
        pass

    properties = function_tool(sphinx).definition["function"]["parameters"]["properties"]
    assert [schema["description"] for schema in properties.values()] == ["The first", "The second"]
    definition = function_tool(annotated).definition["function"]
    assert "description" not in definition
    assert definition["parameters"]["properties"] == {
        "a": {"type": "integer", "description": "From the annotation"},
        "b": {},
    }


@pytest.mark.parametrize(
    ("hint", "valid", "invalid"),
    [
        (str, ["a"], [1, None]),
        (int, [1], ["1", 1.5]),
        (float, [1, 1.5], ["1"]),
        (bool, [True], [1]),
        (None, [None], [0]),
        (int | None, [1, None], ["a"]),
        (str | list[int], ["a", [1]], [1, ["a"]]),
        (Literal["a", 1], ["a", 1], ["b", 2]),
        (Unit, ["c"], ["CELSIUS"]),
        (Unit | None, ["c", None], ["x"]),
        (list[str], [[], ["a"]], [["a", 1], "a"]),
        (Sequence[int], [[1]], [["a"]]),
        (tuple[int, str], [[1, "a"]], [[1], ["a", 1], [1, "a", 2]]),
        (tuple[int, ...], [[], [1, 2]], [["a"]]),
        (set[int], [[1, 2]], [[1, 1]]),
        (dict[str, list[int]], [{}, {"a": [1]}], [{"a": 1}, []]),
        (Mapping[str, Any], [{"a": None}], [1]),
        (list, [[1, "a"]], [{}]),
        (Any, [1, None, {}], []),
    ],
)
def test_annotations_allow_what_they_say(hint: Any, valid: list[Any], invalid: list[Any]) -> None:
    def function(value: Any) -> None: ...

    function.__annotations__["value"] = hint
    schema = function_tool(function).definition["function"]["parameters"]
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    assert [value for value in valid if not validator.is_valid({"value": value})] == []
    assert [value for value in invalid if validator.is_valid({"value": value})] == []


def test_functions_that_cannot_be_tools() -> None:
    def positional(a: int, /) -> None: ...

    def variable(*args: int) -> None: ...

    def unknown(a: bytes) -> None: ...

    def bad_keys(a: dict[int, str]) -> None: ...

    def unresolved(a: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for function, text in ((positional, "a: int"), (variable, r"\*args"), (unknown, "bytes"), (bad_keys, "keys"),
                           (unresolved, "Nowhere"), (lambda a: a, "lambda")):  # fmt: skip
        with pytest.raises(FunctionToolError, match=text):
            function_tool(function)
    with pytest.raises(FunctionToolError, match="two functions"):
        function_tools([weather, weather])


async def test_calls_give_text() -> None:
    tool = function_tool(weather)
    text = await tool.run('{"city": "Oslo", "unit": "f"}')
    assert text == '{"city": "Oslo", "unit": "FAHRENHEIT", "days": 1, "天气": "晴"}'

    def plain() -> str:
        return f"in {threading.current_thread() is threading.main_thread()}"

    assert await function_tool(plain).run("") == "in False", "a function that takes long blocks nothing"

    async def slow(items: tuple[int, ...], share: float) -> list[object]:
        await asyncio.sleep(0)
        return [items, share]

    assert await function_tool(slow).run('{"items": [1], "share": 1}') == "[[1], 1.0]"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("{", "error: JSONDecodeError"),
        ("[]", "error: TypeError: the arguments are not a JSON object"),
        ("{}", "error: TypeError: missing a required argument: 'city'"),
        ('{"city": "a", "country": "b"}', "error: TypeError: got an unexpected keyword argument 'country'"),
        ('{"city": "a", "unit": "kelvin"}', "error: ValueError: 'kelvin' is not a valid Unit"),
    ],
)
async def test_what_goes_wrong_is_told_to_the_model(arguments: str, text: str) -> None:
    assert (await function_tool(weather).run(arguments)).startswith(text)


def test_functions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from json import dumps\nfrom typing import Literal\n"
        "def _helper(): ...\n"
        "def pick(x: 'Literal[1, 2]') -> str:\n    '''Pick'''\n    return dumps(x)\n"
        "name = 'no function'\n"
    )
    tools = load_function_tools(path)
    assert list(tools) == ["pick"]
    assert tools["pick"].definition["function"]["parameters"]["properties"] == {"x": {"enum": [1, 2]}}
    for text, problem in (("x = 1", "defines no functions"), ("1/0", "ZeroDivisionError"), ("def", "SyntaxError")):
        path.write_text(text)
        with pytest.raises(FunctionToolError, match=problem):
            load_function_tools(path)
    with pytest.raises(FunctionToolError, match="No such file"):
        load_function_tools(tmp_path / "nowhere.py")
