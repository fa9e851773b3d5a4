"""The demo model behind a real server: what it answers and calls obeys what was asked for."""

import json
import re
from typing import Any

import aiohttp
import jsonschema
import pytest
from server_process import ServerProcess

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": what, "parameters": schema}}
    for name, what, schema in (
        ("get_weather", "Get the weather of a city", WEATHER),
        ("add", "Add two numbers", ADD),
    )
]
QUESTION = "What is the weather in Shanghai?"


async def _ask(server: ServerProcess, **fields: Any) -> tuple[Any, str | None]:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 200, "temperature": 0, **fields}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/chat/completions", json=body) as reply,
    ):
        assert reply.status == 200, await reply.text()
        return (await reply.json())["choices"], reply.headers.get("x-lmdserve-grammar")


@pytest.mark.parametrize(
    ("tool_choice", "name"),
    [
        ("auto", "get_weather"),
        ("required", "get_weather"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
async def test_calls(server: ServerProcess, tool_choice: Any, name: str, temperature: int) -> None:
    schemas = {"get_weather": WEATHER, "add": ADD}
    (choice,), how = await _ask(server, tools=TOOLS, tool_choice=tool_choice, temperature=temperature)
    calls = choice["message"].get("tool_calls", [])
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
    assert how == "strict"
    if temperature == 0 or name == "add":
        assert [call["function"]["name"] for call in calls] == [name]
        assert choice["finish_reason"] == "tool_calls"


async def test_the_demo_model_still_reads_the_question(server: ServerProcess) -> None:
    """A grammar that does not get in the model's way changes nothing about a good call."""
    (choice,), _ = await _ask(server, tools=TOOLS)
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Shanghai"}


async def test_answers(server: ServerProcess) -> None:
    (choice,), _ = await _ask(server, regex="[0-9]{4}-[0-9]{2}", temperature=1)
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", choice["message"]["content"])
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": WEATHER, "strict": True}}
    (choice,), _ = await _ask(server, response_format=wanted)
    jsonschema.validate(json.loads(choice["message"]["content"]), WEATHER)
    choices, _ = await _ask(server, choice=["red", "blue"], n=3, logprobs=True, temperature=1)
    for one in choices:
        assert one["message"]["content"] in ("red", "blue")
        assert "".join(entry["token"] for entry in one["logprobs"]["content"]) in ("red", "blue")
