"""The choices of one reply: token ids come in, text, tool calls and logprobs go out.

`ChoiceStream` is the whole path of one choice (decoder, stop strings, tool parser), a plain state machine.
`stream_updates` runs the choices of a request on the engine; streamed and whole replies are both made from it.
Nothing here knows JSON: `replies.py` puts updates into OpenAI's shapes.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, cast

from lmdserve.engine.api import Chunk, Engine, EngineDeadError, EngineDrainingError, FinishReason, Request, TokenLogprob
from lmdserve.tools.api import (
    ContentDelta,
    ControlToken,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolFormat,
    ToolParser,
)
from lmdserve.tools.constraint import ReplyRules
from lmdserve.tools.reasoning import ReasoningFormat, ReasoningParser

from .final_check import ReplyCheck, ReplyChecks
from .text import IncrementalDecoder, StopStrings, Tokenizer


class TokenEntry(NamedTuple):
    """One token with its logprobs, and where its text begins in the choice's text (characters)."""

    token_id: int
    logprob: float | None  # None: the first token of an echoed prompt, which nothing precedes
    top: tuple[tuple[int, float], ...]
    text_offset: int


class ChoiceUpdate(NamedTuple):
    """What one choice gained since its last update."""

    choice_index: int
    events: tuple[Event, ...]
    entries: tuple[TokenEntry, ...]
    finish_reason: str | None  # in OpenAI's words; the update that has one is the choice's last


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicePlan:
    """What to generate for one choice, and how to read it."""

    index: int
    request: Request
    stops: tuple[str, ...] = ()
    tool_format: ToolFormat | None = None  # None: nothing in the answer is a tool call
    tool_names: frozenset[str] | None = None  # the tools that were offered
    reasoning_format: ReasoningFormat | None = None  # None: nothing in the answer is reasoning
    opens_in_reasoning: bool = False  # the prompt ends inside a reasoning block
    ends_after_first_call: bool = False
    echo: str | None = None  # the prompt's text, given back before the answer
    is_echo_only: bool = False  # the prompt is all that is wanted; the token that the engine adds is dropped
    rules: ReplyRules | None = None  # what the answer has to obey; the request's constraint is made of them
    checks: ReplyChecks | None = None  # what of it is checked once it is whole

    def make_parser(self) -> ToolParser | None:
        """Return what reads the answer, or None where all of it is content."""
        parser = None if self.tool_format is None else self.tool_format.make_parser(tool_names=self.tool_names)
        if self.reasoning_format is None:
            return parser
        openers = frozenset() if self.tool_format is None else self.tool_format.call_openers
        return self.reasoning_format.make_parser(parser, is_open=self.opens_in_reasoning, call_openers=openers)

    def new_check(self) -> ReplyCheck | None:
        """Return what checks the answer once it is whole, or None where nothing has to."""
        return None if self.checks is None else self.checks.new_check(echo=self.echo or "")

    def markers(self, tokenizer: Tokenizer) -> dict[int, ControlToken]:
        """Return the control tokens that the parser is to see, by id; to a reader some of them are text."""
        texts: set[str] = set()
        for part in (self.tool_format, self.reasoning_format):
            texts |= frozenset() if part is None else part.control_tokens
        ids = tokenizer.control_tokens
        return {ids[text]: ControlToken(text, ids[text]) for text in texts if text in ids}


