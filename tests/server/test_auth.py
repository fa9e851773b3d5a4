"""API keys on every route but the probes, and which browsers may call."""

from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
from server_fakes import FakeEngine, chat_body, running

from lmdserve.server.model import ServedModel

GUARDED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/render"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/toy"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("HEAD", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("OPTIONS", "/v1/models"),
    ("GET", "//health"),
    ("GET", "/health/"),
    ("GET", "/%68ealth/../v1/models"),
]


@pytest.fixture
async def guarded_url(engine: FakeEngine, model: ServedModel) -> AsyncIterator[str]:
    async with running(engine, model, api_keys=("alpha", "bêta")) as url:
        yield url


@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", "Bearer alph", "Bearer ", "Bearer", "Basic alpha", "alpha"]
)
async def test_without_a_key_every_route_is_closed(
    session: aiohttp.ClientSession, guarded_url: str, engine: FakeEngine, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in GUARDED:
        async with session.request(method, guarded_url + path, headers=headers, json=chat_body()) as reply:
            assert reply.status == 401, (method, path)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            if method != "HEAD":
                error = (await reply.json())["error"]
                assert (error["code"], error["param"]) == ("invalid_api_key", "Authorization")
                assert "alpha" not in error["message"].replace(str(authorization), "")
    assert engine.requests == []


@pytest.mark.parametrize("key", ["alpha", "bêta"])
async def test_each_key_opens_every_route(session: aiohttp.ClientSession, guarded_url: str, key: str) -> None:
    async with session.post(
        guarded_url + "/v1/chat/completions",
        json=chat_body(),
        headers={"Authorization": f"bearer {key}"},
    ) as reply:
        assert reply.status == 200


async def test_probes_need_no_key(session: aiohttp.ClientSession, guarded_url: str) -> None:
    for path in ("/health", "/ready"):
        async with session.get(guarded_url + path) as reply:
            assert reply.status == 200


async def test_the_sdk_says_that_the_key_is_wrong(guarded_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{guarded_url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="not one of the server's keys"):
            await client.models.list()
    async with openai.AsyncOpenAI(base_url=f"{guarded_url}/v1", api_key="alpha", max_retries=0) as client:
        assert [card.id for card in (await client.models.list()).data] == ["toy"]


async def test_a_server_without_keys_is_open(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(url + "/v1/models", headers={"Authorization": "Bearer anything"}) as reply:
        assert reply.status == 200


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


async def test_allowed_origins_may_call(session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel) -> None:
    """Preflight passes without a key, and answers, streams and errors can be read."""
    origin = "https://chat.example"
    async with running(engine, model, api_keys=("alpha",), allow_origins=(origin,)) as url:
        target = url + "/v1/chat/completions"
        async with session.options(target, headers={"Origin": origin, **PREFLIGHT}) as reply:
            assert reply.status == 204
            assert reply.headers["Access-Control-Allow-Origin"] == origin
            assert "POST" in reply.headers["Access-Control-Allow-Methods"]
            assert reply.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        for key, stream in (("alpha", True), ("alpha", False), ("wrong", False)):
            headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
            async with session.post(target, json=chat_body(stream=stream), headers=headers) as reply:
                assert reply.headers["Access-Control-Allow-Origin"] == origin
                assert reply.headers["Vary"] == "Origin"
                assert "x-request-id" in reply.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("allow_origins", [(), ("https://chat.example",)])
async def test_other_origins_may_not(
    session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel, allow_origins: tuple[str, ...]
) -> None:
    async with running(engine, model, allow_origins=allow_origins) as url:
        headers = {"Origin": "https://evil.example", **PREFLIGHT}
        async with session.options(url + "/v1/chat/completions", headers=headers) as reply:
            assert reply.status == 405
            assert "Access-Control-Allow-Origin" not in reply.headers
        async with session.get(url + "/v1/models", headers=headers) as reply:
            assert "Access-Control-Allow-Origin" not in reply.headers


async def test_a_star_allows_any_origin(session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel) -> None:
    async with running(engine, model, allow_origins=("*",)) as url:
        async with session.get(url + "/v1/models", headers={"Origin": "https://any.example"}) as reply:
            assert reply.headers["Access-Control-Allow-Origin"] == "*"
        async with session.get(url + "/v1/models") as reply:
            assert "Access-Control-Allow-Origin" not in reply.headers
