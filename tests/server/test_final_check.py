"""Answers whose grammar leaves a keyword out: what breaks its schema never leaves as a call, and ends in an error."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
from sampling_engine import NUM_BYTES, SamplingEngine
from schema_samples import CITY, tool
from server_fakes import FakeEngine, running
from toy_models import TOY_MODELS

from lmdserve.engine.api import FinishReason
from lmdserve.server.model import ServedModel, load_served_model
from lmdserve.server.schema_checker import SchemaChecker

TOY = TOY_MODELS["internlm2"]
UNIQUE = {
    "type": "object",
    "properties": {"ids": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
    "required": ["ids"],
    "additionalProperties": False,
}
TOOLS = [tool("pick", UNIQUE), tool("look", CITY)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return load_served_model(Path(TOY.write(tmp_path_factory.mktemp("toy"))), name="toy", chat_template=None)


def call(name: str, arguments: str) -> str:
    return f'<|action_start|><|plugin|>\n{{"name": "{name}", "parameters": {arguments}}}<|action_end|>'


@asynccontextmanager
async def serving(served: ServedModel, engine: FakeEngine) -> AsyncIterator[Any]:
    async with running(engine, served) as url, aiohttp.ClientSession(url) as session:

        async def post(path: str = "/v1/chat/completions", *, status: int = 200, **fields: Any) -> Any:
            body = {} if "prompt" in fields else {"messages": [{"role": "user", "content": "Hi"}]}
            async with session.post(path, json={**body, **fields}) as reply:
                assert reply.status == status, await reply.text()
                post.headers = reply.headers  # type: ignore[attr-defined]
                return await reply.text() if fields.get("stream") else await reply.json()

        yield post


def answering(text: str, finish: FinishReason = FinishReason.STOP) -> FakeEngine:
    """An engine that says this whatever the grammar allows."""
    engine = FakeEngine()
    engine.info = SamplingEngine(NUM_BYTES + len(TOY.control_tokens), TOY.ids(TOY.turn_end)).info
    engine.script = lambda request: TOY.answer(text, finish=finish)
    return engine


def deltas(stream: str) -> list[Any]:
    chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    return [chunk["choices"][0]["delta"] for chunk in chunks if "choices" in chunk]


async def test_a_call_that_breaks_its_schema_is_an_error_and_no_call(served: ServedModel) -> None:
    async with serving(served, answering("Well. " + call("pick", '{"ids": [1, 1]}'))) as post:
        error = (await post(tools=TOOLS, status=422))["error"]
        assert error["code"] == "invalid_output"
        assert "pick" in error["message"]
        assert "non-unique" in error["message"]
        assert error["failed_generation"] == 'pick({"ids": [1, 1]})'
        stream = await post(tools=TOOLS, stream=True)
        assert post.headers["x-lmdserve-grammar"] == "lenient (uniqueItems)"
        assert "".join(delta.get("content") or "" for delta in deltas(stream)).startswith("Well.")
        assert not any("tool_calls" in delta for delta in deltas(stream))
        assert "invalid_output" in stream
        assert "[DONE]" not in stream


async def test_a_call_that_obeys_leaves_when_it_is_whole(served: ServedModel) -> None:
    async with serving(served, answering(call("pick", '{"ids": [1, 2]}'))) as post:
        choice = (await post(tools=TOOLS))["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ids": [1, 2]}'
        calls = [
            delta["tool_calls"][0] for delta in deltas(await post(tools=TOOLS, stream=True)) if "tool_calls" in delta
        ]
        assert "".join(part["function"]["arguments"] for part in calls) == '{"ids": [1, 2]}'
        assert [part.get("type") for part in calls[:1]] == ["function"]


async def test_tools_that_a_grammar_enforces_still_stream(served: ServedModel) -> None:
    async with serving(served, answering(call("look", '{"city": "Paris"}'))) as post:
        stream = await post(tools=TOOLS, stream=True)
        assert post.headers["x-lmdserve-grammar"] == "lenient (uniqueItems)"
        assert sum("tool_calls" in delta for delta in deltas(stream)) > 5


async def test_a_held_call_that_max_tokens_cuts_is_text(served: ServedModel) -> None:
    text = '<|action_start|><|plugin|>\n{"name": "pick", "parameters": {"ids": [1, 1'
    async with serving(served, answering(text, FinishReason.LENGTH)) as post:
        choice = (await post(tools=TOOLS))["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert not any("tool_calls" in delta for delta in deltas(await post(tools=TOOLS, stream=True)))


async def test_an_answer_that_breaks_its_schema_is_an_error(served: ServedModel) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": UNIQUE}}
    async with serving(served, answering('{"ids": [2, 2]}')) as post:
        for fields in ({"response_format": wanted}, {"response_format": wanted, "tools": TOOLS}):
            error = (await post(**fields, status=422))["error"]
            assert error["failed_generation"] == '{"ids": [2, 2]}'
            stream = await post(**fields, stream=True)
            assert "".join(delta.get("content") or "" for delta in deltas(stream)) == '{"ids": [2, 2]}'
            assert 'finish_reason":"stop' not in stream
            assert "invalid_output" in stream
        await post("/v1/completions", prompt="a", guided_json=UNIQUE, max_tokens=99, status=422)
        strict = {"type": "json_schema", "json_schema": {"name": "x", "schema": UNIQUE, "strict": True}}
        assert "uniqueItems" in (await post(response_format=strict, status=400))["error"]["message"]


async def test_an_answer_that_obeys_or_was_cut_is_an_answer(served: ServedModel) -> None:
    async with serving(served, answering('{"ids": [1, 2]}')) as post:
        assert (await post(guided_json=UNIQUE))["choices"][0]["message"]["content"] == '{"ids": [1, 2]}'
        echoed = await post("/v1/completions", prompt="a", guided_json=UNIQUE, max_tokens=99, echo=True)
        assert echoed["choices"][0]["text"] == 'a{"ids": [1, 2]}'
    async with serving(served, answering('{"ids": [1, 1]}')) as post:
        choice = (await post(guided_json=UNIQUE, stop=[", 1"]))["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", '{"ids": [1')


async def test_what_cannot_be_checked_is_refused(served: ServedModel) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "not": {"pattern": "("}}}}
    async with serving(served, answering("x")) as post:
        error = (await post(tools=[tool("ok", CITY), tool("f", schema)], status=400))["error"]
        assert error["param"] == "tools[1]"
        assert '"(" is not a "regex"' in error["message"]
        assert (await post(guided_json=schema, status=400))["error"]["param"] == "guided_json"


async def test_patterns_that_no_grammar_follows_are_checked(served: ServedModel) -> None:
    """Such as those that zod writes for e-mail addresses."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!-)[a-z-]+$"}}, "required": ["a"]}
    for text, status in (('{"a": "-x"}', 422), ('{"a": "x-"}', 200)):
        async with serving(served, answering(text)) as post:
            await post(guided_json=schema, status=status)
            assert status == 422 or post.headers["x-lmdserve-grammar"] == "lenient (pattern)"


