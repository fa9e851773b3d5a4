"""Let a model use Python functions until it answers.

    run = await run_agent(client, "Compute (3+5)*2", [add, multiply])
    print(run.answer)

Owns the loop: ask, run the calls of the answer, send their results back, ask again. `function_tools.py` makes tools of
functions. With these two, `http.py`, `wire.py` and `sse.py`, it works in any project.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .function_tools import FunctionTool, function_tools
from .http import AsyncClient, Message
from .wire import ChatReply, ClientError, Json, ServerError

MAX_ROUNDS = 10
MAX_ATTEMPTS = 3  # at one answer, where the model breaks a schema that no grammar enforces
_INVALID_OUTPUT = "invalid_output"


class AgentError(ClientError):
    """The model came to no answer; the text says why, and `messages` is how far it got."""

    def __init__(self, text: str, messages: list[Json]) -> None:
        super().__init__(text)
        self.messages = messages


@dataclass(frozen=True, slots=True)
class AgentRun:
    """An answer, and the whole conversation that led to it: append to `messages` to go on."""

    answer: str
    messages: list[Json]


async def run_agent(
    client: AsyncClient,
    messages: str | Sequence[Message],
    functions: Sequence[Callable[..., Any]],
    *,
    model: str | None = None,
    max_rounds: int = MAX_ROUNDS,
    on_message: Callable[[Json], None] | None = None,
    **params: Any,
) -> AgentRun:
    """Ask until an answer has no calls, and return it.

    `messages` is a conversation, or a question by itself. The calls of one answer run at the same time. `on_message` is
    told each message that is added; `params` go with every request. Raises FunctionToolError for a function that cannot
    be a tool, AgentError when the token limit cuts an answer off or after `max_rounds` answers with calls, and
    ClientError for what the server does.
    """
    tools = function_tools(functions)
    definitions = [tool.definition for tool in tools.values()]
    offer = {"tools": definitions} if definitions else {}
    conversation: list[Json] = (
        [{"role": "user", "content": messages}]
        if isinstance(messages, str)
        else [dict(message) for message in messages]
    )

    def add(message: Json) -> None:
        conversation.append(message)
        if on_message is not None:
            on_message(message)

    for _ in range(max_rounds):
        reply = await _ask(client, conversation, model=model, **offer, **params)
        add(reply.message)
        if reply.finish_reason == "length":
            raise AgentError("the token limit cut the answer off; raise max_tokens", conversation)
        calls = reply.message.get("tool_calls") or []
        if not calls:
            return AgentRun(reply.message.get("content") or "", conversation)
        for message in await asyncio.gather(*(answer_call(call, tools) for call in calls)):
            add(message)
    raise AgentError(f"the model still called tools after {max_rounds} rounds; raise max_rounds", conversation)


async def _ask(client: AsyncClient, conversation: Sequence[Message], **params: Any) -> ChatReply:
    """Return the model's answer; one that the server withholds as invalid is drawn again."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await client.chat(conversation, **params)
        except ServerError as error:
            if error.code != _INVALID_OUTPUT:
                raise
    return await client.chat(conversation, **params)


async def answer_call(call: Json, tools: dict[str, FunctionTool]) -> Json:
    """Run one call and return its result as a message."""
    name = call["function"]["name"]
    if name in tools:
        content = await tools[name].run(call["function"]["arguments"])
    else:
        content = f"error: there is no function {name}; there are: {', '.join(tools)}"
    return {"role": "tool", "tool_call_id": call["id"], "content": content}
