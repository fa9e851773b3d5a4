"""Python functions as tools: the schema of one from its signature and docstring, and running it on a call's arguments.

Owns what a function may look like: parameters with the annotations below, which are JSON's types and what is made of
them. Descriptions come from the docstring: its text up to the first section, and of each parameter from an `Args:`
section or `:param name:` lines, or from `Annotated[int, "..."]`. Needs only the standard library.
"""

import asyncio
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

Json = dict[str, Any]

MAX_NAME_CHARS = 64
_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARRAYS = (list, tuple, set, frozenset, Sequence)
_OBJECTS = (dict, Mapping)
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Notes?):\s*$")
_ARGUMENT_SECTIONS = ("Args", "Arguments", "Parameters")
_GOOGLE_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_SPHINX_ENTRY = re.compile(r"^:param\s+(?:[^:]*\s)?(\w+):\s*(.*)$")


class FunctionToolError(ValueError):
    """A function that cannot be a tool; the text names it and says what to change."""


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """A function and what a model is told of it, in OpenAI's shape."""

    function: Callable[..., Any]
    definition: Json

    @property
    def name(self) -> str:
        """The name that calls of it carry."""
        return str(self.definition["function"]["name"])

    async def run(self, arguments: str) -> str:
        """Call the function with a JSON object's members and return its result as text.

        Whatever goes wrong is a text too, for the model to read and try again. A function that is not a coroutine runs
        in a thread, so it may take its time.
        """
        try:
            bound = self._bind(arguments)
            if inspect.iscoroutinefunction(self.function):
                result = await self.function(**bound)
            else:
                result = await asyncio.to_thread(self.function, **bound)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"

    def _bind(self, arguments: str) -> Json:
        values = json.loads(arguments or "{}")
        if not isinstance(values, dict):
            raise TypeError("the arguments are not a JSON object")
        inspect.signature(self.function).bind(**values)
        hints = _type_hints(self.function)
        return {name: _from_json(value, hints.get(name, Any)) for name, value in values.items()}


def function_tool(function: Callable[..., Any]) -> FunctionTool:
    """Return a function as a tool; FunctionToolError says why it cannot be one."""
    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"\w+", name, re.ASCII) or len(name) > MAX_NAME_CHARS:
        raise FunctionToolError(
            f"{function!r} has no name of up to {MAX_NAME_CHARS} letters, digits and underscores; "
            "define it with def, under such a name"
        )
    signature = inspect.signature(function)
    description, parameter_texts = _read_docstring(inspect.getdoc(function) or "", signature.parameters)
    hints = _type_hints(function)
    properties: Json = {}
    required: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise FunctionToolError(
                f"{name}: the parameter {parameter} cannot be given by name, as a model gives them; use named ones"
            )
        try:
            schema = _schema(hints.get(parameter.name, Any))
        except TypeError as error:
            raise FunctionToolError(f"{name}: the parameter {parameter.name}: {error}") from None
        if parameter.name in parameter_texts:
            schema.setdefault("description", parameter_texts[parameter.name])
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif _is_json(parameter.default):
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    parameters: Json = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    about = {"description": description} if description else {}
    return FunctionTool(function, {"type": "function", "function": {"name": name, **about, "parameters": parameters}})


def load_function_tools(path: Path) -> dict[str, FunctionTool]:
    """Run a Python file and return the functions it defines as tools; names that begin with _ are left out."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    except Exception as error:  # the file is the user's code, and raises what it likes
        raise FunctionToolError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    members = vars(module).items()
    own = [
        member
        for name, member in members
        if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not own:
        raise FunctionToolError(f"{path} defines no functions whose names begin without _")
    return function_tools(own)


def function_tools(functions: Sequence[Callable[..., Any]]) -> dict[str, FunctionTool]:
    """Return functions as tools, by name; no two may share one."""
    tools: dict[str, FunctionTool] = {}
    for function in functions:
        tool = function_tool(function)
        if tool.name in tools:
            raise FunctionToolError(f"two functions have the name {tool.name}; rename one")
        tools[tool.name] = tool
    return tools


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # annotations are code, and raise what they like
        raise FunctionToolError(f"{function!r}: its annotations cannot be read: {error}") from error


def _schema(hint: Any) -> Json:
    """Return the JSON Schema of an annotation; TypeError for one that is no JSON."""
    if hint is Any:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        described = next((text for text in arguments[1:] if isinstance(text, str)), None)
        return _schema(arguments[0]) | ({} if described is None else {"description": described})
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _union([_schema(argument) for argument in arguments])
    if origin in _ARRAYS:
        return _array(origin, arguments)
    if origin in _OBJECTS:
        if arguments and arguments[0] is not str:
            raise TypeError(f"the keys of {hint} must be str, as JSON's are")
        return {"type": "object"} | ({"additionalProperties": _schema(arguments[1])} if arguments else {})
    raise TypeError(
        f"{hint} is not understood; use str, int, float, bool, None, list, tuple, dict, Literal, an Enum, "
        "or unions of them"
    )


def _union(schemas: list[Json]) -> Json:
    if all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def _array(origin: Any, arguments: tuple[Any, ...]) -> Json:
    schema: Json = {"type": "array"}
    if origin in (set, frozenset):
        schema["uniqueItems"] = True
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        size = len(arguments)
        return schema | {"prefixItems": [_schema(item) for item in arguments], "minItems": size, "maxItems": size}
    return schema | ({"items": _schema(arguments[0])} if arguments else {})


def _from_json(value: Any, hint: Any) -> Any:
    """Return a JSON value as what the annotation asks for, where JSON has no such type."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _from_json(value, arguments[0])
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if isinstance(kind, type) and issubclass(kind, enum.Enum)]
        fitting = (kind for kind in kinds if value in [member.value for member in kind])
        return _from_json(value, next(fitting, Any))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin in (tuple, set, frozenset) and isinstance(value, list):
        return origin(value)
    return value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, enum.Enum)


def _read_docstring(text: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Return the description, and what is said of each of the parameters `names`."""
    description: list[str] = []
    parameters: dict[str, str] = {}
    section, current = "", ""
    for line in text.splitlines():
        stripped = line.strip()
        heading, sphinx = _SECTION.match(line), _SPHINX_ENTRY.match(stripped)
        if heading:
            section, current = heading[1], ""
        elif sphinx:
            section, current = "Args", sphinx[1]
            parameters[current] = sphinx[2]
        elif stripped.startswith(":"):
            section, current = "Returns", ""
        elif not section:
            description.append(stripped)
        elif section in _ARGUMENT_SECTIONS and stripped:
            entry = _GOOGLE_ENTRY.match(stripped)
            if entry and entry[1] in names:
                current = entry[1]
                parameters[current] = entry[2]
            elif current:
                parameters[current] = f"{parameters[current]} {stripped}".strip()
    return "\n".join(description).strip(), parameters
