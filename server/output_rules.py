"""From a request's output format and tools to the rules that its answers obey, compiled off the event loop.

Owns the compiler of the served model and what is refused because it cannot be enforced. The request's fields are read
in `output_format.py` and `tool_choice.py`.
"""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from lmdserve.engine.api import EngineInfo
from lmdserve.tools.api import ToolFormat
from lmdserve.tools.call_grammar import CallGrammar, either, function_names, is_never_a_call
from lmdserve.tools.code_call import CODE_TOOL_NAME
from lmdserve.tools.constraint import ReplyRules, TokenSets
from lmdserve.tools.grammar import (
    Grammar,
    GrammarCompiler,
    GrammarError,
    GrammarSource,
    Vocabulary,
    json_schema_source,
)
from lmdserve.tools.reasoning import END, START

from .errors import BadRequestError, UnsupportedFieldError
from .final_check import ReplyChecks
from .model import ServedModel
from .output_format import OutputFormat
from .schema_checker import SchemaChecker
from .tool_choice import ToolChoice

NUM_THREADS = 2
COMPILE_LIMIT_S = 20.0  # the limits in `tools/grammar.py` keep compiling below one second; this is for what they miss
SINGLE_LIMIT_S = 2.0  # for looking at the tools of a request one by one
MAX_REMEMBERED = 1024  # schemas of which it is known whether a grammar enforces them


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOffer:
    """The tools of a request and how they may be called."""

    tools: Sequence[Mapping[str, Any]]  # normalized, in the request's order
    choice: ToolChoice
    tool_format: ToolFormat
    is_parallel: bool
    has_builtin: bool  # tools that the model knows by name are offered too

    @property
    def callable_tools(self) -> list[Mapping[str, Any]]:
        """The tools that may be called."""
        names = self.choice.names
        return [
            tool
            for tool, name in zip(self.tools, function_names(self.tools), strict=True)
            if names is None or name in names
        ]


class OutputPlan(NamedTuple):
    """What answers have to be: what holds for each token, and what is checked when they are whole."""

    rules: ReplyRules | None = None
    checks: ReplyChecks | None = None