class ChoiceStream:
    """Reads the chunks of one choice. The counters are final once `is_over`."""

    def __init__(self, plan: ChoicePlan, tokenizer: Tokenizer) -> None:
        self.plan = plan
        self.is_over = False
        self.num_completion_tokens = 0
        self.num_reasoning_tokens = 0  # of those: a reasoning block's, its tags included
        self.num_cached_tokens = 0
        self.queued_s: float | None = None  # known with the first chunk
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._stops = StopStrings(plan.stops) if plan.stops else None  # looked for outside of calls
        self._parser = plan.make_parser()
        self._reasoner = self._parser if isinstance(self._parser, ReasoningParser) else None
        self._markers = plan.markers(tokenizer)
        self._num_calls = 0
        self._stop_matched = False
        self._first_call_ended = False
        self._is_first_chunk = True
        self._held_entries: list[TokenEntry] = []  # in order; their text may still turn out to be a stop string
        self._num_decoded_chars = self._num_shown_chars = len(plan.echo or "")
        wants_logprobs = plan.request.sampling.num_logprobs is not None
        self._is_plain = not (self._stops or self._parser or wants_logprobs or plan.is_echo_only)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.plan.request.prompt_token_ids)

    def feed(self, chunk: Chunk) -> ChoiceUpdate:
        """Take the next chunk and return what it settles."""
        if self._is_plain and chunk.finish_reason is None and not self._is_first_chunk:
            return self._feed_plain(chunk)
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        events: list[Event] = []
        entries: list[TokenEntry] = []
        if self._is_first_chunk:
            self._is_first_chunk = False
            self.queued_s = chunk.queued_s
            self._echo_prompt(chunk, events, entries)
        if self.plan.is_echo_only:
            finish_reason: str | None = "length"
        else:
            self._read_tokens(chunk, events)
            finish_reason = self._finish(chunk.finish_reason, events)
            entries += self._release_entries(is_last=finish_reason is not None)
        self.is_over = finish_reason is not None
        return ChoiceUpdate(self.plan.index, _coalesce(events), tuple(entries), finish_reason)

    async def checked(self, update: ChoiceUpdate, check: ReplyCheck) -> ChoiceUpdate:
        """Return what of an update may leave; raise InvalidOutputError for what breaks its schema."""
        events = await check.settle(update.events)
        if update.finish_reason == "stop" and not self._stop_matched:
            await check.check_answer()
        return update._replace(events=events)

    def _feed_plain(self, chunk: Chunk) -> ChoiceUpdate:
        """Do what `feed` does with a chunk in the middle of an answer whose text nothing else reads: 2 us, not 5."""
        self.num_completion_tokens += len(chunk.token_ids)
        feed_one = self._decoder.feed_one
        text = "".join([piece for token_id in chunk.token_ids for piece in feed_one(token_id) if type(piece) is str])
        return ChoiceUpdate(self.plan.index, (ContentDelta(text),) if text else (), (), None)

    @property
    def _is_cut(self) -> bool:
        """We end the choice here, whatever the engine would still add."""
        return self._stop_matched or self._first_call_ended

    def _echo_prompt(self, chunk: Chunk, events: list[Event], entries: list[TokenEntry]) -> None:
        if self.plan.echo:
            events.append(ContentDelta(self.plan.echo))
        if chunk.prompt_logprobs is None:
            return
        decoder = IncrementalDecoder(self._tokenizer)
        offset = 0
        for token_id, known in zip(self.plan.request.prompt_token_ids, chunk.prompt_logprobs, strict=True):
            logprob, top = (None, ()) if known is None else (known.logprob, known.top)
            entries.append(TokenEntry(token_id, logprob, top, offset))
            offset += sum(len(piece) for piece in decoder.feed((token_id,)) if type(piece) is str)

    def _read_tokens(self, chunk: Chunk, events: list[Event]) -> None:
        """Read the chunk token by token, so that the result never depends on how tokens were bundled."""
        last = len(chunk.token_ids) - 1
        for position, token_id in enumerate(chunk.token_ids):
            self.num_completion_tokens += 1
            was_reasoning = self._reasoner is not None and self._reasoner.in_reasoning
            is_end = position == last and chunk.finish_reason is FinishReason.STOP
            if is_end and self._tokenizer.special_token(token_id) is None:
                return  # a text token out of stop_token_ids: it ended the answer and is no part of it
            if chunk.logprobs is not None and not is_end:
                self._held_entries.append(_entry(chunk.logprobs[position], self._num_decoded_chars))
            for piece in self._pieces(token_id):
                self._read_piece(piece, events)
            is_reasoning = self._reasoner is not None and self._reasoner.in_reasoning
            self.num_reasoning_tokens += (was_reasoning or is_reasoning) and not is_end
            if self._is_cut:
                return

    def _pieces(self, token_id: int) -> list[str | ControlToken]:
        """Return what a token adds. The parser's markers are control tokens, even those that a reader sees as text."""
        marker = self._markers.get(token_id)
        if marker is None:
            return self._decoder.feed_one(token_id)
        held = self._decoder.flush()
        return [held, marker] if held else [marker]

    def _read_piece(self, piece: str, events: list[Event]) -> None:
        if isinstance(piece, ControlToken):
            if self._stops is not None:
                self._show(self._stops.flush(), events)  # a stop string does not reach across a control token
            if self._parser is not None and piece.token_id in self._markers:
                self._take(self._parser.feed(piece), events)
            return
        self._num_decoded_chars += len(piece)
        if self._stops is None or self.num_completion_tokens <= self.plan.request.sampling.min_tokens:
            self._show(piece, events)
            return
        if self._parser is not None and self._parser.in_call:  # a call is whole or none
            self._show(self._stops.flush() + piece, events)
            return
        result = self._stops.feed(piece)
        self._show(result.text, events)
        self._stop_matched = result.matched is not None

    def _show(self, text: str, events: list[Event]) -> None:
        """Pass on text that no stop string can take back any more."""
        if text:
            self._num_shown_chars += len(text)
            self._take([ContentDelta(text)] if self._parser is None else self._parser.feed(text), events)

    def _take(self, parsed: Iterable[Event], events: list[Event]) -> None:
        for event in parsed:
            if self._first_call_ended:
                return
            events.append(event)
            if isinstance(event, ToolCallEnd):
                self._num_calls += 1
                self._first_call_ended = self.plan.ends_after_first_call

    def _finish(self, reason: FinishReason | None, events: list[Event]) -> str | None:
        """Return OpenAI's finish_reason, after whatever was held back is out; None while the choice goes on."""
        if reason is None and not self._is_cut:
            return None
        if reason is FinishReason.ABORT and not self._is_cut:
            raise EngineDrainingError("the server stopped this answer before its end")
        if not self._is_cut:
            self._read_piece(self._decoder.flush(), events)
        if self._stops is not None and not self._is_cut:
            self._show(self._stops.flush(), events)
        if self._parser is not None and not self._first_call_ended:
            self._take(self._parser.finish(), events)
        if reason is FinishReason.LENGTH and not self._is_cut:
            return "length"
        return "tool_calls" if self._num_calls else "stop"

    def _release_entries(self, *, is_last: bool) -> list[TokenEntry]:
        """Return the entries whose text is out; the last time all others too, unless a stop string swallowed them."""
        count = len(self._held_entries)
        if not is_last or self._stop_matched:
            count = sum(entry.text_offset < self._num_shown_chars for entry in self._held_entries)
        released, self._held_entries = self._held_entries[:count], self._held_entries[count:]
        return released


