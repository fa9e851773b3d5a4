"""From a valid request to what the engine runs: prompt tokens, sampling parameters, one `ChoicePlan` a choice.

Owns the defaults (request, then the model's generation_config.json, then OpenAI's) and the checks that need the model.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.tools.api import ToolFormat
from lmdserve.tools.call_grammar import function_names
from lmdserve.tools.code_call import CODE_TOOL_NAME
from lmdserve.tools.constraint import ReplyRules
from lmdserve.tools.schema import ToolSchemaError, normalize_tools

from .chat import ChatTemplateError, Prompt
from .choices import ChoicePlan
from .errors import BadRequestError, ContextLengthExceededError, ModelNotFoundError, UnsupportedFieldError
from .model import ServedModel
from .output_rules import OutputRules, ToolOffer
from .protocol import ChatRequest, CompletionRequest, SamplingFields
from .text import TextTooLongError
from .tool_choice import ToolChoice, check_names, read_tool_choice

INLINE_PROMPT_CHARS = 2000  # about 0.5 ms to render and tokenize; more goes to a thread, off the event loop
MAX_SEED = 2**63

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans requests for one model; holds what every plan needs."""

    model: ServedModel
    info: EngineInfo
    executor: Executor
    outputs: OutputRules

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for a model that is not served; no name, or an empty one, means the one that is."""
        if name and name != self.model.name:
            raise ModelNotFoundError(
                f"the model {name[:200]!r} does not exist here; this server serves {self.model.name!r}", param="model"
            )

    async def plan_chat(self, request: ChatRequest, uid: str) -> list[ChoicePlan]:
        """Return the n choices of a chat request."""
        self.check_model(request.model)
        tools = await self._tools(request)
        choice = read_tool_choice(request.tool_choice)
        check_names(choice, function_names(tools))
        tool_names = _tool_names(request, tools)
        tool_format = self._tool_format(tools) if tools else self.model.renderer.tool_format if tool_names else None
        prompt = await self._render(request, tools)
        turn_ends = frozenset() if request.ignore_eos else self.model.renderer.stop_token_ids
        room = max(1, self.info.session_len - len(prompt.token_ids))
        sampling = self._sampling(request, request.token_limit or room, request.num_logprobs, turn_ends)
        rules, checks = await self.outputs.plan(
            request.wanted_output,
            self._offer(request, choice, tools, tool_names),
            can_reason=self.model.renderer.reasoning_format is not None,
            opens_in_reasoning=prompt.opens_in_reasoning,
        )
        plan = ChoicePlan(
            index=0,
            request=Request(
                uid=uid,
                prompt_token_ids=prompt.token_ids,
                sampling=self._ended_by_rules(sampling, rules),
                deterministic=bool(request.deterministic),
            ),
            stops=request.stops,
            tool_format=tool_format,
            tool_names=tool_names,
            reasoning_format=self.model.renderer.reasoning_format,
            opens_in_reasoning=prompt.opens_in_reasoning,
            ends_after_first_call=request.parallel_tool_calls is False,
            rules=rules,
            checks=checks,
        )
        return _choices(plan, uid, request.n or 1)

    async def render_chat(self, request: ChatRequest) -> Prompt:
        """Return the prompt of a chat request, as `plan_chat` has it, without generating anything."""
        self.check_model(request.model)
        tools = await self._tools(request)
        if tools:
            self._tool_format(tools)
        return await self._render(request, tools)

    async def plan_completion(self, request: CompletionRequest, uid: str) -> list[ChoicePlan]:
        """Return the choices of a completion request: n of the first prompt, then n of the second, ..."""
        self.check_model(request.model)
        sampling = self._sampling(request, max(1, request.token_limit), request.logprobs, frozenset())
        rules, checks = await self.outputs.plan(request.wanted_output, None, can_reason=False, opens_in_reasoning=False)
        sampling = self._ended_by_rules(sampling, rules)
        num_choices = request.n or 1
        plans: list[ChoicePlan] = []
        for param, prompt in request.prompts():
            prompt_token_ids = await self._tokenize(param, prompt)
            echo = self._echo(prompt, prompt_token_ids) if request.echo else None
            plan = ChoicePlan(
                index=len(plans),
                request=Request(
                    uid=uid,
                    prompt_token_ids=prompt_token_ids,
                    sampling=sampling,
                    num_prompt_logprobs=request.logprobs if request.echo else None,
                    deterministic=bool(request.deterministic),
                ),
                stops=request.stops,
                echo=echo,
                is_echo_only=request.token_limit == 0,
                rules=rules,
                checks=checks,
            )
            plans += _choices(plan, uid, num_choices)
        return plans

    async def _render(self, request: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> Prompt:
        messages = [message.for_template() for message in request.messages]
        renderer, template_kwargs = self.model.renderer, request.chat_template_kwargs or {}

        def render() -> Prompt:
            return renderer.prepare(
                messages,
                max_tokens=self.info.session_len,
                tools=tools,
                add_generation_prompt=request.add_generation_prompt is not False,
                continue_final_message=bool(request.continue_final_message),
                template_kwargs=template_kwargs,
            )

        try:
            return await self._off_loop_if_long([messages, tools], render)
        except ChatTemplateError as error:
            message = str(error) if error.param in str(error) else f"{error.param}: {error}"
            raise BadRequestError(message, param=error.param) from error
        except TextTooLongError as error:
            raise self._too_long("messages", error) from error

    async def _tokenize(self, param: str, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt_token_ids = await self._encode(param, prompt)
        else:
            self._check_token_ids(param, prompt)
            prompt_token_ids = prompt
        if not prompt_token_ids:
            raise BadRequestError(f"{param} is empty; send at least one token", param=param)
        return prompt_token_ids

    async def _encode(self, param: str, prompt: str) -> list[int]:
        def encode() -> list[int]:
            return self.model.tokenizer.encode(prompt, add_bos=True, max_tokens=self.info.session_len)

        try:
            return await self._off_loop_if_long(prompt, encode)
        except TextTooLongError as error:
            raise self._too_long(param, error) from error

    def _too_long(self, param: str, error: TextTooLongError) -> ContextLengthExceededError:
        return ContextLengthExceededError(
            f"the prompt has {error.num_chars} characters, and this model's maximum context length is "
            f"{self.info.session_len} tokens for prompt and answer together, which cannot hold as many; shorten the "
            "prompt",
            param=param,
        )

    async def _tools(self, request: ChatRequest) -> list[dict[str, Any]]:
        return await self._off_loop_if_long(request.tools, lambda: _tools(request))

    async def _off_loop_if_long(self, text: Any, work: Callable[[], Result]) -> Result:
        if _num_chars(text, INLINE_PROMPT_CHARS) <= INLINE_PROMPT_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def _offer(
        self,
        request: ChatRequest,
        choice: ToolChoice,
        tools: Sequence[Mapping[str, Any]],
        tool_names: Collection[str],
    ) -> ToolOffer | None:
        """Return the tools whose calls have to be held to their schemas."""
        if not tools:
            return None
        return ToolOffer(
            tools=tools,
            choice=choice,
            tool_format=self._tool_format(tools),
            is_parallel=request.parallel_tool_calls is not False,
            has_builtin=len(tool_names) > len(tools),
        )

    def _ended_by_rules(self, sampling: SamplingParams, rules: ReplyRules | None) -> SamplingParams:
        """Let an answer that obeys a grammar end where that allows it, and only there."""
        if rules is None or rules.answer is None:
            return sampling
        return replace(sampling, ignore_eos=False, stop_token_ids=sampling.stop_token_ids | self.outputs.end_ids)

    def _echo(self, prompt: str | list[int], prompt_token_ids: Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt_token_ids)

    def _tool_format(self, tools: Sequence[Mapping[str, Any]]) -> ToolFormat:
        tool_format = self.model.renderer.tool_format
        if tool_format is None:
            raise UnsupportedFieldError(
                f"tools: the model {self.model.name!r} has no tool-call format that this server knows; "
                "leave tools out, or serve a model that has one",
                param="tools",
            )
        for position, tool in enumerate(tools):
            if tool["type"] == CODE_TOOL_NAME and not tool_format.takes_code:
                raise UnsupportedFieldError(
                    f"tools[{position}].type: the model {self.model.name!r} has no code interpreter; offer a function "
                    "that takes the code",
                    param=f"tools[{position}].type",
                )
        return tool_format

    def _sampling(
        self, request: SamplingFields, max_tokens: int, num_logprobs: int | None, turn_ends: frozenset[int]
    ) -> SamplingParams:
        self._check_token_ids("stop_token_ids", request.stop_token_ids or ())
        logit_bias = {int(key): float(bias) for key, bias in (request.logit_bias or {}).items()}
        self._check_token_ids("logit_bias", logit_bias)
        stop_token_ids = turn_ends | frozenset(request.stop_token_ids or ()) | self._control_stops(request.stops)
        return SamplingParams(
            temperature=float(self._or_default(request.temperature, "temperature", 1.0)),
            top_p=float(self._or_default(request.top_p, "top_p", 1.0)),
            top_k=max(0, int(self._or_default(request.top_k, "top_k", 0))),
            min_p=float(self._or_default(request.min_p, "min_p", 0.0)),
            seed=request.seed,
            repetition_penalty=float(self._or_default(request.repetition_penalty, "repetition_penalty", 1.0)),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=logit_bias,
            max_tokens=max_tokens,
            min_tokens=_min_tokens(request, max_tokens),
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(request.ignore_eos),
            num_logprobs=num_logprobs,
        )

    def _or_default(self, value: float | None, key: str, fallback: float) -> float:
        return self.model.default_sampling.get(key, fallback) if value is None else value

    def _control_stops(self, stops: Sequence[str]) -> frozenset[int]:
        """Stop strings that spell a control token stop at that token, which never becomes text to be matched."""
        control_tokens = self.model.tokenizer.control_tokens
        return frozenset(control_tokens[stop] for stop in stops if stop in control_tokens)

    def _check_token_ids(self, param: str, token_ids: Sequence[int] | Mapping[int, float]) -> None:
        for position, token_id in enumerate(token_ids):
            if token_id >= self.info.vocab_size:
                name = param if isinstance(token_ids, Mapping) else f"{param}[{position}]"
                raise BadRequestError(
                    f"{name}: {token_id} is no token of this model; ids are 0 to {self.info.vocab_size - 1}", param=name
                )


def _tools(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the tools that the model gets to see, with proper schemas: none of them under tool_choice "none"."""
    if not request.tools:
        return []
    try:
        tools = normalize_tools(request.tools)
    except ToolSchemaError as error:
        raise BadRequestError(str(error), param=error.param) from error
    return [] if request.tool_choice == "none" else tools