class OutputRules:
    """Makes the rules for one model's answers. `close` ends its threads."""

    def __init__(self, model: ServedModel, info: EngineInfo) -> None:
        self._model = model
        self._info = info
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="lmdserve-grammar")
        self._checker = SchemaChecker()
        self._is_enforced: OrderedDict[bytes, bool] = OrderedDict()  # by a schema's digest

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that may end a constrained answer."""
        tokenizer = self._model.tokenizer
        ends = self._info.eos_token_ids | tokenizer.eos_token_ids | self._model.renderer.stop_token_ids
        return frozenset(token_id for token_id in ends if 0 <= token_id < self._info.vocab_size)

    @property
    def _drops_space(self) -> bool:
        return self._model.tokenizer.strips_leading_space

    @cached_property
    def _sets(self) -> TokenSets:
        return TokenSets(self._compiler.vocabulary)

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        """The control tokens that the model can generate."""
        known = self._model.tokenizer.control_tokens
        return {text: token_id for text, token_id in known.items() if token_id < self._info.vocab_size}

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        tokenizer, size = self._model.tokenizer, self._info.vocab_size
        return GrammarCompiler(
            Vocabulary(
                token_bytes=[tokenizer.token_bytes(token_id) for token_id in range(size)],
                control_ids=self.end_ids.union(self._control_ids.values()),
                end_ids=tuple(sorted(self.end_ids)),
                encode=lambda text: tokenizer.encode_segments(["", text]),
            )
        )

    def warm_up(self) -> None:
        """Begin to load what every grammar needs, on a thread: it takes 0.3 s, some of it with Python held up."""
        self._threads.submit(self._load)

    def _load(self) -> TokenSets:
        self._compiler.load()
        return self._sets

    async def plan(
        self, wanted: OutputFormat | None, offer: ToolOffer | None, *, can_reason: bool, opens_in_reasoning: bool
    ) -> OutputPlan:
        """Return what an answer has to be; raise BadRequestError."""
        if wanted is None and offer is None:
            return OutputPlan()
        await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._sets)
        must_answer = wanted is not None or (offer is not None and offer.choice.is_required)
        needs_think_ids = "" if not must_answer else wanted.param if wanted is not None else "tool_choice"
        think_ids = self._think_ids(needs_think_ids) if can_reason else None
        answer = None if wanted is None else await self._compile(wanted.param, wanted.make_source)
        rules = None if offer is None else await self._rules_for_calls(offer, wanted)
        if answer is not None and (rules is None or rules.answer is None):
            rules = rules or ReplyRules(sets=self._sets)
            rules = replace(rules, answer=answer, drops_first_space=self._drops_space)
        if rules is None:
            return OutputPlan()
        rules = replace(rules, think_ids=think_ids, opens_in_reasoning=opens_in_reasoning and think_ids is not None)
        return OutputPlan(rules, await self._checks(rules, wanted, offer))

    def close(self) -> None:
        """End the threads and the checker; what they compile is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._checker.close()

    async def _checks(
        self, rules: ReplyRules, wanted: OutputFormat | None, offer: ToolOffer | None
    ) -> ReplyChecks | None:
        """Return the checks that make up for what the grammars leave out; raise BadRequestError."""
        must_call = offer is not None and offer.choice.is_required
        may_turn_out_an_answer = wanted is not None and offer is not None and not must_call and rules.calls is None
        if not rules.unenforced and not may_turn_out_an_answer:
            return None
        by_tool: dict[str, str] = {}
        if offer is not None:
            work = partial(self._schemas_to_check, offer, must_check_all=may_turn_out_an_answer)
            for position, schema in await asyncio.get_running_loop().run_in_executor(self._threads, work):
                await self._refuse_uncheckable(f"tools[{position}]", schema)
                by_tool[offer.tools[position]["function"]["name"]] = schema
        answer = None
        if wanted is not None and wanted.schema is not None and not must_call and rules.unenforced:
            answer = json.dumps(wanted.schema)
            await self._refuse_uncheckable(wanted.param, answer)
        return ReplyChecks(checker=self._checker, by_tool=by_tool, answer=answer)

    def _schemas_to_check(self, offer: ToolOffer, *, must_check_all: bool) -> list[tuple[int, str]]:
        """Return place and schema of the tools whose calls a grammar does not hold to it; of all where time is up."""
        callable_ids = {id(tool) for tool in offer.callable_tools}
        end_s = time.monotonic() + SINGLE_LIMIT_S
        found: list[tuple[int, str]] = []
        for position, tool in enumerate(offer.tools):
            if id(tool) in callable_ids and tool["type"] != CODE_TOOL_NAME:
                schema = json.dumps(tool["function"]["parameters"])
                if must_check_all or time.monotonic() > end_s or not self._enforces(tool["function"], schema):
                    found.append((position, schema))
        return found

    def _enforces(self, function: Mapping[str, Any], schema: str) -> bool:
        """Return whether a grammar enforces all of a function's schema."""
        digest = hashlib.sha256(schema.encode()).digest()
        if digest not in self._is_enforced:
            source = json_schema_source(function["parameters"], must_be_strict=True)
            try:
                self._compiler.compile(source)
                self._is_enforced[digest] = True
            except GrammarError:
                self._is_enforced[digest] = False
            if len(self._is_enforced) > MAX_REMEMBERED:
                self._is_enforced.popitem(last=False)
        return self._is_enforced[digest]

    async def _refuse_uncheckable(self, param: str, schema: str) -> None:
        problem = await self._checker.problem(schema, None)
        if problem is not None:
            raise BadRequestError(
                f"{param}: no grammar enforces all of the schema, and {problem}",
                param=param,
            )

    def _think_ids(self, param: str) -> tuple[int, int] | None:
        """Return the tokens around reasoning; where there are none, refuse the field that needs them, if one does."""
        ids = self._control_ids
        if START in ids and END in ids:
            return ids[START], ids[END]
        if param:
            raise UnsupportedFieldError(
                "this model's reasoning has no tokens of its own around it, so what follows it cannot be constrained; "
                f"leave {param} out",
                param=param,
            )
        return None

    async def _rules_for_calls(self, offer: ToolOffer, wanted: OutputFormat | None) -> ReplyRules | None:
        """Return the rules that make calls what they have to be; some hold the answer to what is `wanted` too."""
        syntax, ids = offer.tool_format.call_syntax, self._control_ids
        tools = offer.callable_tools
        is_parallel = offer.is_parallel and not offer.choice.is_single
        grammar = CallGrammar(syntax=syntax, tools=tools, control_ids=ids, is_parallel=is_parallel)
        if offer.choice.is_required:
            openers = frozenset(ids[text] for text in offer.tool_format.call_openers if text in ids)
            calls = await self._compile_calls(offer, partial(CallGrammar.source, has_opener=True), grammar)
            return ReplyRules(sets=self._sets, answer=calls, openers=openers, drops_first_space=self._drops_space)
        opener = ids.get(syntax.opener)
        if syntax.opener and opener is None:
            if wanted is not None:
                raise UnsupportedFieldError(
                    f"{wanted.param} beside tools is not possible with this model, which spells the tags of its calls: "
                    'an answer may hold them too; send one of them, or tool_choice: "none"',
                    param=wanted.param,
                )
            return ReplyRules(
                sets=self._sets, answer=await self._compile_calls(offer, CallGrammar.source_in_text, grammar)
            )
        has_code = offer.has_builtin or any(tool["type"] == CODE_TOOL_NAME for tool in tools)
        if not syntax.opener and wanted is not None:
            if has_code or not is_never_a_call(wanted.schema):
                raise UnsupportedFieldError(
                    f"{wanted.param} beside tools is possible with this model, whose calls are JSON as well, only as "
                    'the schema of an object that requires a property that calls lack (such as "answer"), and without '
                    'tools that take code; send one of them, or tool_choice: "none"',
                    param=wanted.param,
                )
            calls = await self._compile_calls(offer, lambda grammar: _either(wanted, grammar), grammar)
            return ReplyRules(sets=self._sets, answer=calls, drops_first_space=self._drops_space)
        if not syntax.opener and all(tool["type"] == CODE_TOOL_NAME for tool in tools):
            return None  # nothing of its calls has a schema
        calls = await self._compile_calls(offer, partial(CallGrammar.source, has_opener=False), grammar)
        code_opener = ids.get(syntax.code_opener)
        side = frozenset() if code_opener is None else frozenset({code_opener})
        return ReplyRules(
            sets=self._sets,
            calls=calls,
            openers=frozenset({opener}) if opener is not None else frozenset() if has_code else side,
            guards=side if has_code else frozenset(),
            calls_open_with_bracket=not syntax.opener,
        )

    async def _compile_calls(
        self, offer: ToolOffer, make_source: Callable[[CallGrammar], GrammarSource], grammar: CallGrammar
    ) -> Grammar:
        try:
            return await self._compile("tools", lambda: make_source(grammar))
        except BadRequestError:
            end_s = time.monotonic() + SINGLE_LIMIT_S
            callable_ids = {id(tool) for tool in grammar.tools}
            for position, tool in enumerate(offer.tools):  # name the tool at fault
                if id(tool) in callable_ids and time.monotonic() < end_s:
                    alone = replace(grammar, tools=[tool])
                    param = f"tools[{position}]"
                    await self._compile(param, lambda alone=alone: alone.source(has_opener=True))  # type: ignore[misc]
            raise

    async def _compile(self, param: str, make_source: Callable[[], GrammarSource]) -> Grammar:
        def work() -> Grammar:
            return self._compiler.compile(make_source())

        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, work)
            return await asyncio.wait_for(future, COMPILE_LIMIT_S)
        except GrammarError as error:
            raise BadRequestError(f"{param}: {error}", param=param) from error
        except TimeoutError as error:
            raise BadRequestError(
                f"{param}: it took longer than {COMPILE_LIMIT_S:g} s to compile; simplify it", param=param
            ) from error
        except RecursionError as error:
            raise BadRequestError(f"{param}: it is nested too deeply; flatten it", param=param) from error


def _either(wanted: OutputFormat, calls: CallGrammar) -> GrammarSource:
    return either(wanted.make_source(), calls.source(has_opener=False))
