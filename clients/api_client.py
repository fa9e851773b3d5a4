"""`api_client [URL]`: talk to an OpenAI-compatible server from a terminal, or answer one message from a pipe.

In a terminal this is the REPL. When standard input or output is something else, everything on standard input is one
message. Owns the command line only; heavy imports wait until the arguments are understood, so that `--help` is quick.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .options import ReplOptions, add_arguments, options_from
from .settings import SettingError

if TYPE_CHECKING:
    from .http import AsyncClient

DEFAULT_URL = "http://127.0.0.1:23333"
EXIT_INTERRUPTED = 130  # as shells report a program ended by SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    import asyncio

    from .http import AsyncClient

    try:
        options = options_from(arguments, model=arguments.model)
        client = AsyncClient(arguments.url, arguments.api_key)
    except (SettingError, ValueError) as error:
        parser.error(str(error))
    return asyncio.run(talk(client, options, piped_message()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api_client",
        description="Talk to an OpenAI-compatible server. In a pipe (echo hi | api_client URL) it answers one message.",
    )
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, metavar="URL", help="server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="model to use (default: the first that the server offers)")
    add_api_key_argument(parser)
    add_arguments(parser)
    return parser


def add_api_key_argument(parser: argparse.ArgumentParser) -> None:
    """Add --api-key, whose default comes from the environment and is never shown."""
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("LMDSERVE_API_KEY") or os.environ.get("OPENAI_API_KEY"),
        help="key to send (default: LMDSERVE_API_KEY or OPENAI_API_KEY of the environment)",
    )


def piped_message() -> str | None:
    """Return all of standard input when this is a pipe and not a terminal, else None."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return None
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


async def talk(client: "AsyncClient", options: ReplOptions, message: str | None) -> int:
    """Run the REPL, or answer one `message`; return the exit status. Closes the client."""
    async with client:
        if message is None:
            from .repl import run_repl

            return await run_repl(client, options=options)
        from .one_shot import answer_once

        return await answer_once(client, options=options, message=message)


if __name__ == "__main__":
    sys.exit(main())