async def test_random_answers_obey_or_are_refused(served: ServedModel) -> None:
    """`jsonschema` is the judge; the checker is another library."""
    rng = random.Random(3)
    ids = {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "maxItems": 3, "minItems": 2}
    schemas = [
        {"type": "object", "properties": {"ids": ids}, "required": ["ids"], "additionalProperties": False},
        {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9, "not": {"const": 3}}},
         "required": ["n"], "additionalProperties": False},
        {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "minProperties": 1,
         "additionalProperties": False},
    ]  # fmt: skip
    statuses = {200: 0, 422: 0}
    engine = SamplingEngine(NUM_BYTES + len(TOY.control_tokens), TOY.ids(TOY.turn_end))
    async with running(engine, served) as url, aiohttp.ClientSession(url) as session:
        for number in range(40):
            schema = rng.choice(schemas)
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
            is_call = number % 2 == 0
            extra = {"tools": [tool("f", schema)], "tool_choice": "required"} if is_call else {"guided_json": schema}
            async with session.post("/v1/chat/completions", json={**body, **extra}) as reply:
                statuses[reply.status] += 1
                if reply.status == 422:
                    continue
                choice = (await reply.json())["choices"][0]
            if choice["finish_reason"] == "length":
                continue
            message = choice["message"]
            texts = [one["function"]["arguments"] for one in message["tool_calls"]] if is_call else [message["content"]]
            for text in texts:
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert min(statuses.values()) > 3


def exponential(depth: int) -> str:
    """A schema that takes 2 ** depth steps to say no."""
    definitions: dict[str, Any] = {
        f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(depth)
    }
    definitions[f"a{depth}"] = {"type": "array", "uniqueItems": True}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": definitions})


async def test_a_schema_that_takes_for_ever_is_given_up_and_hurts_no_other() -> None:
    checker = SchemaChecker(time_limit_s=2.0)
    try:
        assert await checker.problem('{"uniqueItems": true}', "[1, 1]") == "[1,1] has non-unique elements"
        begun = time.perf_counter()
        slow = asyncio.create_task(checker.problem(exponential(60), "[1, 1]"))
        await asyncio.sleep(0.1)
        assert await checker.problem('{"uniqueItems": true}', "[2, 2]") == "[2,2] has non-unique elements"
        assert not slow.done(), "a slow check holds up no other"
        problem = await slow
        assert problem is not None
        assert "simplify" in problem
        assert time.perf_counter() - begun < 30.0
        assert await checker.problem(exponential(60), "[1, 2]") is None
        assert await checker.problem('{"items": {"multipleOf": 2}}', "[2, 3]") == "[1]: 3 is not a multiple of 2"
    finally:
        checker.close()