async def stream_updates(
    engine: Engine, choices: Sequence[ChoiceStream], on_output: Callable[[], None]
) -> AsyncGenerator[Sequence[ChoiceUpdate], None]:
    """Generate all choices at once and yield, each time, everything that came since the last time.

    Closing the generator, or an error in any choice, ends them all: no sequence stays behind in the engine. `on_output`
    is called before each yield.
    """
    if len(choices) == 1:  # most requests: no tasks and no queue, which would double the cost of a token here
        async with aclosing(_run(engine, choices[0])) as own_updates:
            async for update in own_updates:
                on_output()
                yield (update,)
        return
    ready: asyncio.Queue[ChoiceUpdate | Exception] = asyncio.Queue(maxsize=len(choices))  # full: the engine bundles
    tasks = [asyncio.create_task(_pump(engine, choice, ready)) for choice in choices]
    try:
        num_running = len(choices)
        while num_running:
            updates = [_update_or_raise(item) for item in await _drain(ready)]
            num_running -= sum(update.finish_reason is not None for update in updates)
            on_output()
            yield updates
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(engine: Engine, choice: ChoiceStream) -> AsyncGenerator[ChoiceUpdate, None]:
    plan = choice.plan
    chunks = cast("AsyncGenerator[Chunk, None]", engine.generate(plan.request))
    check = plan.new_check()
    async with aclosing(chunks):
        async for chunk in chunks:
            update = choice.feed(chunk)
            if check is not None:
                update = await choice.checked(update, check)
            if update.events or update.entries or update.finish_reason:
                yield update
            if choice.is_over:
                return
    raise EngineDeadError("the engine ended this answer without a reason; see the server's log")


async def _pump(engine: Engine, choice: ChoiceStream, ready: asyncio.Queue[ChoiceUpdate | Exception]) -> None:
    try:
        async with aclosing(_run(engine, choice)) as updates:
            async for update in updates:
                await ready.put(update)
    except Exception as error:
        await ready.put(error)


async def _drain(ready: asyncio.Queue[ChoiceUpdate | Exception]) -> list[ChoiceUpdate | Exception]:
    items = [await ready.get()]
    while not ready.empty():
        items.append(ready.get_nowait())
    return items


def _update_or_raise(item: ChoiceUpdate | Exception) -> ChoiceUpdate:
    if isinstance(item, Exception):
        raise item
    return item


def _entry(known: TokenLogprob, text_offset: int) -> TokenEntry:
    return TokenEntry(known.token_id, known.logprob, known.top, text_offset)


def _coalesce(events: list[Event]) -> tuple[Event, ...]:
    """Join neighbours of the same kind, so that one update is as few deltas as possible."""
    if len(events) < 2:
        return tuple(events)
    joined: list[Event] = []
    for event in events:
        previous = joined[-1] if joined else None
        if isinstance(event, ContentDelta) and isinstance(previous, ContentDelta):
            joined[-1] = ContentDelta(previous.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(previous, ReasoningDelta):
            joined[-1] = ReasoningDelta(previous.text + event.text)
        elif (
            isinstance(event, ToolCallArguments)
            and isinstance(previous, ToolCallArguments)
            and event.index == previous.index
        ):
            joined[-1] = ToolCallArguments(event.index, previous.fragment + event.fragment)
        else:
            joined.append(event)
    return tuple(joined)
