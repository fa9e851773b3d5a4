"""A conversation: its messages and the settings that every request of it carries, in memory and in a file."""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from .function_tools import FunctionTool, FunctionToolError, load_function_tools
from .http import AsyncClient
from .options import ReplOptions
from .settings import Json, SettingError, check_params, check_tools, load_tools, read_json_file, suggest, tool_name
from .wire import ServerError

ROLES = frozenset({"user", "assistant", "tool", "environment"})


@dataclass(slots=True)
class Conversation:
    """`messages` holds no system message: that is a setting, and stays when the messages are forgotten."""

    model: str
    system: str | None = None
    params: Json = field(default_factory=dict)
    tools: list[Json] = field(default_factory=list)
    messages: list[Json] = field(default_factory=list)
    functions: dict[str, FunctionTool] = field(default_factory=dict)  # the tools that run here, by name; not saved

    def offer(self, path: Path | None) -> None:
        """Offer the tools in a file and no others: definitions in JSON, or functions in Python. None: no tools."""
        functions: dict[str, FunctionTool] = {}
        if path is None:
            self.tools = []
        elif path.suffix == ".py":
            try:
                functions = load_function_tools(path.expanduser())
            except FunctionToolError as error:
                raise SettingError(str(error)) from None
            self.tools = [tool.definition for tool in functions.values()]
        else:
            self.tools = load_tools(path)
        self.functions = functions

    def request_messages(self) -> list[Json]:
        """Return what the model is to see."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def request_params(self) -> Json:
        """Return the fields of a request beside model and messages."""
        return self.params | ({"tools": self.tools} if self.tools else {})

    def set_params(self, changes: Json) -> None:
        """Take over parsed parameters; None removes one."""
        merged = self.params | changes
        self.params = {name: value for name, value in merged.items() if value is not None}

    def save(self, path: Path) -> None:
        """Write the conversation to `path`, whole or not at all."""
        record = {
            "model": self.model,
            "system": self.system,
            "params": self.params,
            "tools": self.tools,
            "messages": self.messages,
        }
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        try:
            _replace_file(path.expanduser(), text)
        except OSError as error:
            raise SettingError(f"cannot write {path}: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Continue the conversation in `path` with the present model; an invalid file changes nothing.

        The file is one that `save` wrote, or a bare JSON list of messages.
        """
        record = read_json_file(path)
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
            raise SettingError(f"{path} holds no conversation: it needs a list of messages")
        messages = [*record["messages"]]
        system = record.get("system")
        if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
            system = messages.pop(0).get("content")
        params, tools = record.get("params", {}), record.get("tools", [])
        if not isinstance(system, str | None) or not isinstance(params, dict) or not isinstance(tools, list):
            raise SettingError(f"{path} holds no conversation: system, params or tools have a wrong type")
        for number, message in enumerate(messages, start=1):
            _check_message(message, f"{path}: message {number}")
        self.tools, self.params = check_tools(tools, str(path)), check_params(params)
        self.system, self.messages = system, messages
        offered = {tool_name(tool) for tool in self.tools}
        self.functions = {name: function for name, function in self.functions.items() if name in offered}


async def start_conversation(client: AsyncClient, options: ReplOptions) -> Conversation:
    """Return an empty conversation with the wanted model, which the server must offer; default: its first."""
    try:
        names = await client.models()
    except ServerError as error:
        if error.status != HTTPStatus.UNAUTHORIZED:
            raise
        raise SettingError(f"{error} (--api-key or LMDSERVE_API_KEY gives one)") from None
    if not names:
        raise SettingError(f"{client.base_url} offers no model")
    if options.model is not None:
        check_model(options.model, names)
    conversation = Conversation(model=options.model or names[0], system=options.system, params=dict(options.params))
    conversation.offer(options.tools_path)
    return conversation


def check_model(name: str, offered: list[str]) -> None:
    """Raise SettingError, with what there is, when the server does not offer `name`."""
    if name not in offered:
        raise SettingError(f"the server offers no model {name!r}{suggest(name, offered)}")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise SettingError(f"{where} has no role out of {', '.join(sorted(ROLES))}")
    if not isinstance(message.get("content"), str | list | None):
        raise SettingError(f"{where} has a content that is neither text nor a list of parts")


def _replace_file(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
