"""The options that the REPL takes, as a record and as command-line arguments; standard library only, so that `--help`
is quick. `api_client` adds the server's address to them, `lmdserve chat` the engine's options.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .settings import parse_params


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplOptions:
    """How a conversation starts and looks."""

    model: str | None = None  # None: the first that the server offers
    system: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tools_path: Path | None = None
    history_path: Path | None = None  # None: what was typed is forgotten at the end
    has_color: bool = True


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the REPL's options to `parser`; `options_from` reads them back."""
    parser.add_argument("--system", metavar="TEXT", help="system message to start with")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="sampling parameter, such as temperature=0.8; may be given several times",
    )
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="tools to offer the model: definitions (.json) or functions (.py)"
    )
    parser.add_argument(
        "--history",
        type=Path,
        default=default_history_path(),
        metavar="FILE",
        help="where typed lines are remembered; an empty name remembers nothing (default: %(default)s)",
    )
    parser.add_argument("--no-color", action="store_true", help="plain text without colours (also: set NO_COLOR)")


def options_from(arguments: argparse.Namespace, *, model: str | None) -> ReplOptions:
    """Return the record of parsed arguments; SettingError says which is wrong."""
    params: dict[str, Any] = {}
    for assignment in arguments.param:
        params |= parse_params(assignment)
    return ReplOptions(
        model=model,
        system=arguments.system,
        params={name: value for name, value in params.items() if value is not None},
        tools_path=arguments.tools,
        history_path=arguments.history if arguments.history.name else None,
        has_color=not arguments.no_color and not os.environ.get("NO_COLOR"),
    )


def default_history_path() -> Path:
    """Return the file in the user's state folder, as the XDG rules name it."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path("~/.local/state").expanduser()) / "lmdserve" / "history"
