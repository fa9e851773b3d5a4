"""The table of routes: every path of the API and the handler behind it."""

from aiohttp import web

from . import admin, openai, ops

GENERATING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The routes that start work on the engine: a server that drains refuses them and answers all others."""


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