def _tool_names(request: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return what the model may call: the tools, and those that a template's own variable offers by name."""
    names = {tool["function"]["name"] if "function" in tool else tool["type"] for tool in tools}
    builtin = (request.chat_template_kwargs or {}).get("builtin_tools")
    if isinstance(builtin, list) and request.tool_choice != "none":
        names |= {name for name in builtin if isinstance(name, str)}
    return frozenset(names)


def _min_tokens(request: SamplingFields, max_tokens: int) -> int:
    min_tokens = request.min_tokens if request.min_tokens is not None else request.min_new_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequestError(
            f"min_tokens is {min_tokens}, more than the {max_tokens} tokens that the answer may have",
            param="min_tokens",
        )
    return min_tokens


def _choices(plan: ChoicePlan, uid: str, count: int) -> list[ChoicePlan]:
    """Return `count` choices like `plan`, numbered from its index on; a seed gives each choice a seed of its own."""
    return [
        replace(
            plan,
            index=plan.index + offset,
            request=replace(
                plan.request,
                uid=f"{uid}-{plan.index + offset}",
                sampling=_with_seed_offset(plan.request.sampling, offset),
                constraint=None if plan.rules is None else plan.rules.new_constraint(),
            ),
        )
        for offset in range(count)
    ]


def _with_seed_offset(sampling: SamplingParams, offset: int) -> SamplingParams:
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + offset) % MAX_SEED)


def _num_chars(value: Any, limit: int) -> int:
    """Return about how many characters a message or tool has as JSON; any number above `limit` where it has more."""
    num_chars, values = 0, [value]
    while values and num_chars <= limit:
        value = values.pop()
        num_chars += len(value) + 2 if isinstance(value, str) else 2
        if isinstance(value, Mapping):
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            values += value
    return num_chars
