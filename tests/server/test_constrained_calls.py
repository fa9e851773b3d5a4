"""Calls of a model that writes at random, in every format: each one that comes out parses, and obeys its tool's schema.

The judge is `jsonschema`, which shares nothing with the grammars.
"""

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
from sampling_engine import NUM_BYTES, SamplingEngine
from schema_samples import CITY, WRITTEN, random_schema, tool
from server_fakes import running
from toy_models import TOY_MODELS, ToyModel

from lmdserve.server.model import ServedModel, load_served_model
from lmdserve.tools.schema import normalize_tools

_MISTRAL = TOY_MODELS["mistral"]
MODELS = TOY_MODELS | {
    "mistral, list": replace(
        _MISTRAL, control_tokens={t: True for t in _MISTRAL.control_tokens if t not in ("[ARGS]", "[CALL_ID]")}
    )
}
NAMES = ("qwen", "qwen without tools", "hermes, spelled", "llama", "mistral", "mistral, list", "internlm2")
USER = {"role": "user", "content": "Hi"}
NUM_REQUESTS = 12  # of each format and tool_choice, with four tools each


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    def load(name: str) -> ServedModel:
        folder = MODELS[name].write(tmp_path_factory.mktemp(name.replace(" ", "_").replace(",", "")))
        return load_served_model(Path(folder), name="toy", chat_template=None)

    return {name: load(name) for name in NAMES}


@asynccontextmanager
async def _serving(served: dict[str, ServedModel], name: str, seed: int = 0) -> AsyncIterator[Any]:
    toy: ToyModel = MODELS[name]
    opener = b"<tool_call>" if name == "hermes, spelled" else b""
    engine = SamplingEngine(NUM_BYTES + len(toy.control_tokens), toy.ids(toy.turn_end), seed=seed, opener=opener)
    async with running(engine, served[name]) as url, aiohttp.ClientSession(url) as session:

        async def post(*, status: int = 200, **fields: Any) -> Any:
            body = {"messages": [USER], "max_tokens": 3000, **fields}
            async with session.post("/v1/chat/completions", json=body) as reply:
                text = await reply.text()
                assert reply.status == status, text
                post.headers = reply.headers  # type: ignore[attr-defined]
                return _folded(text) if fields.get("stream") else json.loads(text)

        yield post


def _folded(stream: str) -> dict[str, Any]:
    """Fold a stream by OpenAI's rules: calls by index, arguments concatenated."""
    calls: dict[int, dict[str, Any]] = {}
    content, reason = "", None
    for line in stream.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        content += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls", ()):
            call = calls.setdefault(delta["index"], {"function": {"name": "", "arguments": ""}})
            call["function"]["name"] += delta["function"].get("name", "")
            call["function"]["arguments"] += delta["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    message = {"content": content or None} | ({"tool_calls": list(calls.values())} if calls else {})
    return {"choices": [{"message": message, "finish_reason": reason}]}


def _check_calls(reply: Any, tools: list[Any]) -> int:
    """Check every call with an independent validator; return how many there were."""
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in normalize_tools(tools)}
    choice = reply["choices"][0]
    calls = choice["message"].get("tool_calls", [])
    if choice["finish_reason"] == "length" and calls and not _is_json(calls[-1]["function"]["arguments"]):
        calls = calls[:-1]  # a stream cannot take back the beginning of a call that max_tokens cut
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.Draft202012Validator(schemas[call["function"]["name"]]).validate(arguments)
    if calls and choice["finish_reason"] != "length":
        assert choice["finish_reason"] == "tool_calls"
    return len(calls)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _toolbox(rng: random.Random) -> list[Any]:
    schemas = [*rng.sample(WRITTEN, 2), random_schema(rng), random_schema(rng)]
    return [tool(f"f{index}", schema) for index, schema in enumerate(schemas)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_required_calls_obey_their_schemas(served: dict[str, ServedModel], name: str, stream: bool) -> None:
    rng = random.Random(name)
    async with _serving(served, name) as post:
        for _ in range(NUM_REQUESTS):
            tools = _toolbox(rng)
            reply = await post(tools=tools, tool_choice="required", stream=stream, parallel_tool_calls=True)
            num_calls = _check_calls(reply, tools)
            assert num_calls or reply["choices"][0]["finish_reason"] == "length"
            assert post.headers["x-lmdserve-grammar"] == "strict"
            if reply["choices"][0]["finish_reason"] == "tool_calls":
                assert not reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name", NAMES)
async def test_a_named_function_is_called_once(served: dict[str, ServedModel], name: str) -> None:
    rng = random.Random(name)
    async with _serving(served, name) as post:
        for _ in range(NUM_REQUESTS):
            tools = _toolbox(rng)
            chosen = rng.choice(tools)["function"]["name"]
            reply = await post(tools=tools, tool_choice={"type": "function", "function": {"name": chosen}})
            message = reply["choices"][0]["message"]
            if reply["choices"][0]["finish_reason"] != "length":
                assert [call["function"]["name"] for call in message["tool_calls"]] == [chosen]
            _check_calls(reply, tools)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_with_auto_every_call_obeys_its_schema(served: dict[str, ServedModel], name: str, stream: bool) -> None:
    rng = random.Random(name)
    num_calls = 0
    async with _serving(served, name) as post:
        for _ in range(4 * NUM_REQUESTS):
            tools = _toolbox(rng)
            num_calls += _check_calls(await post(tools=tools, stream=stream, max_tokens=1000), tools)
    assert num_calls > 3


@pytest.mark.parametrize("name", NAMES)
async def test_allowed_tools_are_the_only_ones_called(served: dict[str, ServedModel], name: str) -> None:
    tools = [tool("yes", CITY), tool("no", CITY)]
    allowed = [{"type": "function", "function": {"name": "yes"}}]
    async with _serving(served, name) as post:
        for mode in ("required", "auto") * 10:
            choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
            message = (await post(tools=tools, tool_choice=choice, max_tokens=300))["choices"][0]["message"]
            assert {call["function"]["name"] for call in message.get("tool_calls", ())} <= {"yes"}


@pytest.mark.parametrize("name", NAMES)
async def test_without_parallel_calls_there_is_one(served: dict[str, ServedModel], name: str) -> None:
    tools = [tool("f", {**CITY, "additionalProperties": False})]
    async with _serving(served, name) as post:
        for _ in range(6):
            reply = await post(tools=tools, tool_choice="required", parallel_tool_calls=False)
            assert _check_calls(reply, tools) == 1


async def test_a_call_that_max_tokens_cuts_is_no_call(served: dict[str, ServedModel]) -> None:
    tools = [tool("f", {**CITY, "additionalProperties": False})]
    async with _serving(served, "internlm2") as post:
        choice = (await post(tools=tools, tool_choice="required", max_tokens=12))["choices"][0]
        assert choice["finish_reason"] == "length"
        assert "tool_calls" not in choice["message"]


async def test_what_cannot_be_enforced_is_said_or_refused(served: dict[str, ServedModel]) -> None:
    loose = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "maxItems": 1}}}
    async with _serving(served, "internlm2") as post:
        await post(tools=[tool("f", loose)], tool_choice="required", max_tokens=40)
        assert post.headers["x-lmdserve-grammar"] == "lenient (uniqueItems)"
        error = (await post(tools=[tool("ok", CITY), tool("f", loose, strict=True)], status=400))["error"]
        assert error["param"] == "tools[1]"
        assert "uniqueItems" in error["message"]
        for choice in ("required", {"type": "function", "function": {"name": "g"}}):
            assert (await post(tool_choice=choice, status=400))["error"]["param"] == "tool_choice"
