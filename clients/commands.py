"""The REPL's commands: what each takes, changes and says. One table serves dispatch, help and completion."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .conversation import Conversation, check_model
from .display import Display
from .http import AsyncClient
from .settings import SettingError, parse_params, suggest, tool_name


@dataclass(slots=True)
class Session:
    """What a command can see and change."""

    client: AsyncClient
    conversation: Conversation
    display: Display
    is_leaving: bool = False
    own_files: set[Path] = field(default_factory=set)  # saved or loaded here, so /save may replace them


class Command(NamedTuple):
    """One row of the table."""

    arguments: str
    meaning: str
    run: Callable[[Session, str], Awaitable[None]]


async def run_command(session: Session, line: str) -> None:
    """Carry out a line that begins with a slash; SettingError says what is wrong with it."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise SettingError(
            f"unknown command {name}{suggest(name, list(COMMANDS))} (// sends a message that begins with /)"
        )
    if argument and not command.arguments:
        raise SettingError(f"{name} takes no argument")
    await command.run(session, argument.strip())


async def _help(session: Session, argument: str) -> None:
    session.display.table((f"{name} {command.arguments}", command.meaning) for name, command in COMMANDS.items())
    session.display.table(
        (
            ("Enter", "send; inside a message of several lines: Esc Enter (or Alt-Enter) makes a new line"),
            ("\\ at the end", "the message goes on in the next line"),
            ('""" ... """', "a block of lines, sent as it is"),
            ("//...", "send a message that begins with a slash"),
            ("Ctrl-C", "stop the answer, or clear the line"),
            ("Ctrl-D", "leave"),
            ("Up, Ctrl-R", "earlier messages"),
        )
    )


async def _reset(session: Session, argument: str) -> None:
    session.conversation.messages.clear()
    session.display.notice("messages forgotten; system message, parameters and tools stay")


async def _system(session: Session, argument: str) -> None:
    conversation = session.conversation
    if argument:
        conversation.system = None if argument == "off" else argument
    session.display.notice(f"system message: {conversation.system or 'none'}")


async def _model(session: Session, argument: str) -> None:
    names = await session.client.models()
    if argument:
        check_model(argument, names)
        session.conversation.model = argument
    present = session.conversation.model
    session.display.lines(f"{'*' if name == present else ' '} {name}" for name in names)


async def _params(session: Session, argument: str) -> None:
    conversation = session.conversation
    if argument == "reset":
        conversation.params = {}
    else:
        conversation.set_params(parse_params(argument))
    if conversation.params:
        session.display.table((name, repr(value)) for name, value in conversation.params.items())
    else:
        session.display.notice("no parameters set: the server's defaults hold")


async def _tools(session: Session, argument: str) -> None:
    conversation = session.conversation
    if argument:
        conversation.offer(None if argument == "off" else Path(argument))
    if conversation.tools:
        session.display.table(_described_tools(conversation))
    else:
        session.display.notice("no tools offered; /tools FILE loads definitions (.json) or functions (.py)")


def _described_tools(conversation: Conversation) -> Iterable[tuple[str, str]]:
    for tool in conversation.tools:
        yield tool_name(tool), str(tool.get("function", {}).get("description", ""))


async def _save(session: Session, argument: str) -> None:
    path = _path(argument, "/save")
    if path.exists() and path not in session.own_files:
        raise SettingError(f"{path} exists and was not written here; choose another name")
    session.conversation.save(path)
    session.own_files.add(path)
    session.display.notice(f"{len(session.conversation.messages)} messages saved to {path}")


async def _load(session: Session, argument: str) -> None:
    path = _path(argument, "/load")
    session.conversation.load(path)
    session.own_files.add(path)
    session.display.notice(f"{len(session.conversation.messages)} messages loaded from {path}")


async def _exit(session: Session, argument: str) -> None:
    session.is_leaving = True


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise SettingError(f"{command} needs a file name")
    return Path(argument).expanduser().absolute()


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/reset": Command("", "forget the messages", _reset),
    "/system": Command("[TEXT | off]", "show, set or remove the system message", _system),
    "/model": Command("[NAME]", "list the server's models, or use another one", _model),
    "/params": Command(
        "[NAME=VALUE ... | reset]",
        "show or set sampling parameters, as temperature=0.8 max_tokens=200; NAME= unsets",
        _params,
    ),
    "/tools": Command(
        "[FILE | off]",
        "show, load or remove the tools offered to the model: definitions in JSON, or Python functions, which run here",
        _tools,
    ),
    "/save": Command("FILE", "write messages and settings to a JSON file", _save),
    "/load": Command("FILE", "continue a saved conversation", _load),
    "/exit": Command("", "leave (also Ctrl-D)", _exit),
}
