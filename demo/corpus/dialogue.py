"""What one sample of the corpus is, and how it looks as InternLM2 prompt text and as OpenAI messages."""

import json
from dataclasses import dataclass, field
from typing import Any

Json = Any  # what json.loads returns

CONTROL_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")


@dataclass(frozen=True, slots=True)
class Call:
    """One function call: `arguments` is what json.loads of the call's arguments gives."""

    name: str
    arguments: dict[str, Json]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. An assistant turn may carry calls; a `tool` turn holds the result of one call."""

    role: str  # system, user, assistant, tool
    content: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(slots=True)
class Dialogue:
    """A whole conversation; with `text` set it is plain text without any chat format instead."""

    category: str
    language: str
    turns: list[Turn] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)  # bare function objects
    text: str = ""

    def say(self, user: str, assistant: str, *calls: Call) -> None:
        """Add one exchange."""
        self.turns += [Turn("user", user), Turn("assistant", assistant, calls)]

    def result(self, *contents: str) -> None:
        """Add the results of the last turn's calls, in their order."""
        self.turns += [Turn("tool", content) for content in contents]

    def answer(self, content: str, *calls: Call) -> None:
        """Add an assistant turn without a new question."""
        self.turns.append(Turn("assistant", content, calls))


def render(dialogue: Dialogue) -> str:
    """Return the text that is tokenized, control tokens written out, BOS first."""
    if dialogue.text:
        return f"<s>{dialogue.text}</s>"
    parts = ["<s>"]
    turns = dialogue.turns
    if turns[0].role == "system":
        parts.append(_render_turn(turns[0]))
        turns = turns[1:]
    if dialogue.tools:
        parts.append(
            f"<|im_start|>system name=<|plugin|>\n{json.dumps(dialogue.tools, ensure_ascii=False)}<|im_end|>\n"
        )
    parts.extend(_render_turn(turn) for turn in turns)
    return "".join(parts)


def _render_turn(turn: Turn) -> str:
    if turn.role == "tool":
        return f"<|im_start|>environment name=<|plugin|>\n{turn.content}<|im_end|>\n"
    calls = "".join(f"<|action_start|><|plugin|>\n{call_json(call)}<|action_end|>" for call in turn.calls)
    return f"<|im_start|>{turn.role}\n{turn.content}{calls}<|im_end|>\n"


def call_json(call: Call) -> str:
    """Return the body of an action block."""
    return json.dumps({"name": call.name, "parameters": call.arguments}, ensure_ascii=False)


def openai_messages(turns: list[Turn]) -> list[Json]:
    """Return the turns as a client of the chat API sends them."""
    messages: list[Json] = []
    pending: list[str] = []
    for position, turn in enumerate(turns):
        if turn.role == "tool":
            messages.append({"role": "tool", "tool_call_id": pending.pop(0), "content": turn.content})
            continue
        message: Json = {"role": turn.role, "content": turn.content}
        if turn.calls:
            pending = [f"call_{position}_{index}" for index in range(len(turn.calls))]
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for call_id, call in zip(pending, turn.calls, strict=True)
            ]
        messages.append(message)
    return messages


def openai_tools(tools: list[Json]) -> list[Json]:
    """Return the bare functions in the API's wrapper."""
    return [{"type": "function", "function": tool} for tool in tools]
