"""What a user may set for a conversation, checked before it is sent: sampling parameters and tool definitions.

A server ignores fields it has never heard of, so a misspelt name would silently change nothing: names and types are
checked here. Ranges are the server's business; its errors name the field.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_NUMBER = "a number"
_INTEGER = "a whole number"
_TYPES: dict[str, tuple[type, ...]] = {
    _NUMBER: (int, float),
    _INTEGER: (int,),
    "true or false": (bool,),
    "a JSON object": (dict,),
    "a JSON list": (list,),
    "text or a JSON list": (str, list),
    "text or a JSON object": (str, dict),
}
# Parameters that change the one answer a REPL shows. `n` and `logprobs` would ask for what it does not show.
PARAMETERS = {
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INTEGER,
    "min_p": _NUMBER,
    "max_tokens": _INTEGER,
    "max_completion_tokens": _INTEGER,
    "min_tokens": _INTEGER,
    "seed": _INTEGER,
    "stop": "text or a JSON list",
    "stop_token_ids": "a JSON list",
    "ignore_eos": "true or false",
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "logit_bias": "a JSON object",
    "tool_choice": "text or a JSON object",
    "parallel_tool_calls": "true or false",
    "response_format": "a JSON object",
    "chat_template_kwargs": "a JSON object",
}
_ASSIGNMENT = re.compile(r"\s*(\w+)=")


class SettingError(Exception):
    """A setting that cannot be used; the text says what is wrong and what is possible."""


def parse_params(text: str) -> dict[str, Any]:
    """Read `temperature=0.8 stop=["a b"] seed=`; values are JSON or bare words, and None stands for an empty one."""
    return dict(_assignments(text))


def check_params(params: Json) -> Json:
    """Return `params` when every name and type in it is one we know."""
    for name, value in params.items():
        _check_name(name)
        _check_type(name, value)
    return params


def _assignments(text: str) -> Iterator[tuple[str, Any]]:
    position = 0
    while text[position:].strip():
        match = _ASSIGNMENT.match(text, position)
        if match is None:
            word = text[position:].split()[0]
            raise SettingError(f"{word!r} is not of the form name=value, such as temperature=0.8")
        name = match[1]
        _check_name(name)
        value, position = _value(name, text, match.end())
        yield name, value


def _value(name: str, text: str, start: int) -> tuple[Any, int]:
    """Return the value that begins at `start`, and where it ends."""
    if text[start : start + 1] in ('"', "[", "{"):
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError as error:
            raise SettingError(f"the value of {name} is not valid JSON: {error}") from None
    else:
        word = re.compile(r"\S*").match(text, start)
        assert word is not None  # the pattern matches the empty string
        value, end = _bare_word(word[0]), word.end()
        if value is None:
            return None, end
    _check_type(name, value)
    return value, end


def _bare_word(word: str) -> Any:
    """Return a number or boolean where the word is one, None for no word, and the word itself otherwise."""
    if not word:
        return None
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return word if value is None else value


def _check_name(name: str) -> None:
    if name not in PARAMETERS:
        raise SettingError(f"unknown parameter {name!r}{suggest(name, list(PARAMETERS))}")


def _check_type(name: str, value: Any) -> None:
    kind = PARAMETERS[name]
    is_bool_as_number = isinstance(value, bool) and bool not in _TYPES[kind]
    if is_bool_as_number or not isinstance(value, _TYPES[kind]):
        raise SettingError(f"{name} takes {kind}, not {value!r}; {name}= alone removes it")


def read_json_file(path: Path) -> Any:
    """Return what the file holds; SettingError names the file and the problem."""
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"{path} is not valid JSON: {error}") from None


def load_tools(path: Path) -> list[Json]:
    """Return the tool definitions in a file: a JSON list, or an object with the list as `tools`."""
    loaded = read_json_file(path)
    entries = loaded.get("tools") if isinstance(loaded, dict) else loaded
    if not isinstance(entries, list) or not entries:
        raise SettingError(f"{path} holds no list of tools")
    return check_tools(entries, str(path))


def check_tools(entries: list[Any], source: str) -> list[Json]:
    """Return the tools in OpenAI's shape; a bare function object is put into one. `source` is named in errors."""
    tools = [_tool(entry, f"{source}: tool {number}") for number, entry in enumerate(entries, start=1)]
    names = [tool_name(tool) for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"{source} defines {name!r} twice; names must differ")
    return tools


def _tool(entry: Any, where: str) -> Json:
    if not isinstance(entry, dict):
        raise SettingError(f"{where} is not a JSON object")
    kind = entry.get("type", "function")
    if kind != "function":  # such as code_interpreter: the server knows what it supports
        return entry
    function = entry.get("function", {key: value for key, value in entry.items() if key != "type"})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise SettingError(f"{where} has no function with a name")
    if not isinstance(function.get("parameters", {}), dict):
        raise SettingError(f"{where}: the parameters of {function['name']!r} are not a JSON schema object")
    return {"type": "function", "function": function}


def tool_name(tool: Json) -> str:
    """Return the name that a call of this tool will carry."""
    return str(tool["function"]["name"] if tool["type"] == "function" else tool["type"])


def suggest(word: str, known: list[str]) -> str:
    """Return the end of an error message: the nearest known word, or all of them."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
