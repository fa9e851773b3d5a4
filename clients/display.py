"""What the REPL prints: answers as they stream, tool calls, statistics, errors. It decides nothing."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .answer import Answer
from .wire import ChatDelta, ToolCallDelta

# A model's text must not be able to steer the terminal: control characters are shown as their pictures (U+2400...).
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_CONTROL_PICTURES: dict[int, int | None] = {**_VISIBLE, 0x0D: None}


def printable(text: str) -> str:
    """Return `text` with nothing in it that a terminal would obey, but for line feeds and tabs."""
    return text.translate(_CONTROL_PICTURES)


class Display:
    """Writes to standard output and knows whether the cursor is at the start of a line."""

    def __init__(self, *, has_color: bool) -> None:
        self._console = Console(no_color=not has_color, highlight=False)
        self._is_at_line_start = True
        self._open_call: int | None = None
        self._is_reasoning = False

    def delta(self, delta: ChatDelta) -> None:
        """Show a piece of the answer; what the model thinks before it is dim."""
        if delta.reasoning:
            self._is_reasoning = True
            self._write(printable(delta.reasoning), style="dim")
        if delta.content:
            if self._is_reasoning:
                self._end_line()
            self._close_call()
            self._write(printable(delta.content))
        for piece in delta.tool_calls:
            self._tool_call(piece)

    def end_answer(self, answer: Answer, *, was_stopped: bool) -> None:
        """End the line, and say how it went."""
        self._end_line()
        if was_stopped:
            self.notice("stopped")
        elif answer.was_cut_off:
            self.notice("cut off at the token limit: /params max_tokens=... raises it")
        statistics = " · ".join(_statistics(answer))
        if statistics:
            self._line(statistics, style="dim")

    def notice(self, text: str) -> None:
        """Say something about the program itself."""
        self._end_line()
        self._line(printable(text), style="yellow")

    def error(self, text: str) -> None:
        """Say what went wrong."""
        self._end_line()
        self._line(f"error: {printable(text)}", style="bold red")

    def lines(self, lines: Iterable[str]) -> None:
        """Show the result of a command."""
        for line in lines:
            self._line(printable(line))

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Show names and their meanings in two columns."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, meaning in rows:
            table.add_row(Text(printable(name)), Text(printable(meaning)))
        self._console.print(table)

    def _tool_call(self, piece: ToolCallDelta) -> None:
        if piece.index != self._open_call:
            self._end_line()
            self._open_call = piece.index
            self._write("▸ ", style="cyan")
            self._write(printable(piece.name or "?"), style="bold cyan")
            self._write("(")
        self._write(printable(piece.arguments))

    def _close_call(self) -> None:
        if self._open_call is not None:
            self._open_call = None
            self._write(")\n")

    def _end_line(self) -> None:
        self._is_reasoning = False
        self._close_call()
        if not self._is_at_line_start:
            self._write("\n")

    def _line(self, text: str, style: str = "") -> None:
        self._write(text + "\n", style)

    def _write(self, text: str, style: str = "") -> None:
        if not text:
            return
        if style:
            self._console.print(Text(text, style=style), end="", soft_wrap=True)
        else:  # past rich, which would turn a model's tabs into spaces
            self._console.file.write(text)
            self._console.file.flush()
        self._is_at_line_start = text.endswith("\n")


def _statistics(answer: Answer) -> Iterable[str]:
    usage = answer.builder.usage
    if usage is not None:
        yield f"{usage.completion_tokens} tokens"
    if answer.tokens_per_s is not None:
        yield f"{answer.tokens_per_s:.1f} tokens/s"
    if answer.time_to_first_token_s is not None:
        yield f"first token after {answer.time_to_first_token_s:.2f} s"
    if usage is not None:
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        yield f"prompt {usage.prompt_tokens} tokens{cached}"
