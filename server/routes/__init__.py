"""The table of routes: every path of the API and the handler behind it."""

from collections.abc import Mapping

from aiohttp import web

from . import admin, openai, ops

GENERATING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The routes that start work on the engine: a server that drains refuses them and answers all others."""

OTHER_APIS: Mapping[str, str] = {
    "/": "OpenAI's API is under /v1, and /openapi.json describes it",
    "/v1": "give this address to a client as its base URL; /v1/models lists the model",
    "/v1/responses": "use /v1/chat/completions",
    "/v1/messages": "this is OpenAI's API; use /v1/chat/completions",
    "/v1/embeddings": "the model generates text and makes no embeddings",
    "/v1/rerank": "the model generates text and ranks nothing",
    "/v1/moderations": "the model generates text and moderates nothing",
    "/v1/encode": "use /v1/chat/render, which gives a chat's token ids",
    "/tokenize": "use /v1/chat/render, which gives a chat's token ids",
    "/v1/tokenize": "use /v1/chat/render, which gives a chat's token ids",
    "/v1/chat/interactive": "send the whole conversation to /v1/chat/completions",
    "/generate": "use /v1/completions",
    "/completion": "use /v1/completions",
    "/api/chat": "this is OpenAI's API; use /v1/chat/completions",
    "/api/generate": "this is OpenAI's API; use /v1/completions",
    "/docs": "/openapi.json describes the API",
    "/livez": "use /health",
    "/healthz": "use /health",
    "/readyz": "use /ready",
    "/server_info": "use /version and /v1/models",
    "/get_server_info": "use /version and /v1/models",
}
"""Paths that users of other servers and APIs ask for, and what there is here instead."""


def routes() -> list[web.RouteDef]:
    """Return all routes; GET answers HEAD too."""
    return [
        web.post("/v1/chat/completions", openai.create_chat_completion),
        web.post("/v1/chat/render", openai.render_chat),
        web.post("/v1/completions", openai.create_completion),
        web.get("/v1/models", openai.list_models),
        web.get("/v1/models/{model:.+}", openai.retrieve_model),
        web.get("/health", ops.health),
        web.get("/ready", ops.ready),
        web.get("/version", ops.version),
        web.get("/metrics", ops.metrics),
        web.get("/openapi.json", ops.openapi),
        web.post("/admin/quantize", admin.quantize),
        web.get("/admin/jobs", admin.list_jobs),
        web.get("/admin/jobs/{id}", admin.show_job),
        web.delete("/admin/jobs/{id}", admin.cancel_job),
        web.get("/admin/jobs/{id}/events", admin.follow_job),
        web.get("/admin/models", admin.show_models),
        web.post("/admin/models/swap", admin.swap),
        web.post("/admin/models/rollback", admin.roll_back),
    ]
