"""Reading from the terminal: one message of one or more lines, with history, completion and Ctrl-C as people know it.

Enter sends. Esc Enter (Alt-Enter) starts a new line, and so does Enter after a backslash or inside a block that
begins with three double quotes. Pasted lines arrive as one message.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth

QUOTES = '"""'


class LineReader:
    """Two prompts: one for messages, whose history is kept in a file, and one for the results of tool calls."""

    def __init__(self, *, history_path: Path | None, commands: Sequence[str], has_color: bool) -> None:
        color_depth = None if has_color else ColorDepth.DEPTH_1_BIT
        self.history_problem: str | None = None
        self._messages: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=". ",
            key_bindings=_key_bindings(),
            history=self._open_history(history_path),
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            color_depth=color_depth,
        )
        self._results: PromptSession[str] = PromptSession(color_depth=color_depth)

    async def read_message(self) -> str | None:
        """Return what was typed, "" after Ctrl-C, and None at the end of input (Ctrl-D)."""
        try:
            return unquote(await self._messages.prompt_async())
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None

    async def read_result(self, call: str) -> str | None:
        """Return the result of a tool call, or None when there is to be none (empty line, Ctrl-C, Ctrl-D)."""
        try:
            return await self._results.prompt_async(f"result of {call} (Enter alone: not run) > ") or None
        except (KeyboardInterrupt, EOFError):
            return None

    def _open_history(self, path: Path | None) -> History:
        if path is None:
            return InMemoryHistory()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            self.history_problem = f"typed lines will not be remembered: cannot write {path} ({error.strerror})"
            return InMemoryHistory()
        return FileHistory(str(path))


def needs_more(text: str) -> bool:
    """Whether Enter after `text` starts a new line instead of sending it."""
    if not text.startswith(QUOTES):
        return text.endswith("\\")
    return len(text.rstrip()) < 2 * len(QUOTES) or not text.rstrip().endswith(QUOTES)


def unquote(text: str) -> str:
    """Return the message itself, without the quotes around a block."""
    if text.startswith(QUOTES) and not needs_more(text):
        return text.rstrip()[len(QUOTES) : -len(QUOTES)].removeprefix("\n").removesuffix("\n")
    return text


class CommandCompleter(Completer):
    """Completes the first word of a line that begins with a slash."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/"):
            for command in self._commands:
                if command.startswith(text):
                    yield Completion(command, start_position=-len(text))


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()
    is_typing = has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=is_typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if needs_more(buffer.text):
            if buffer.document.char_before_cursor == "\\":
                buffer.delete_before_cursor()  # it asked for the new line; pasted backslashes stay
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=is_typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
