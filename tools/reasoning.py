"""Reasoning blocks: what a model writes between `<think>` and `</think>` before its answer.

Owns telling reasoning from the answer; the answer goes on to a tool parser, or is content. A block counts at the
beginning of a reply only, or where the prompt has already opened it: tags further on are text. Whitespace around the
reasoning is dropped, and so is whitespace between it and the answer.

Some models call a tool without closing their reasoning first. A marker that opens a call, emitted by id, ends the
reasoning too, and a closing tag that comes after all is dropped.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from .api import ContentDelta, ControlToken, Event, Piece, ReasoningDelta, ToolParser
from .markers import Marker, MarkerLexer

START, END = "<think>", "</think>"


class _State(Enum):
    BEFORE = "no text yet"
    REASONING = "in the block"
    ANSWER_START = "behind the block, no text yet"
    ANSWER = "in the answer"


class _Tag(Enum):
    START = START
    END = END


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How one model writes its reasoning. `control_tokens` are those of the tags that are tokens."""

    control_tokens: frozenset[str] = frozenset({START, END})

    def make_parser(
        self, answer_parser: ToolParser | None, *, is_open: bool, call_openers: Collection[str] = ()
    ) -> "ReasoningParser":
        """Return a parser for one reply. `is_open`: the prompt ends inside a block."""
        match_text = not self.control_tokens >= {START, END}
        return ReasoningParser(answer_parser, is_open=is_open, call_openers=call_openers, match_text=match_text)


def reasoning_format_for(chat_template: str | None, control_tokens: Collection[str]) -> ReasoningFormat | None:
    """Return how a model reasons, judged by its chat template, or None if that does not know reasoning."""
    if chat_template is None or END not in chat_template:
        return None
    return ReasoningFormat(frozenset({START, END}).intersection(control_tokens))


class ReasoningParser:
    """Takes a whole reply's pieces, and gives events of both parts."""

    def __init__(
        self, answer_parser: ToolParser | None, *, is_open: bool, call_openers: Collection[str], match_text: bool
    ) -> None:
        self._answer_parser = answer_parser
        self._call_openers = call_openers
        self._lexer = MarkerLexer({START: _Tag.START, END: _Tag.END}, match_text=match_text)
        self._state = _State.REASONING if is_open else _State.BEFORE
        self._gap: list[str] = []  # whitespace that nothing has followed yet
        self._has_reasoning = False
        self._end_is_due = False  # a call ended the reasoning before its closing tag came
        self._events: list[Event] = []

    @property
    def in_call(self) -> bool:
        """Whether the answer is in a call."""
        return self._state is _State.ANSWER and self._answer_parser is not None and self._answer_parser.in_call

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as one knows."""
        return self._state is _State.REASONING

    def feed(self, piece: Piece) -> list[Event]:
        """Take the next piece and return what it settles."""
        self._events = []
        if self._state is _State.ANSWER and not self._end_is_due:
            for text in self._lexer.finish():
                self._answer(text)
            self._answer(piece)
        else:
            self._read(piece)
        return self._events

    def finish(self) -> list[Event]:
        """Return what was held, now that the reply is over."""
        self._events = []
        for text in self._lexer.finish():
            self._take_text(text)
        if self._state is _State.BEFORE:
            self._answer("".join(self._gap))
        if self._answer_parser is not None:
            self._events += self._answer_parser.finish()
        return self._events

    def _read(self, piece: Piece) -> None:
        if isinstance(piece, ControlToken) and piece not in (START, END):
            for text in self._lexer.finish():
                self._take_text(text)
            self._take_control_token(piece)
            return
        for token in self._lexer.feed(piece):
            if isinstance(token, Marker):
                self._take_tag(token, piece)
            else:
                self._take_text(token)

    def _take_control_token(self, token: ControlToken) -> None:
        if self._state is _State.REASONING and token not in self._call_openers:
            before = len(self._events)
            self._answer(token)
            shown = [event.text for event in self._events[before:] if isinstance(event, ContentDelta)]
            del self._events[before:]
            self._take_text("".join(shown))  # what is no structure here is text of the reasoning
            return
        self._end_is_due = self._end_is_due or self._state is _State.REASONING
        self._begin_answer()
        self._answer(token)

    def _take_tag(self, tag: "Marker[_Tag]", piece: Piece) -> None:
        if tag.kind is _Tag.START and self._state is _State.BEFORE:
            self._state, self._gap = _State.REASONING, []
        elif tag.kind is _Tag.END and self._state is _State.REASONING:
            self._state, self._gap = _State.ANSWER_START, []
        elif tag.kind is _Tag.END and self._end_is_due:
            self._end_is_due = False
        elif tag.by_id and self._state is not _State.REASONING:
            self._begin_answer()
            self._answer(piece)
        else:
            self._take_text(tag.text)

    def _take_text(self, text: str) -> None:
        if self._state is _State.ANSWER:
            self._answer(text)
        elif self._state is _State.REASONING:
            self._take_reasoning(text)
        elif text.isspace() or not text:
            self._gap.append(text)
        else:
            self._begin_answer(text)

    def _take_reasoning(self, text: str) -> None:
        words = text.rstrip()
        if words:
            shown = "".join([*self._gap, words]) if self._has_reasoning else words.lstrip()
            self._events.append(ReasoningDelta(shown))
            self._has_reasoning, self._gap = True, []
        self._gap.append(text[len(words) :])

    def _begin_answer(self, text: str = "") -> None:
        if self._state is _State.BEFORE:
            text = "".join(self._gap) + text
        elif self._state is _State.ANSWER_START:
            text = text.lstrip()
        self._state, self._gap = _State.ANSWER, []
        self._answer(text)

    def _answer(self, piece: Piece) -> None:
        if not piece:
            return
        if self._answer_parser is not None:
            self._events += self._answer_parser.feed(piece)
        else:
            self._events.append(ContentDelta(str(piece)))
