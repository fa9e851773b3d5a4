"""What an OpenAI chat API says, as records: errors, deltas of a stream, replies, token counts; and their parsing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

MAX_QUOTED_CHARS = 300  # of what is not an API's answer, inside our messages


class ClientError(Exception):
    """Base of everything this client raises; the text is one sentence fit for a user."""


class ConnectionFailed(ClientError):
    """No connection, or one that was lost: the text names the URL and what to try."""


class ProtocolError(ClientError):
    """The other side answered, but not as an OpenAI API does."""


class ServerError(ClientError):
    """The server refused the request, or reported an error inside a stream (`status` is None then)."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """Return the server's words after the status, with the wait it asked for."""
        where = "error while answering" if self.status is None else f"HTTP {self.status}"
        field_name = f" (field: {self.param})" if self.param and self.param not in self.message else ""
        wait = "" if self.retry_after_s is None else f"; try again in {self.retry_after_s:g} s"
        return f"{where}: {self.message}{field_name}{wait}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, as the server counted them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens that came from the server's prefix cache


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one tool call: the first has id and name, all of them may have a fragment of the arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What one chunk of a stream adds to choice `index`; `usage` comes alone, at the end."""

    index: int = 0
    content: str = ""
    reasoning: str = ""  # what the model thinks before it answers
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A complete answer; `message` can be appended to the conversation as it is."""

    message: Json
    finish_reason: str | None
    usage: Usage | None


@dataclass(slots=True)
class ReplyBuilder:
    """Folds the deltas of one choice into a ChatReply."""

    tool_calls: list[Json] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    _parts: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)

    def add(self, delta: ChatDelta) -> None:
        """Take in one delta."""
        self._parts.append(delta.content)
        self._reasoning.append(delta.reasoning)
        for piece in delta.tool_calls:
            self._add_tool_call(piece)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage

    def _add_tool_call(self, piece: ToolCallDelta) -> None:
        if piece.index > len(self.tool_calls) or piece.index < 0:
            raise ProtocolError(f"the stream starts tool call {piece.index} before call {len(self.tool_calls)}")
        if piece.index == len(self.tool_calls):
            self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self.tool_calls[piece.index]
        call["id"] = piece.id or call["id"]
        call["function"]["name"] = piece.name or call["function"]["name"]
        call["function"]["arguments"] += piece.arguments

    def reply(self) -> ChatReply:
        """Return the answer so far."""
        content = "".join(self._parts)
        message: Json = {"role": "assistant", "content": content}
        if self.tool_calls:
            message |= {"content": content or None, "tool_calls": self.tool_calls}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        return ChatReply(message, self.finish_reason, self.usage)


def error_from(body: Json, *, status: int | None, retry_after: str | None = None) -> ServerError:
    """Read OpenAI's shape, `{"error": {...}}`, and the flat ones of other servers."""
    details = body.get("error", body)
    if not isinstance(details, dict):
        details = {"message": details}
    message = details.get("message") or details.get("detail") or json.dumps(body)[:MAX_QUOTED_CHARS]
    code, param = details.get("code"), details.get("param")
    try:
        retry_after_s = float(retry_after) if retry_after else None
    except ValueError:  # an HTTP date
        retry_after_s = None
    return ServerError(
        str(message),
        status=status,
        param=None if param is None else str(param),
        code=None if code is None else str(code),
        retry_after_s=retry_after_s,
    )


def parse_usage(counts: Json | None) -> Usage | None:
    """Return the token counts of a reply, where it has them."""
    if not counts:
        return None
    details = counts.get("prompt_tokens_details") or {}
    return Usage(counts["prompt_tokens"], counts["completion_tokens"], details.get("cached_tokens") or 0)


def parse_deltas(chunk: Json) -> Iterator[ChatDelta]:
    """Yield the delta of each choice in a stream's chunk, and its token counts."""
    for choice in chunk["choices"]:
        delta = choice["delta"]
        yield ChatDelta(
            index=choice["index"],
            content=delta.get("content") or "",
            reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
            tool_calls=tuple(_tool_call(piece) for piece in delta.get("tool_calls") or ()),
            finish_reason=choice.get("finish_reason"),
        )
    usage = parse_usage(chunk.get("usage"))
    if usage is not None:
        yield ChatDelta(usage=usage)


def _tool_call(piece: Json) -> ToolCallDelta:
    function = piece.get("function") or {}
    return ToolCallDelta(piece["index"], piece.get("id"), function.get("name"), function.get("arguments") or "")
