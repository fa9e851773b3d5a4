"""What `tool_choice` says: whether calls have to come, and of which tools. Owns its spellings."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from .errors import BadRequestError, UnsupportedFieldError


class ToolChoice(NamedTuple):
    """Read from a request. `names` are the functions that may be called; None: all that are offered."""

    is_offered: bool = True  # False: the model does not see the tools
    is_required: bool = False
    is_single: bool = False  # exactly one call
    names: tuple[str, ...] | None = None


def read_tool_choice(value: str | Mapping[str, Any] | None) -> ToolChoice:
    """Return what the field says; raise BadRequestError."""
    if value in (None, "auto"):
        return ToolChoice()
    if value == "none":
        return ToolChoice(is_offered=False)
    if value == "required":
        return ToolChoice(is_required=True)
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and kind == "function":
        name = _function_name(value, "tool_choice")
        return ToolChoice(is_required=True, is_single=True, names=(name,))
    if isinstance(value, Mapping) and kind == "allowed_tools":
        return _read_allowed(value)
    if kind == "custom":
        raise UnsupportedFieldError("tool_choice.type: custom tools are not supported", param="tool_choice.type")
    raise BadRequestError(
        'tool_choice is "auto", "none", "required", {"type": "function", ...} or {"type": "allowed_tools", ...}; '
        f"got {str(value)[:80]!r}",
        param="tool_choice",
    )


def check_names(choice: ToolChoice, offered: Collection[str]) -> None:
    """Raise BadRequestError where a choice needs a tool that is not offered."""
    for name in choice.names or ():
        if name not in offered:
            raise BadRequestError(f"tool_choice: {name[:80]!r} is none of the tools offered", param="tool_choice")
    if choice.is_required and not offered:
        raise BadRequestError("tool_choice asks for a call, and no tools are offered; send tools", param="tool_choice")


def _read_allowed(value: Mapping[str, Any]) -> ToolChoice:
    inner = value.get("allowed_tools", value)
    mode = inner.get("mode", "auto") if isinstance(inner, Mapping) else None
    if mode not in ("auto", "required"):
        raise BadRequestError('tool_choice.allowed_tools.mode is "auto" or "required"', param="tool_choice")
    tools = inner.get("tools")
    if not isinstance(tools, list) or not tools:
        raise BadRequestError("tool_choice.allowed_tools.tools must be a list of tools", param="tool_choice")
    names = tuple(_function_name(tool, f"tool_choice.allowed_tools.tools[{i}]") for i, tool in enumerate(tools))
    return ToolChoice(is_required=mode == "required", names=names)


def _function_name(tool: Any, path: str) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if isinstance(tool, Mapping) and tool.get("type") == "code_interpreter":
        return "code_interpreter"
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRequestError(f"{path}.function.name must be the name of a tool", param=f"{path}.function.name")
    return name
