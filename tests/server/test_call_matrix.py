"""Two calls under every combination of tool_choice, parallel_tool_calls, strict, stream, n and stop; cut anywhere."""

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sampling_engine import NUM_BYTES
from schema_samples import tool
from server_fakes import FakeEngine, running
from toy_models import TOY_MODELS, ToyModel

from lmdserve.engine.api import Chunk, EngineInfo, FinishReason
from lmdserve.server.model import ServedModel, load_served_model

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
ARGUMENTS = ['{"city": "Paris"}', '{"city": "上海 STOP"}']
REPLIES = {  # what the model says before its calls, and the calls
    "internlm2": (
        "Hm. ",
        "".join(f'<|action_start|><|plugin|>\n{{"name": "f", "parameters": {one}}}<|action_end|>' for one in ARGUMENTS),
    ),
    "qwen": (
        "Hm. ",
        "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {one}}}\n</tool_call>' for one in ARGUMENTS),
    ),
    "hermes, spelled": (
        "Hm. ",
        "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {one}}}\n</tool_call>' for one in ARGUMENTS),
    ),
    "mistral": ("Hm. ", "".join(f"[TOOL_CALLS]f[ARGS]{one}" for one in ARGUMENTS)),
    "llama": ("", "; ".join(f'{{"name": "f", "parameters": {one}}}' for one in ARGUMENTS)),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    def load(name: str) -> ServedModel:
        folder = TOY_MODELS[name].write(tmp_path_factory.mktemp("toy"))
        return load_served_model(Path(folder), name="toy", chat_template=None)

    return {name: load(name) for name in REPLIES}


class Server:
    """One toy model that says what it is told to; `ask` gives the choices, streams folded by OpenAI's rules."""

    def __init__(self, toy: ToyModel, engine: FakeEngine, session: aiohttp.ClientSession) -> None:
        self.toy, self.engine, self._session = toy, engine, session

    def say(self, text: str, num_tokens: int | None = None) -> int:
        """Say a text, or its first tokens as if max_tokens had cut it; return how many tokens it has."""
        ids = self.toy.ids(text)

        def script(request: Any) -> list[Chunk]:
            said, reason = (ids, FinishReason.STOP) if num_tokens is None else (ids[:num_tokens], FinishReason.LENGTH)
            said = said + self.toy.ids(self.toy.turn_end) if num_tokens is None else said
            chunks = [Chunk((token_id,), None, None, 0, None) for token_id in said]
            return [*chunks[:-1], chunks[-1]._replace(finish_reason=reason)]

        self.engine.script = script
        return len(ids)

    async def ask(self, **fields: Any) -> list[dict[str, Any]]:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        async with self._session.post("/v1/chat/completions", json=body) as reply:
            text = await reply.text()
            assert reply.status == 200, text
        if not fields.get("stream"):
            return [_plain(choice) for choice in json.loads(text)["choices"]]
        assert text.endswith("data: [DONE]\n\n")
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        parts = [choice for chunk in chunks for choice in chunk["choices"]]
        indices = sorted({part["index"] for part in parts})
        return [_folded([part for part in parts if part["index"] == index]) for index in indices]


def _plain(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return {"content": message["content"] or "", "calls": calls, "reason": choice["finish_reason"]}


def _folded(parts: list[dict[str, Any]]) -> dict[str, Any]:
    names: list[str] = []
    arguments: list[str] = []
    ids: list[str] = []
    for part in parts:
        for delta in part["delta"].get("tool_calls", ()):
            if delta["index"] == len(names):
                assert delta["type"] == "function"
                names.append(delta["function"]["name"])
                ids.append(delta["id"])
                arguments.append("")
            else:
                assert not {"id", "type"} & set(delta)
            arguments[delta["index"]] += delta["function"]["arguments"]
    reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
    assert len(reasons) == 1
    assert parts[-1]["finish_reason"]
    assert len(set(ids)) == len(ids)
    content = "".join(part["delta"].get("content") or "" for part in parts)
    return {"content": content, "calls": list(zip(names, arguments, strict=True)), "reason": reasons[0]}


@asynccontextmanager
async def serving(served: dict[str, ServedModel], name: str) -> AsyncIterator[Server]:
    toy, engine = TOY_MODELS[name], FakeEngine()
    ends = frozenset(toy.ids(toy.turn_end))
    engine.info = EngineInfo(vocab_size=NUM_BYTES + len(toy.control_tokens), session_len=4096, eos_token_ids=ends)
    async with running(engine, served[name]) as url, aiohttp.ClientSession(url) as session:
        yield Server(toy, engine, session)


@pytest.mark.parametrize("name", REPLIES)
async def test_every_combination(served: dict[str, ServedModel], name: str) -> None:
    before, calls = REPLIES[name]
    named = {"type": "function", "function": {"name": "f"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    async with serving(served, name) as server:
        server.say(before + calls)
        for choice, parallel, strict, stream, n, stop in itertools.product(
            ("auto", "required", named, allowed), (None, False), (None, True), (False, True), (1, 2), (None, "STOP")
        ):
            tools = [tool("f", CITY) if strict is None else tool("f", CITY, strict=strict)]
            fields = {"tool_choice": choice, "parallel_tool_calls": parallel, "stream": stream, "n": n, "stop": stop}
            replies = await server.ask(tools=tools, **fields)
            expected = [("f", one) for one in (ARGUMENTS[:1] if parallel is False else ARGUMENTS)]
            assert len(replies) == n
            for reply in replies:
                assert reply["calls"] == expected, fields
                assert reply["reason"] == "tool_calls", fields
                assert reply["content"].strip() == before.strip(), fields


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_max_tokens_anywhere_is_said(served: dict[str, ServedModel], name: str, stream: bool) -> None:
    """Calls that were whole stay; what follows is content or, streamed, the beginning of a call. The reason is said."""
    before, calls = REPLIES[name]
    async with serving(served, name) as server:
        for num_tokens in range(1, server.say(before + calls)):
            server.say(before + calls, num_tokens)
            (reply,) = await server.ask(tools=[tool("f", CITY)], stream=stream)
            assert reply["reason"] == "length"
            whole = [arguments for _, arguments in reply["calls"] if arguments in ARGUMENTS]
            begun = [arguments for _, arguments in reply["calls"] if arguments not in ARGUMENTS]
            assert whole == ARGUMENTS[: len(whole)]
            assert len(begun) <= stream
            assert all(ARGUMENTS[len(whole)].startswith(text.rstrip("\ufffd")) for text in begun)  # a cut character


@pytest.mark.parametrize("name", REPLIES)
async def test_a_stop_string_ends_text_but_no_call(served: dict[str, ServedModel], name: str) -> None:
    before, calls = REPLIES[name]
    async with serving(served, name) as server:
        for stream in (False, True):
            server.say(before + calls)
            (reply,) = await server.ask(tools=[tool("f", CITY)], stop=["Paris", "city", '"'], stream=stream)
            if name == "llama":  # nothing tells a call before its first character
                continue
            assert [arguments for _, arguments in reply["calls"]] == ARGUMENTS
            server.say("Hm. Stop it. " + (calls if before else ""))
            (reply,) = await server.ask(tools=[tool("f", CITY)], stop="Stop", stream=stream)
            assert reply == {"content": "Hm. ", "calls": [], "reason": "stop"}
