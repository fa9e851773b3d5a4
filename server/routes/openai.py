"""OpenAI's routes: chat and plain completions, and the list of models. Each handler parses, submits and replies."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from ..choices import ChoicePlan, ChoiceStream, ChoiceUpdate, stream_updates
from ..errors import ApiError, describe
from ..parsing import Record, parse
from ..protocol import ChatRequest, CompletionRequest, SamplingFields
from ..replies import ChatFormat, CompletionFormat, ReplyHead
from ..services import ARRIVED_S, FAILURE, PROMPT_PARAM, REQUEST_ID, SERVICES
from ..serving import Serving
from ..sse import stream_reply
from .bodies import read_json

INLINE_BODY_BYTES = 64 * 1024  # a body of 1 MB takes 8 ms to parse; longer ones are parsed on a thread


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    services = request.app[SERVICES]
    body = await _read(request, ChatRequest)
    with services.lifecycle.working():
        uid = f"chatcmpl-{secrets.token_hex(12)}"
        async with services.servings.lease() as serving:
            plans = await serving.planner.plan_chat(body, uid)
            return await _reply(request, serving, body, uid, plans, ChatFormat)


async def render_chat(request: web.Request) -> web.Response:
    """POST /v1/chat/render: the prompt that /v1/chat/completions would give the model for the same body"""
    body = await _read(request, ChatRequest)
    serving = request.app[SERVICES].servings.current
    prompt = await serving.planner.render_chat(body)
    return _json(
        {
            "object": "chat.render",
            "model": serving.model.name,
            "prompt": prompt.text,
            "prompt_token_ids": prompt.token_ids,
            "num_prompt_tokens": len(prompt.token_ids),
        }
    )


async def create_completion(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    services = request.app[SERVICES]
    request[PROMPT_PARAM] = "prompt"
    body = await _read(request, CompletionRequest)
    with services.lifecycle.working():
        uid = f"cmpl-{secrets.token_hex(12)}"
        async with services.servings.lease() as serving:
            plans = await serving.planner.plan_completion(body, uid)
            return await _reply(request, serving, body, uid, plans, CompletionFormat)


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    return _json({"object": "list", "data": [_model_card(request.app[SERVICES].servings.current)]})


async def retrieve_model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    serving = request.app[SERVICES].servings.current
    serving.planner.check_model(request.match_info["model"])
    return _json(_model_card(serving))


async def _read(request: web.Request, record_type: type[Record]) -> Record:
    body = await read_json(request)
    if len(body) <= INLINE_BODY_BYTES:
        return parse(body, record_type)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(request.app[SERVICES].prompt_threads, parse, body, record_type)


async def _reply(
    request: web.Request,
    serving: Serving,
    body: SamplingFields,
    uid: str,
    plans: Sequence[ChoicePlan],
    format_type: Callable[..., ChatFormat | CompletionFormat],
) -> web.StreamResponse:
    """Generate all choices and send them as one stream or one object; they end with this handler, however it ends."""
    services = request.app[SERVICES]
    tokenizer = serving.model.tokenizer
    choices = [ChoiceStream(plan, tokenizer) for plan in plans]
    head = ReplyHead(id=uid, created=int(time.time()), model=serving.model.name)
    reply_format = format_type(
        head, choices, tokenizer, usage_at_end=body.wants_usage_chunk, usage_always=body.wants_usage_always
    )
    on_output = services.metrics.output_clock(request[ARRIVED_S], choices)
    async with aclosing(stream_updates(serving.engine, choices, on_output)) as batches:
        if body.stream:
            return await stream_reply(
                request,
                batches,
                reply_format,
                keep_alive_interval_s=services.config.keep_alive_interval,
                describe_error=partial(_describe_late_error, request),
                headers=_grammar_headers(plans),
            )
        updates: list[ChoiceUpdate] = []
        async for batch in batches:
            updates += batch
    return web.Response(
        body=reply_format.whole(updates), content_type="application/json", headers=_grammar_headers(plans)
    )


def _grammar_headers(plans: Sequence[ChoicePlan]) -> dict[str, str]:
    """Say how far the answer is held to the schemas: to every keyword, or to all but some."""
    rules = plans[0].rules
    if rules is None:
        return {}
    unenforced = rules.unenforced
    return {"x-lmdserve-grammar": f"lenient ({', '.join(unenforced)})" if unenforced else "strict"}


def _describe_late_error(request: web.Request, error: Exception) -> ApiError:
    """Describe an error after the reply's first byte, when its status can no longer tell the access log."""
    api_error = describe(error, request[REQUEST_ID], prompt_param=request[PROMPT_PARAM])
    request[FAILURE] = api_error
    return api_error


def _model_card(serving: Serving) -> dict[str, Any]:
    model, info = serving.model, serving.engine.info
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lmdserve",
        "max_model_len": info.session_len,
        "checkpoint": {"name": model.checkpoint, "format": info.weight_format},
    }


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
