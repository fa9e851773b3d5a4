"""The routes for whoever runs the server: is it alive, does it take requests, what is it, how is it doing."""

from typing import Any

import orjson
from aiohttp import web

from lmdserve import __version__
from lmdserve.engine.api import EngineDeadError

from ..errors import UnavailableError
from ..metrics import scrape
from ..openapi import describe_api
from ..services import SERVICES


async def health(request: web.Request) -> web.Response:
    """GET /health: whether the engine moves. A failing answer means that only a restart helps."""
    services = request.app[SERVICES]
    try:
        services.servings.check_health()
    except EngineDeadError as error:
        raise UnavailableError(str(error)) from error
    return _json({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """GET /ready: whether to send requests here; not while the engine starts, drains or is dead."""
    request.app[SERVICES].lifecycle.check_open()
    return await health(request)


async def version(request: web.Request) -> web.Response:
    """GET /version"""
    return _json({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics, for Prometheus"""
    services = request.app[SERVICES]
    body, content_type = scrape(services.metrics, services.servings, request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    return _json(describe_api())


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
