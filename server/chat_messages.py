"""Messages as the API has them -> messages as chat templates expect them. Owns that mapping and its errors.

* `developer` becomes `system`, its older name. `environment` (InternLM's name of a tool's result) becomes `tool` for
  templates that do not know it.
* Content as a list of text parts becomes one string, the parts separated by a newline: clients send parts as separate
  blocks, and run together they would read wrong. Content None becomes "", as it stands beside tool calls.
* The arguments of earlier tool calls become objects: the API has them as JSON text, templates print them as JSON.
* Several calls in one turn become turns with one call each, where the template refuses them otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "environment"})


class ChatTemplateError(ValueError):
    """Messages that the model's chat template cannot render; `param` names the place in the API's terms."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def template_messages(messages: Sequence[Mapping[str, Any]], *, knows_environment: bool) -> list[dict[str, Any]]:
    """Return the messages for a template; ChatTemplateError names the first field that cannot be rendered."""
    if not messages:
        raise ChatTemplateError("messages is empty; send at least one message", "messages")
    return [
        _template_message(message, f"messages[{position}]", knows_environment)
        for position, message in enumerate(messages)
    ]


def one_call_a_turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the calls of one turn as turns of their own, each before its result.

    For templates that take one call a turn. Results are told apart by their ids, else by their order.
    """
    spread: list[dict[str, Any]] = []
    rest = list(messages)
    while rest:
        message = dict(rest.pop(0))
        calls = message.get("tool_calls", [])
        if len(calls) < 2:  # one call is a turn already
            spread.append(message)
            continue
        results: list[dict[str, Any]] = []
        while rest and rest[0]["role"] in ("tool", "environment"):
            results.append(dict(rest.pop(0)))
        for call in calls:
            spread.append({**message, "tool_calls": [call]})
            message = {"role": message["role"], "content": ""}  # text and reasoning stand before the first call
            own = next((result for result in results if result.get("tool_call_id") == call.get("id")), None)
            own = own or next((result for result in results if "tool_call_id" not in result), None)
            if own is not None:
                spread.append(own)
                results.remove(own)
        spread += results
    return spread


def _template_message(message: Mapping[str, Any], param: str, knows_environment: bool) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise ChatTemplateError(f"{param}.role: {role!r} is not one of {', '.join(sorted(ROLES))}", f"{param}.role")
    if role == "developer":
        role = "system"
    elif role == "environment" and not knows_environment:
        role = "tool"
    result = {key: value for key, value in message.items() if value is not None}
    result |= {"role": role, "content": _text(message.get("content"), f"{param}.content")}
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(calls)]
    else:
        result.pop("tool_calls", None)
    return result


def _text(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ChatTemplateError(f"{param} must be a string or a list of text parts", param)
    return "\n".join(_part_text(part, f"{param}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, param: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "text"}:
            raise ChatTemplateError(f"{param}.text must be a string", f"{param}.text")
        case {"type": kind}:
            raise ChatTemplateError(f"{param}.type: {kind!r} is not supported; send text parts only", f"{param}.type")
    raise ChatTemplateError(f'{param} must be a text part: {{"type": "text", "text": "..."}}', param)


def _call(call: Any, param: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(f"{param}.function must be an object with a name", f"{param}.function")
    arguments = _arguments(function.get("arguments"), f"{param}.function.arguments")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _arguments(arguments: Any, param: str) -> dict[str, Any]:
    """Return a call's arguments as an object; absent and empty ones are a call without arguments."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ChatTemplateError(
                f"{param} is not valid JSON ({error}); it must hold a JSON object", param
            ) from error
    if not isinstance(arguments, dict):
        raise ChatTemplateError(f"{param} must hold a JSON object, not a {type(arguments).__name__}", param)
    return arguments


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
