"""Answers of a model that writes at random, held to a format: judged by `jsonschema`, `re` and plain comparison."""

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
from sampling_engine import NUM_BYTES, SamplingEngine
from schema_samples import CITY, random_schema, tool
from server_fakes import running
from toy_models import TOY_MODELS

from lmdserve.server.model import ServedModel, load_served_model

USER = {"role": "user", "content": "Hi"}
CLOSED_CITY = {**CITY, "additionalProperties": False}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    def load(name: str) -> ServedModel:
        folder = TOY_MODELS[name].write(tmp_path_factory.mktemp(name))
        return load_served_model(Path(folder), name="toy", chat_template=None)

    return {name: load(name) for name in ("qwen", "internlm2", "llama")}


@asynccontextmanager
async def _serving(served: dict[str, ServedModel], name: str = "internlm2") -> AsyncIterator[Any]:
    toy = TOY_MODELS[name]
    engine = SamplingEngine(NUM_BYTES + len(toy.control_tokens), toy.ids(toy.turn_end))
    async with running(engine, served[name]) as url, aiohttp.ClientSession(url) as session:

        async def post(path: str = "/v1/chat/completions", *, status: int = 200, **fields: Any) -> Any:
            body = {"max_tokens": 3000, **({"messages": [USER]} if "prompt" not in fields else {}), **fields}
            async with session.post(path, json=body) as reply:
                assert reply.status == status, await reply.text()
                post.headers = reply.headers  # type: ignore[attr-defined]
                return await reply.text() if fields.get("stream") else await reply.json()

        yield post


def _content(reply: Any, index: int = 0) -> str:
    choice = reply["choices"][index]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


async def test_json_schemas_are_obeyed(served: dict[str, ServedModel]) -> None:
    rng = random.Random(5)
    async with _serving(served) as post:
        for number in range(30):
            schema = random_schema(rng)
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": number % 2 == 0}}
            value = json.loads(_content(await post(response_format=wanted)))
            jsonschema.Draft202012Validator(schema).validate(value)
            assert post.headers["x-lmdserve-grammar"] == "strict"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-z]{2}"}, "[0-9]{3}-[a-z]{2}"),
        ({"guided_regex": "a{2,5}|上海"}, "a{2,5}|上海"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "x?y"}}, "x?y"),
        ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
        ({"choice": ["red", "grün", 'a "b"\n\\c']}, 'red|grün|a "b"\n\\\\c'),
        ({"guided_choice": ["1", "2"]}, "[12]"),
        ({"structured_outputs": {"choice": ["x"]}}, "x"),
        ({"grammar": 'start: "a" b+\nb: "b" | "c"'}, "a[bc]+"),
        ({"guided_grammar": 'start: /[0-4]/ "!"'}, "[0-4]!"),
        ({"guided_json": '{"enum": [1, 2]}'}, "[12]"),
        ({"structured_outputs": {"json": {"const": "k"}}}, '"k"'),
    ],
)
async def test_every_spelling_of_a_format(served: dict[str, ServedModel], fields: Any, pattern: str) -> None:
    async with _serving(served) as post:
        for _ in range(5):
            assert re.fullmatch(pattern, _content(await post(**fields)))
            assert re.fullmatch(pattern, _content(await post("/v1/completions", prompt="a", **fields)))


async def test_it_goes_with_streams_several_choices_and_stop_strings(served: dict[str, ServedModel]) -> None:
    async with _serving(served) as post:
        reply = await post(regex="[0-9]{8}", n=4)
        texts = [_content(reply, index) for index in range(4)]
        assert all(re.fullmatch("[0-9]{8}", text) for text in texts)
        assert len(set(texts)) == 4
        stream = await post(choice=["abc"], stream=True)
        chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "abc"
        assert post.headers["x-lmdserve-grammar"] == "strict"
        assert _content(await post(choice=["abcde"], stop=["d"])) == "abc"
        assert _content(await post(choice=["abc"], ignore_eos=True, min_tokens=2)) == "abc"
        assert (await post(choice=["abcde"], max_tokens=2))["choices"][0]["finish_reason"] == "length"


async def test_the_format_begins_behind_reasoning(served: dict[str, ServedModel]) -> None:
    async with _serving(served, "qwen") as post:
        for opens in (True, False):
            reply = await post(choice=["abc"], chat_template_kwargs={"opens": True} if opens else {})
            message = reply["choices"][0]["message"]
            assert message["content"] == "abc"
            if opens:
                assert message["reasoning_content"]


async def test_reasoning_without_tokens_around_it_is_refused_before_a_format(tmp_path: Path) -> None:
    toy = replace(TOY_MODELS["qwen"], control_tokens={"<|im_start|>": True, "<|im_end|>": True})
    model = load_served_model(toy.write(tmp_path), name="toy", chat_template=None)
    engine = SamplingEngine(NUM_BYTES + 2, [NUM_BYTES + 1])
    async with running(engine, model) as url, aiohttp.ClientSession(url) as session:
        for param, fields in (("tool_choice", {"tool_choice": "required"}), ("regex", {"regex": "a"})):
            body = {"messages": [USER], "tools": [tool("f", CLOSED_CITY)], **fields}
            async with session.post("/v1/chat/completions", json=body) as reply:
                assert reply.status == 400
                assert (await reply.json())["error"]["param"] == param


