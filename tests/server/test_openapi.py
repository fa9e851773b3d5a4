"""The description at /openapi.json is a valid one, and the server survives what schemathesis makes of it.

Every operation gets a bounded number of generated requests, by the schema and against it. None may end in a 5xx, every
reply must be one that the description foresees, and every 4xx must name the field.
"""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import jsonschema
import pytest
import schemathesis
from admin_fakes import admin_server
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from server_fakes import FakeEngine

from lmdserve.server.fields import HARMLESS, REFUSED
from lmdserve.server.model import ServedModel
from lmdserve.server.openapi import describe_api
from lmdserve.server.protocol import ChatRequest, CompletionRequest
from lmdserve.server.routes import routes

MAX_EXAMPLES = 40

schema = schemathesis.openapi.from_dict(describe_api())


@pytest.fixture(scope="module")
def fuzzed_url(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server, which takes orders, in a thread of its own: schemathesis blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = admin_server(FakeEngine(), model, tmp_path_factory.mktemp("models"))
    yield asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10).url
    asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@schema.parametrize()
@settings(
    max_examples=MAX_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_generated_requests(case: Any, fuzzed_url: str) -> None:
    if case.path.startswith("/v1/") and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        del case.body["model"]  # hardly any generated name is the model's; without one, requests get further
    checks = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
              negative_data_rejection)  # fmt: skip
    response = case.call_and_validate(base_url=fuzzed_url, checks=checks)
    if response.status_code in (400, 413, 415):
        assert response.json()["error"]["param"], response.text


async def test_every_route_is_described_and_nothing_else(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(url + "/openapi.json") as reply:
        description = await reply.json()
    assert description == describe_api()
    described = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    served = {(route.path.replace("{model:.+}", "{model}"), route.method) for route in routes()}
    assert described == served


@pytest.mark.parametrize(
    ("name", "body", "is_valid"),
    [
        ("ChatRequest", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "stop": ["a"]}, True),
        ("ChatRequest", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, True),
        ("ChatRequest", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 2.5}, False),
        ("ChatRequest", {"messages": [{"role": "robot", "content": "Hi"}]}, False),
        ("ChatRequest", {"messages": []}, False),
        ("CompletionRequest", {"prompt": [1, 2, 3], "max_tokens": 0, "echo": True}, True),
        ("CompletionRequest", {"prompt": []}, False),
        ("CompletionRequest", {"prompt": "a", "n": 0}, False),
    ],
)
def test_the_bodies_are_described_with_their_limits(name: str, body: dict[str, Any], is_valid: bool) -> None:
    """jsonschema, which knows nothing of our records, agrees on what is valid."""
    description = {**describe_api(), "$ref": f"#/components/schemas/{name}"}
    assert jsonschema.Draft202012Validator(description).is_valid(body) is is_valid


def test_no_field_is_known_in_two_ways() -> None:
    chat, completion = set(ChatRequest.__struct_fields__), set(CompletionRequest.__struct_fields__)
    assert not HARMLESS & (chat | completion)
    assert not HARMLESS & REFUSED.keys()
    assert not REFUSED.keys() & chat & completion
    assert (chat ^ completion) - {"logprobs"} <= REFUSED.keys()
