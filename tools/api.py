"""What a tool-call format is, seen from outside: the pieces a parser takes, the events it gives, and their folding.

Owns no format: each format is one file beside this one that implements `ToolFormat` and `ToolParser`.

The contract of a parser, whatever its format:

* It takes the model's output as pieces, in order. A piece is text, or a `ControlToken`: a control token the model
  emitted by id. Text that merely spells a control token is text (unless the caller has nothing but text and asked for
  `match_text`). The result does not depend on where text is cut into pieces.
* It never raises and never loses a character: what is not part of a well-formed call is content.
* Arguments are streamed while they are generated, so a call can break after it began. `ToolCallAborted` takes it back.
"""

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

from .call_syntax import CallSyntax


class ControlToken(str):
    """The text of a control token that the model emitted by id: `ControlToken("<|im_end|>", 92542)`."""

    __slots__ = ("token_id",)

    token_id: int

    def __new__(cls, text: str, token_id: int) -> Self:
        token = super().__new__(cls, text)
        token.token_id = token_id
        return token


Piece: TypeAlias = str
"""Text, or a `ControlToken`, which is a str too; parsers tell them apart by type."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next text of the reply's content; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next text of what the model thought before its answer; never empty, and no part of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. Indices rise from 0 in order of appearance and are never used twice, not after an abort either."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next part of a call's arguments. All parts of a call together are the text of one JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is whole and valid. Nothing takes it back any more: it may be executed now."""

    index: int


@dataclass(frozen=True, slots=True)
class ToolCallAborted:
    """The call that was being streamed is malformed. Drop it, and take `raw_text` as content in its place."""

    index: int
    raw_text: str


Event: TypeAlias = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | ToolCallAborted


class ToolParser(Protocol):
    """The state of parsing one reply. Calls do not interleave: each ends or is aborted before the next one starts."""

    @property
    def in_call(self) -> bool:
        """Whether text that comes next is part of a call, as far as is known."""

    def feed(self, piece: Piece) -> list[Event]:
        """Take the next piece and return what it settles; text that may still become part of a marker is held."""

    def finish(self) -> list[Event]:
        """Return what was held, now that the reply is over. Call it once, last."""


class ToolFormat(Protocol):
    """How one family of models is told of tools, and how it writes calls. Stateless, shared by all requests."""

    @property
    def name(self) -> str:
        """What the format is called in options and logs."""

    @property
    def chat_template(self) -> str | None:
        """A Jinja template to use in place of the model's own, which drops tools; None: the model's own handles them.

        Variables: messages, tools, bos_token, eos_token, add_generation_prompt; rendered with the settings of
        transformers.
        """

    @property
    def control_tokens(self) -> frozenset[str]:
        """The control tokens that must reach the parser as `ControlToken`; it sees no others."""

    @property
    def call_openers(self) -> frozenset[str]:
        """Those of the control tokens that open a call; empty where calls open with plain text."""

    @property
    def takes_code(self) -> bool:
        """Whether the tool `{"type": "code_interpreter"}` can be offered."""

    @property
    def call_syntax(self) -> CallSyntax:
        """How the format's template writes calls, for replies that are held to it."""

    def template_variables(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the variables through which a template offers these tools."""

    def template_call_id(self, call_id: str) -> str:
        """Return what stands for a call's id in the prompt: some templates refuse any other form than their own."""

    def make_parser(self, *, match_text: bool = False, tool_names: Collection[str] | None = None) -> ToolParser:
        """Return a parser for one reply.

        `match_text` recognises markers in text too, where token ids are unknown. `tool_names` are the tools that were
        offered (None: unknown): formats whose calls have no marker take nothing else for a call.
        """


class ToolCall(NamedTuple):
    """A whole call; `arguments` is the text of a JSON object, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Folded(NamedTuple):
    """A whole reply. `content` is None when there are calls and no text, as OpenAI's API has it."""

    content: str | None
    tool_calls: list[ToolCall]
    reasoning: str | None = None


def fold(events: Iterable[Event]) -> Folded:
    """Return the reply that all of a parser's events, in order, add up to."""
    text: list[str] = []
    reasoning: list[str] = []
    started: dict[int, ToolCallStart] = {}
    fragments: dict[int, list[str]] = {}
    calls: list[ToolCall] = []
    for event in events:
        match event:
            case ContentDelta(delta):
                text.append(delta)
            case ReasoningDelta(delta):
                reasoning.append(delta)
            case ToolCallStart(index):
                started[index] = event
                fragments[index] = []
            case ToolCallArguments(index, fragment):
                fragments[index].append(fragment)
            case ToolCallEnd(index):
                start = started[index]
                calls.append(ToolCall(start.id, start.name, "".join(fragments[index])))
            case ToolCallAborted(_, raw_text):
                text.append(raw_text)
    content = "".join(text)
    return Folded(content if content or not calls else None, calls, "".join(reasoning) or None)


def new_call_id() -> str:
    """Return a fresh call id: "call_" and 24 url-safe characters (144 random bits)."""
    return "call_" + secrets.token_urlsafe(18)