async def test_an_answer_of_a_format_or_a_call(served: dict[str, ServedModel]) -> None:
    """With tool_choice auto the model chooses between a call and an answer, and each obeys its own schema."""
    kinds = set()
    async with _serving(served) as post:
        for _ in range(40):
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
            message = (await post(tools=[tool("f", CLOSED_CITY)], response_format=wanted))["choices"][0]["message"]
            if message.get("tool_calls"):
                jsonschema.validate(json.loads(message["tool_calls"][0]["function"]["arguments"]), CLOSED_CITY)
                kinds.add("call")
            else:
                assert message["content"] in ("1", "2")
                kinds.add("answer")
        assert kinds == {"call", "answer"}
        reply = await post(tools=[tool("f", CLOSED_CITY)], tool_choice="required", choice=["a"])
        assert reply["choices"][0]["message"]["content"] is None, "there is no answer that the format could be about"


async def test_an_answer_of_a_format_or_a_call_where_both_are_json(served: dict[str, ServedModel]) -> None:
    answer = {"type": "integer", "minimum": 0, "maximum": 9}
    properties = {"name": {"enum": ["f"]}, "parameters": {"type": "object", "maxProperties": 0}, "answer": answer}
    schema = {"type": "object", "properties": properties, "required": ["answer"], "additionalProperties": False}
    kinds = set()
    async with _serving(served, "llama") as post:
        for number in range(40):
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            reply = await post(tools=[tool("f", CLOSED_CITY)], response_format=wanted, n=1 + number % 2)
            for choice in reply["choices"]:
                message = choice["message"]
                kinds.add(choice["finish_reason"])
                if choice["finish_reason"] == "tool_calls":
                    assert message["content"] is None
                    jsonschema.validate(json.loads(message["tool_calls"][0]["function"]["arguments"]), CLOSED_CITY)
                else:
                    jsonschema.validate(json.loads(message["content"]), schema)
        assert kinds == {"tool_calls", "stop"}
        for fields in ({"response_format": {"type": "json_object"}}, {"regex": "[0-9]+"}):
            error = await post(tools=[tool("f", CLOSED_CITY)], status=400, **fields)
            assert "tool_choice" in error["error"]["message"]


async def test_code_and_calls_side_by_side(served: dict[str, ServedModel]) -> None:
    tools = [tool("f", CLOSED_CITY), {"type": "code_interpreter"}]
    for name in ("llama", "internlm2"):
        async with _serving(served, name) as post:
            for choice in ("auto", "required") * 10:
                reply = await post(tools=tools, tool_choice=choice, max_tokens=400)
                for call in reply["choices"][0]["message"].get("tool_calls", ()):
                    arguments = json.loads(call["function"]["arguments"])
                    if call["function"]["name"] == "f":
                        jsonschema.validate(arguments, CLOSED_CITY)
                    else:
                        assert isinstance(arguments["code"], str)


def _exponential() -> Any:
    """Twelve times a choice of three, all at once."""
    parts = [
        {"anyOf": [{"properties": {f"{i}{j}": {"const": j}}, "required": [f"{i}{j}"]} for j in range(3)]}
        for i in range(12)
    ]
    return {"allOf": parts}


def _nested(depth: int) -> Any:
    return {"type": "string"} if depth == 0 else {"type": "array", "items": _nested(depth - 1)}


HOSTILE: list[dict[str, Any]] = [
    {"guided_json": _exponential()},
    {"guided_json": {"enum": ["x" * 100 + str(i) for i in range(9_000)]}},  # nearly 1 MB
    {"guided_json": _nested(80)},
    {"guided_json": False},
    {"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}},
    {"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"$ref": "https://example.com/a.json"}},
    {"guided_json": {"type": "string", "pattern": "("}},
    {"regex": "(x{1000}){1000}{1000}"},
    {"grammar": "start: a\na: a"},
    {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    {"tools": [tool(f"f{i}", _exponential()) for i in range(3)], "tool_choice": "required"},
]


async def test_hostile_formats_are_refused_in_bounded_time_and_off_the_loop(served: dict[str, ServedModel]) -> None:
    gaps = []

    async def watch() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - begun)

    async with _serving(served) as post:
        await post(choice=["a"])
        watcher = asyncio.create_task(watch())
        for fields in HOSTILE:
            begun = time.perf_counter()
            error = (await post(status=400, **fields))["error"]
            assert time.perf_counter() - begun < 5.0, fields
            assert error["param"].split(".")[0].split("[")[0] in fields
            assert len(error["message"]) < 600
        watcher.cancel()
    assert max(gaps) < 0.5


async def test_catastrophic_regexes_and_many_tools_cost_little(served: dict[str, ServedModel]) -> None:
    async with _serving(served) as post:
        begun = time.perf_counter()
        for pattern in ("(a+)+b", "(a|a)*b", "(.*a){20}", "[a-z]*a.{100}"):
            await post(regex=pattern, max_tokens=30)
        tools = [tool(f"f{i}", CLOSED_CITY) for i in range(128)]
        await post(tools=tools, tool_choice="required")
        assert time.perf_counter() - begun < 10.0
