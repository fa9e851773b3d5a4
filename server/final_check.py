"""The check of a whole answer, where its grammar leaves a keyword out: calls are held back until they have passed.

Owns what happens to an answer that does not pass: it ends in an error that holds the text. An answer that `max_tokens`
or a stop string cut is not whole, and is not checked; of a call that is not whole nothing has left.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lmdserve.tools.api import ContentDelta, Event, ToolCallAborted, ToolCallArguments, ToolCallEnd, ToolCallStart

from .errors import InvalidOutputError
from .schema_checker import SchemaChecker


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyChecks:
    """What a request's replies are checked against: schemas, as JSON."""

    checker: SchemaChecker
    by_tool: Mapping[str, str]
    answer: str | None = None

    def new_check(self, *, echo: str) -> "ReplyCheck":
        """Return the check of one reply; `echo` is the text before the answer that is no part of it."""
        return ReplyCheck(self, echo)


class ReplyCheck:
    """One reply. Its events go through `settle`; when it is whole and no call, `check_answer` is asked."""

    def __init__(self, checks: ReplyChecks, echo: str) -> None:
        self._checks = checks
        self._echo = echo
        self._held: list[Event] = []  # of the call that is checked when it is whole
        self._schema = ""
        self._text: list[str] = []

    async def settle(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        """Return what may leave now; raise InvalidOutputError for a call that does not obey its tool's schema."""
        settled: list[Event] = []
        for event in events:
            match event:
                case ToolCallStart(_, _, name) if name in self._checks.by_tool:
                    self._held, self._schema = [event], self._checks.by_tool[name]
                case ToolCallArguments() if self._held:
                    self._held.append(event)
                case ToolCallEnd() if self._held:
                    await self._check_call()
                    settled += [*self._held, event]
                    self._held = []
                case ToolCallAborted(_, raw_text) if self._held:
                    self._held = []
                    settled.append(ContentDelta(raw_text))
                case _:
                    settled.append(event)
        self._text += [event.text for event in settled if isinstance(event, ContentDelta)]
        return tuple(settled)

    async def check_answer(self) -> None:
        """Raise InvalidOutputError for an answer, whole now, that does not obey its schema."""
        if self._checks.answer is None:
            return
        text = "".join(self._text).removeprefix(self._echo)
        problem = await self._checks.checker.problem(self._checks.answer, text)
        if problem is not None:
            raise InvalidOutputError(f"the model's answer does not obey its schema: {problem}", failed_generation=text)

    async def _check_call(self) -> None:
        start, *rest = self._held
        assert isinstance(start, ToolCallStart)
        arguments = "".join(event.fragment for event in rest if isinstance(event, ToolCallArguments))
        problem = await self._checks.checker.problem(self._schema, arguments)
        if problem is not None:
            raise InvalidOutputError(
                f"the model's call of {start.name} does not obey the tool's schema: {problem}",
                failed_generation=f"{start.name}({arguments})",
            )
