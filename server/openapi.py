"""The description of the API at /openapi.json. Request bodies and their limits are the records of `protocol.py`."""

from functools import cache
from typing import Any

import msgspec

from lmdserve import __version__

from .admin_openapi import SCHEMA_REF, describe_admin
from .protocol import ChatRequest, CompletionRequest


@cache
def describe_api() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    bodies, schemas = msgspec.json.schema_components((ChatRequest, CompletionRequest), ref_template=SCHEMA_REF)
    chat_body, completion_body = bodies
    admin_paths, admin_schemas = describe_admin()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lmdserve",
            "version": __version__,
            "description": "OpenAI's API over one model. Null stands for an absent field everywhere, and fields that "
            "are not listed are refused where they would change the answer.",
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _generation("createChatCompletion", chat_body, "chat.completion")},
            "/v1/chat/render": {"post": _render(chat_body)},
            "/v1/completions": {"post": _generation("createCompletion", completion_body, "text_completion")},
            "/v1/models": {"get": _get("listModels", "The served model, as a list", _ref("ModelList"))},
            "/v1/models/{model}": {"get": _get_model()},
            "/health": {"get": _probe("health", "The engine moves")},
            "/ready": {"get": _probe("ready", "Requests are taken")},
            "/version": {"get": _get("version", "The version of lmdserve", _object({"version": {"type": "string"}}))},
            "/metrics": {"get": _get_metrics()},
            "/openapi.json": {"get": _get("openapi", "This document", {"type": "object"})},
            **admin_paths,
        },
        "components": {
            "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("key", "adminKey")},
            "schemas": {**schemas, **admin_schemas, **_reply_schemas()},
        },
    }


def _generation(operation_id: str, body: dict[str, Any], object_name: str) -> dict[str, Any]:
    reply = _object(
        {
            "id": {"type": "string"},
            "object": {"const": object_name},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object"}, "minItems": 1},
            "usage": _ref("Usage"),
        }
    )
    success = {
        "description": "The whole reply, or with stream: true its chunks as server-sent events",
        "content": {"application/json": {"schema": reply}, "text/event-stream": {}},
    }
    return {
        "operationId": operation_id,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": success, **_errors(400, 401, 404, 408, 413, 415, 422, 429, 500, 503)},
    }


def _render(body: dict[str, Any]) -> dict[str, Any]:
    reply = _object(
        {
            "object": {"const": "chat.render"},
            "model": {"type": "string"},
            "prompt": {"type": "string", "description": "control tokens, real and typed ones, are spelled out"},
            "prompt_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "num_prompt_tokens": {"type": "integer", "minimum": 0},
        }
    )
    description = "The prompt that /v1/chat/completions would give the model for the same body"
    success = {"description": description, "content": {"application/json": {"schema": reply}}}
    return {
        "operationId": "renderChat",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": success, **_errors(400, 401, 404, 408, 413, 415, 500)},
    }


def _get(operation_id: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    success = {"description": description, "content": {"application/json": {"schema": schema}}}
    return {"operationId": operation_id, "responses": {"200": success, **_errors(401)}}


def _get_model() -> dict[str, Any]:
    operation = _get("retrieveModel", "The served model", _ref("Model"))
    operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    operation["responses"] |= _errors(404)
    return operation


def _probe(operation_id: str, description: str) -> dict[str, Any]:
    operation = _get(operation_id, description, _object({"status": {"const": "ok"}}))
    operation["responses"] = {"200": operation["responses"]["200"], **_errors(503)}
    return operation | {"security": []}


def _get_metrics() -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}}
    success = {"description": "Metrics for Prometheus", "content": content}
    return {"operationId": "metrics", "responses": {"200": success, **_errors(401)}}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("ErrorReply")}}
    return {str(status): {"description": _ERROR_TEXTS[status], "content": content} for status in statuses}


_ERROR_TEXTS = {
    400: "A field is malformed, out of its limits or not supported; param names it",
    401: "No API key, or a wrong one",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not sent as JSON",
    422: "The answer breaks a part of its schema that no grammar enforces; failed_generation is its text",
    429: "Too many requests wait; Retry-After says when to try again",
    500: "A bug; the log has the details under the request id",
    503: "The server is draining, or the engine is dead",
}


def _reply_schemas() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    nullable_text = {"type": ["string", "null"]}
    return {
        "Usage": _object(
            {
                "prompt_tokens": count,
                "completion_tokens": count,
                "total_tokens": count,
                "prompt_tokens_details": _object({"cached_tokens": count}),
                "completion_tokens_details": _object({"reasoning_tokens": count}),
            }
        ),
        "Model": _object(
            {
                "id": {"type": "string"},
                "object": {"const": "model"},
                "created": {"type": "integer"},
                "owned_by": {"type": "string"},
                "max_model_len": {"type": "integer", "minimum": 1},
                "checkpoint": _object({"name": {"type": "string"}, "format": {"type": "string"}}),
            }
        ),
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}),
        "ErrorReply": _object(
            {
                "error": _object(
                    {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": nullable_text,
                        "code": nullable_text,
                    }
                )
            }
        ),
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": SCHEMA_REF.format(name=name)}
