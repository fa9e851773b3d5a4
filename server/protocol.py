"""The records of a request on the wire: their fields, limits and the rules between fields.

Owns what a valid request is; `parsing.py` turns bytes into these records, `fields.py` knows the fields that are not
here. The descriptions and limits below are also what /openapi.json shows.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import orjson
from msgspec import Meta, Struct

from .errors import BadRequestError
from .output_format import FORMAT_FIELDS, OutputFormat, output_format
from .tool_choice import read_tool_choice

MAX_CHOICES = 256  # prompts times n of one request, so that one request cannot fill the whole queue
DEFAULT_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

Role = Literal["system", "developer", "user", "assistant", "tool", "environment"]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopString: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]


class TextPart(Struct, frozen=True, kw_only=True):
    """One part of a message's content; text is the only kind this server reads."""

    type: Literal["text"]
    text: str


class CalledFunction(Struct, frozen=True, kw_only=True):
    """What an earlier answer called: `arguments` is the text of a JSON object, or that object itself."""

    name: Annotated[str, Meta(min_length=1)]
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(Struct, frozen=True, kw_only=True):
    """One tool call of an earlier answer."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Annotated[str, Meta(description="another name of reasoning_content")] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as `ChatRenderer.render` takes it: only the keys that were sent."""
        message: dict[str, Any] = {"role": self.role, "content": self._content_for_template()}
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning if self.reasoning_content is None else self.reasoning_content,
        }
        return message | {key: value for key, value in optional.items() if value is not None}

    def _content_for_template(self) -> str | list[dict[str, str]] | None:
        if isinstance(self.content, list):
            return [{"type": part.type, "text": part.text} for part in self.content]
        return self.content


class StreamOptions(Struct, frozen=True, kw_only=True):
    """What a stream carries beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Struct, frozen=True, kw_only=True):
    """The fields that chat and plain completions share. Null is the same as absent everywhere."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 or -1: no limit")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_new_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1, description="LMDeploy's name of min_tokens")] | None = None
    deterministic: (
        Annotated[bool, Meta(description="the same answer, bit by bit, whatever is computed beside it")] | None
    ) = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    response_format: dict[str, Any] | None = None
    regex: Annotated[str, Meta(description="the whole answer matches it; Rust's syntax, no look-around")] | None = None
    grammar: Annotated[str, Meta(description="a Lark grammar of the answer")] | None = None
    choice: Annotated[list[str], Meta(description="the answer is one of these")] | None = None
    structured_outputs: Annotated[dict[str, Any], Meta(description="vLLM's: json, regex, choice or grammar")] | None = (
        None
    )
    guided_json: str | bool | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def wanted_output(self) -> OutputFormat | None:
        """What the answer has to be; None: any text. Raises BadRequestError."""
        return output_format({name: getattr(self, name) for name in FORMAT_FIELDS})

    def check(self) -> None:
        """Raise BadRequestError where fields contradict each other or name values that no type can rule out."""
        for key in self.logit_bias or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise BadRequestError(
                    f'logit_bias: its keys are token ids written as strings, such as "42"; got {key[:40]!r}',
                    param="logit_bias",
                )
        _ = self.wanted_output
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream: true; set it or leave it out", param="stream_options")
        if None not in (self.min_tokens, self.min_new_tokens) and self.min_tokens != self.min_new_tokens:
            raise BadRequestError(
                "min_tokens and min_new_tokens are the same limit; send one of them", param="min_new_tokens"
            )


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=512)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None: what is left of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        SamplingFields.check(self)
        _check_messages(self.messages)
        read_tool_choice(self.tool_choice)
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs: true; set it or leave it out", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadRequestError(
                "max_tokens and max_completion_tokens are the same limit; send one of them", param="max_tokens"
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise BadRequestError(
                "continue_final_message goes on with the last message, and add_generation_prompt begins a new one; "
                "send one of them",
                param="continue_final_message",
            )


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of POST /v1/completions. A list of token ids is one prompt; a list of those, or of strings, several."""

    prompt: str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1, description="0 needs echo")] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def token_limit(self) -> int:
        return DEFAULT_COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[tuple[str, str | list[int]]]:
        """Return each prompt under the name that an error about it should give: ("prompt[1]", "Once upon")."""
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt)]
        token_ids = [item for item in self.prompt if isinstance(item, int)]
        if token_ids:
            return [("prompt", token_ids)]
        prompts = [item for item in self.prompt if not isinstance(item, int)]
        return [(f"prompt[{position}]", prompt) for position, prompt in enumerate(prompts)]

    def check(self) -> None:
        SamplingFields.check(self)
        _check_prompt_kinds(self.prompt)
        if self.token_limit == 0 and not self.echo:
            raise BadRequestError(
                "max_tokens is 0, which generates nothing; send at least 1, or echo: true to score the prompt",
                param="max_tokens",
            )
        num_prompts = len(self.prompts())
        if num_prompts * (self.n or 1) > MAX_CHOICES:
            raise BadRequestError(
                f"{num_prompts} prompts times n = {self.n or 1} are {num_prompts * (self.n or 1)} choices, and one "
                f"request may ask for {MAX_CHOICES}; split it into several requests",
                param="prompt",
            )


def _call_for_template(call: MessageToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    rendered = {"type": call.type, "function": {"name": call.function.name, "arguments": text}}
    return rendered if call.id is None else {"id": call.id, **rendered}


def _check_messages(messages: Sequence[Message]) -> None:
    for position, message in enumerate(messages):
        has_more_than_content = message.tool_calls or message.reasoning_content or message.reasoning
        if message.content is None and not (message.role == "assistant" and has_more_than_content):
            raise BadRequestError(
                f"messages[{position}].content is missing; only an assistant message with tool_calls or "
                'reasoning_content may go without it (send "" for an empty one)',
                param=f"messages[{position}].content",
            )
        if message.tool_calls and message.role != "assistant":
            raise BadRequestError(
                f"messages[{position}].tool_calls: only the assistant calls tools, and this message's role is "
                f"{message.role!r}",
                param=f"messages[{position}].tool_calls",
            )
        if (
            None not in (message.reasoning, message.reasoning_content)
            and message.reasoning != message.reasoning_content
        ):
            raise BadRequestError(
                f"messages[{position}]: reasoning and reasoning_content are two names of one field; send one",
                param=f"messages[{position}].reasoning",
            )


def _check_prompt_kinds(prompt: str | Sequence[str | int | list[int]]) -> None:
    if isinstance(prompt, str) or len({type(item) for item in prompt}) == 1:
        return
    first = type(prompt[0])
    odd = next(position for position, item in enumerate(prompt) if type(item) is not first)
    raise BadRequestError(
        f"prompt[{odd}] is of another kind than prompt[0]; a list holds strings only, token ids only, or lists of "
        "token ids only",
        param=f"prompt[{odd}]",
    )
