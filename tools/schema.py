"""What an API request's `tools` may be, and the one form the rest of the house sees them in.

Owns the shape of a tool; the schema of its parameters is read by `json_schema.py`. Accepted are OpenAI's
`{"type": "function", "function": {...}}`, bare function objects, and `{"type": "code_interpreter"}`.
"""

from collections.abc import Mapping
from typing import Any

from .code_call import CODE_TOOL_NAME
from .json_schema import MAX_NESTING, JsonObject, SchemaError, describe, is_nested_deeper_than, normalize_schema

_PARAMETER_OWN_KEYS = frozenset({"name", "required"})


class ToolSchemaError(ValueError):
    """Something that cannot be a tool. The text is one sentence for the user; `param` names the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def normalize_tools(tools: object) -> list[JsonObject]:
    """Return `tools` as OpenAI wrappers around functions whose `parameters` are a JSON Schema of an object.

    `{"type": "code_interpreter"}` stays as it is, and so do members of a function other than name, description and
    parameters. The argument is not changed; None means no tools. Raises ToolSchemaError.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise ToolSchemaError(f"tools must be an array of tools, not {describe(tools)}", "tools")
    try:
        proper = [_normalize_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
        _refuse_one_name_for_two(proper)
    except SchemaError as error:
        raise ToolSchemaError(str(error), error.param) from error
    return proper


def _refuse_one_name_for_two(tools: list[JsonObject]) -> None:
    """A call of such a name would have two schemas to obey."""
    first: dict[str, JsonObject] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function", {})
        if first.setdefault(function.get("name", tool["type"]), tool) != tool:
            raise SchemaError(f"tools[{index}]", f"has the name of another tool, {_show(function['name'])}; rename one")


def _normalize_tool(tool: object, path: str) -> JsonObject:
    if not isinstance(tool, Mapping):
        raise SchemaError(path, f"must be a tool object, not {describe(tool)}")
    if is_nested_deeper_than(tool, MAX_NESTING):
        raise SchemaError(path, f"is nested deeper than {MAX_NESTING} levels; flatten its schema")
    kind = tool.get("type")
    if kind == CODE_TOOL_NAME:
        return {"type": CODE_TOOL_NAME}
    if kind not in (None, "function"):
        raise SchemaError(f"{path}.type", f'must be "function" or "{CODE_TOOL_NAME}", not {_show(kind)}')
    if "function" in tool:
        return {"type": "function", "function": _normalize_function(tool["function"], f"{path}.function")}
    bare = {key: value for key, value in tool.items() if key != "type"}
    where = f"{path}.function" if kind and "name" not in bare else path
    return {"type": "function", "function": _normalize_function(bare, where)}


def _normalize_function(function: object, path: str) -> JsonObject:
    if not isinstance(function, Mapping):
        raise SchemaError(path, f"must be a function object, not {describe(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise SchemaError(f"{path}.name", f"must be the function's name, a string that is not empty, not {_show(name)}")
    proper: JsonObject = {"name": name}
    description = function.get("description")
    if description is not None:
        if not isinstance(description, str):
            raise SchemaError(f"{path}.description", f"must be a string, not {describe(description)}")
        proper["description"] = description
    parameters = function.get("parameters")
    if isinstance(parameters, list | tuple):
        proper["parameters"] = _parameters_from_list(parameters, function.get("required"), path)
        known = {"name", "description", "parameters", "required"}
    else:
        proper["parameters"] = _normalize_parameters(parameters, f"{path}.parameters")
        known = {"name", "description", "parameters"}
    return proper | {key: value for key, value in function.items() if key not in known}


def _normalize_parameters(parameters: object, path: str) -> JsonObject:
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise SchemaError(path, f"must be a JSON Schema object, not {describe(parameters)}")
    schema = normalize_schema(parameters, path)
    assert isinstance(schema, dict)
    proper: JsonObject = schema
    types = proper.get("type", "object")
    if "object" not in (types if isinstance(types, list) else [types]):
        raise SchemaError(
            f"{path}.type", f'must be "object", as arguments are one JSON object, not {_show(parameters["type"])}'
        )
    if "type" in proper:
        proper["type"] = "object"
    else:
        proper = {"type": "object", **proper}
    if "properties" in parameters:
        proper.setdefault("properties", {})
    return proper


def _parameters_from_list(parameters: list[Any] | tuple[Any, ...], required: object, path: str) -> JsonObject:
    """Read the list of named parameters that InternLM's agents describe functions with."""
    properties: JsonObject = {}
    for index, parameter in enumerate(parameters):
        where = f"{path}.parameters[{index}]"
        if not isinstance(parameter, Mapping) or not isinstance(parameter.get("name"), str):
            raise SchemaError(where, "must be an object with the parameter's name")
        schema = {key: value for key, value in parameter.items() if key not in _PARAMETER_OWN_KEYS}
        properties[parameter["name"]] = normalize_schema(schema, where)
    proper: JsonObject = {"type": "object", "properties": properties}
    listed = normalize_schema({"required": required}, path)
    assert isinstance(listed, dict)
    named = [parameter["name"] for parameter in parameters if parameter.get("required") is True]
    names = list(dict.fromkeys([*listed.get("required", []), *named]))
    return proper | ({"required": names} if names else {})


def _show(value: object) -> str:
    if value is None:
        return "null"
    return f'"{value[:80]}"' if isinstance(value, str) else describe(value)
