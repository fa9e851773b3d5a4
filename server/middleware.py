"""What happens around every handler: request ids, the access log and outcomes, CORS, errors, keys, draining.

`MIDDLEWARES` lists them from the outermost inwards. Headers are added when a response is prepared, which streams do
before their handler returns.
"""

import asyncio
import difflib
import logging
import re
import secrets
import time

from aiohttp import web
from aiohttp.typedefs import Handler

from .errors import ApiError, BodyTooLargeError, HttpError, MethodNotAllowedError, RouteNotFoundError, describe
from .routes import GENERATING_PATHS, OTHER_APIS
from .services import ARRIVED_S, FAILURE, PROMPT_PARAM, REQUEST_ID, SERVICES

access_logger = logging.getLogger("lmdserve.access")

PROBE_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds; logged at DEBUG only
LOGGED_PATH_CHARS = 200  # as it was sent: decoded, it could hold line feeds and forge entries
EXPOSED_HEADERS = "x-request-id, retry-after, retry-after-ms, x-should-retry"
PREFLIGHT_MAX_AGE_S = 600
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and count and log how it ended."""
    metrics = request.app[SERVICES].metrics
    request[REQUEST_ID] = _request_id(request)
    request[ARRIVED_S] = arrived_s = time.perf_counter()
    request[PROMPT_PARAM] = "messages"
    metrics.num_active += 1
    outcome, status = "disconnected", 0
    try:
        response = await handler(request)
        outcome, status = _outcome(request), response.status
        return response
    except ConnectionError:
        # A write met a connection that the client had closed, before aiohttp cancelled the handler for it. Anything but
        # that cancellation aiohttp would log as a failure of ours.
        raise asyncio.CancelledError from None
    finally:
        took_s = time.perf_counter() - arrived_s
        metrics.num_active -= 1
        metrics.requests[_route_name(request), outcome] += 1
        if outcome == "succeeded" and request.path in GENERATING_PATHS:
            metrics.request.observe(took_s)
        path = request.rel_url.raw_path[:LOGGED_PATH_CHARS]
        access_logger.log(
            logging.DEBUG if request.path in PROBE_PATHS else logging.INFO,
            "%s %s %s %s %.3f s, request id %s",
            request.method, path, status or "-", outcome, took_s, request[REQUEST_ID],
        )  # fmt: skip


@web.middleware
async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a browser that asks whether it may call; what it may read is said by `add_headers`."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not asks or _allowed_origin(request) is None:
        return await handler(request)
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
        "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
    }
    return web.Response(status=204, headers=headers)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception into OpenAI's error object."""
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client is gone
    except web.HTTPException as error:
        if error.status < 400:
            raise
        failure = _from_http(request, error)
    except Exception as error:
        failure = describe(error, request[REQUEST_ID], prompt_param=request[PROMPT_PARAM])
    request[FAILURE] = failure
    return web.Response(
        status=failure.status, body=failure.body(), headers=failure.headers(), content_type="application/json"
    )


@web.middleware
async def require_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let nobody in without a key, where keys are set; paths that do not exist are no exception."""
    services = request.app[SERVICES]
    if services.admin_door.guards(request):
        services.admin_door.check(request)
    else:
        services.keys.check(request.path, request.headers.get("Authorization"))
    return await handler(request)


@web.middleware
async def refuse_while_closed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take no new work while the server starts or drains."""
    if request.path in GENERATING_PATHS and request.method == "POST":
        request.app[SERVICES].lifecycle.check_open()
    return await handler(request)


MIDDLEWARES = (observe, answer_preflight, answer_errors, require_key, refuse_while_closed)


async def add_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Put the request id and the CORS headers on a response that is about to be sent."""
    if not isinstance(request, web.Request) or REQUEST_ID not in request:
        return
    response.headers["x-request-id"] = request[REQUEST_ID]
    origin = _allowed_origin(request)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        if origin != "*":
            response.headers["Vary"] = "Origin"


def _request_id(request: web.Request) -> str:
    sent = request.headers.get("x-request-id", "")
    return sent if _REQUEST_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"


def _outcome(request: web.Request) -> str:
    failure = request.get(FAILURE)
    if failure is None:
        return "succeeded"
    if failure.status in (429, 503):
        return "refused"
    return "invalid" if failure.status < 500 else "failed"


def _route_name(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical


def _allowed_origin(request: web.Request) -> str | None:
    origin, allowed = request.headers.get("Origin"), request.app[SERVICES].config.allow_origins
    if origin is None or not allowed:
        return None
    if "*" in allowed:
        return "*"
    return origin if origin in allowed else None


def _from_http(request: web.Request, error: web.HTTPException) -> ApiError:
    match error:
        case web.HTTPNotFound():
            return RouteNotFoundError(f"there is no {request.path[:200]} here; {_instead(request)}")
        case web.HTTPMethodNotAllowed():
            allowed = sorted(error.allowed_methods)
            return MethodNotAllowedError(
                f"{request.path[:200]} does not answer {request.method[:20]}; use {' or '.join(allowed)}",
                allowed=allowed,
            )
        case web.HTTPRequestEntityTooLarge():
            return BodyTooLargeError(
                f"the body is larger than the {request.client_max_size} bytes that this server reads; shorten it",
                param="body",
            )
    return HttpError(error.status, f"{error.reason} ({error.text})" if error.text else error.reason)


def _instead(request: web.Request) -> str:
    path = request.path.rstrip("/") or "/"
    if path in OTHER_APIS:
        return OTHER_APIS[path]
    paths = [resource.canonical for resource in request.app.router.resources()]
    nearest = difflib.get_close_matches(request.path[:200], paths, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else "see /openapi.json for what there is"
