"""Orders to the server: quantize, swap, roll back, and the jobs that they make. Closed unless --admin-keys opens it."""

from contextlib import aclosing
from typing import Any, cast

import orjson
from aiohttp import web

from ..admin import Admin
from ..admin_errors import AdminOffError
from ..admin_protocol import QuantizeOrder, RollbackOrder, SwapOrder
from ..job import Job
from ..parsing import parse_order
from ..services import SERVICES
from ..sse import EventStream
from .bodies import read_json


async def quantize(request: web.Request) -> web.Response:
    """POST /admin/quantize"""
    order = parse_order(await read_json(request), QuantizeOrder)
    return _accepted(await _admin(request).quantize(order))


async def swap(request: web.Request) -> web.Response:
    """POST /admin/models/swap"""
    admin = _admin(request)
    order = parse_order(await read_json(request), SwapOrder)
    check = await admin.check_swap(order)
    if order.dry_run:
        plan = {"object": "admin.swap_plan", "model": check.target.checkpoint, "plan": check.plan._asdict()}
        return _json(plan | {"quality": check.quality})
    return _accepted(await admin.swap(order, check))


async def roll_back(request: web.Request) -> web.Response:
    """POST /admin/models/rollback"""
    body = await read_json(request) if request.body_exists else b""
    return _accepted(await _admin(request).roll_back(parse_order(body, RollbackOrder)))


async def show_models(request: web.Request) -> web.Response:
    """GET /admin/models"""
    return _json(_admin(request).describe_models())


async def list_jobs(request: web.Request) -> web.Response:
    """GET /admin/jobs"""
    return _json({"object": "list", "data": [job.describe() for job in _admin(request).board.jobs]})


async def show_job(request: web.Request) -> web.Response:
    """GET /admin/jobs/{id}"""
    return _json(_job(request).describe())


async def cancel_job(request: web.Request) -> web.Response:
    """DELETE /admin/jobs/{id}: answered when nothing of it is left"""
    job = _job(request)
    await _admin(request).jobs.cancel(job)
    return _json(job.describe())


async def follow_job(request: web.Request) -> web.StreamResponse:
    """GET /admin/jobs/{id}/events: the present state, then every later one, until the job is over"""
    job = _job(request)
    interval_s = request.app[SERVICES].config.keep_alive_interval
    states = cast("Any", _admin(request).board.follow(job))
    async with EventStream(request, interval_s) as stream, aclosing(states):
        async for state in states:
            await stream.send([orjson.dumps(state)])
        await stream.end()
        return stream.response


def _admin(request: web.Request) -> Admin:
    admin = request.app[SERVICES].admin
    if admin is None:  # the door is closed, so nobody comes here
        raise AdminOffError("orders are off")
    return admin


def _job(request: web.Request) -> Job:
    return _admin(request).board.find(request.match_info["id"])


def _accepted(job: Job) -> web.Response:
    return web.Response(
        status=202,
        body=orjson.dumps(job.describe()),
        content_type="application/json",
        headers={"Location": f"/admin/jobs/{job.id}"},
    )


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
