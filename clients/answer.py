"""One streamed answer: what the model said, which tool calls can be acted on, and how long it took."""

import json
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from .conversation import Conversation
from .http import AsyncClient
from .wire import ChatDelta, Json, ReplyBuilder


@dataclass(slots=True)
class Answer:
    """Filled in by `stream_answer`; complete or not, it can be shown and kept at any time."""

    builder: ReplyBuilder = field(default_factory=ReplyBuilder)
    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    last_token_s: float | None = None

    def add(self, delta: ChatDelta) -> None:
        """Take in a delta at the moment it arrived."""
        self.builder.add(delta)
        if delta.content or delta.reasoning or delta.tool_calls:
            self.last_token_s = time.perf_counter()
            self.first_token_s = self.first_token_s or self.last_token_s

    @property
    def is_complete(self) -> bool:
        """Whether the server said that it ended."""
        return self.builder.finish_reason is not None

    @property
    def was_cut_off(self) -> bool:
        """Whether a token limit ended it."""
        return self.builder.finish_reason == "length"

    @property
    def time_to_first_token_s(self) -> float | None:
        """Return the wait before the first visible token."""
        return None if self.first_token_s is None else self.first_token_s - self.started_s

    @property
    def tokens_per_s(self) -> float | None:
        """Return the speed after the first token, by the server's count."""
        usage = self.builder.usage
        if usage is None or self.first_token_s is None or self.last_token_s is None:
            return None
        decode_s = self.last_token_s - self.first_token_s
        return (usage.completion_tokens - 1) / decode_s if decode_s > 0 and usage.completion_tokens > 1 else None

    def tool_calls(self) -> list[Json]:
        """Return the calls that came whole, with a JSON object as arguments."""
        if not self.is_complete or self.was_cut_off:
            return []
        return [call for call in self.builder.tool_calls if _arguments(call) is not None]

    def message(self) -> Json | None:
        """Return the assistant's message for the conversation, or None when there is nothing to keep."""
        message = self.builder.reply().message
        content, calls = message["content"], self.tool_calls()
        reasoning = {key: message[key] for key in ("reasoning_content",) if key in message}
        if calls:
            return {"role": "assistant", "content": content or None, **reasoning, "tool_calls": calls}
        return {"role": "assistant", "content": content, **reasoning} if content else None


async def stream_answer(
    client: AsyncClient, conversation: Conversation, answer: Answer, show: Callable[[ChatDelta], None]
) -> None:
    """Ask for the next answer and pass each delta to `show`; `answer` holds what came, also after an error."""
    deltas = client.stream_chat(
        conversation.request_messages(), model=conversation.model, **conversation.request_params()
    )
    async with aclosing(deltas):
        async for delta in deltas:
            answer.add(delta)
            show(delta)


def _arguments(call: Json) -> dict[str, Any] | None:
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        return None
    return arguments if isinstance(arguments, dict) else None
