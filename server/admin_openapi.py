"""The description of /admin for /openapi.json; request bodies and their limits are those of `admin_protocol.py`."""

from typing import Any, get_args

import msgspec

from .admin_protocol import QuantizeOrder, RollbackOrder, SwapOrder
from .job import Kind, Status

SCHEMA_REF = "#/components/schemas/{name}"

_ERROR_TEXTS = {
    400: "A field is malformed, out of its limits, or names a path that may not be used; param says which",
    401: "No admin key, or a wrong one",
    403: "Orders are off here; the message says how to turn them on",
    404: "No such job",
    409: "What the server is or does now stands in the way: another job, no way back, or a gate that fails",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not sent as JSON",
    422: "A gate was asked for and the checkpoint has no measurement",
    500: "A bug; the log has the details under the request id",
    507: "The disk does not take what has to be written",
}


def describe_admin() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the paths of /admin and the schemas that they refer to."""
    records = (QuantizeOrder, SwapOrder, RollbackOrder)
    (quantize, swap, rollback), schemas = msgspec.json.schema_components(records, ref_template=SCHEMA_REF)
    job = _ref("Job")
    job_list = _object({"object": {"const": "list"}, "data": {"type": "array", "items": job}})
    models = _object({"model": {"type": "string"}, "current": {"type": "object"}, "finishing": {"type": "array"}})
    job_id = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    plan = {"description": "With dry_run: what would be done", **_json({"type": "object"})}
    paths = {
        "/admin/quantize": {"post": _order("quantize", quantize, (422, 507))},
        "/admin/models": {"get": _get("describeModels", "What serves, and what a rollback goes back to", models)},
        "/admin/models/swap": {"post": _order("swapModel", swap, (422, 507), {"200": plan})},
        "/admin/models/rollback": {"post": _order("rollBackModel", rollback, (507,), is_required=False)},
        "/admin/jobs": {"get": _get("listJobs", "All jobs, oldest first", job_list)},
        "/admin/jobs/{id}": {
            "get": _get("showJob", "The job as it is now", job, (404,)) | {"parameters": job_id},
            "delete": _get("cancelJob", "The job, cancelled; nothing of it is left", job, (404, 409))
            | {"parameters": job_id},
        },
        "/admin/jobs/{id}/events": {
            "get": {
                "operationId": "followJob",
                "security": _SECURITY,
                "parameters": job_id,
                "responses": {
                    "200": {
                        "description": "The job, as it is and whenever it changes, as server-sent events until it is "
                        "over",
                        "content": {"text/event-stream": {}},
                    },
                    **_errors(401, 403, 404),
                },
            }
        },
    }
    return paths, {**schemas, "Job": _job()}


_SECURITY: list[dict[str, list[str]]] = [{"adminKey": []}, {}]


def _order(
    operation_id: str,
    body: dict[str, Any],
    errors: tuple[int, ...],
    replies: dict[str, Any] | None = None,
    *,
    is_required: bool = True,
) -> dict[str, Any]:
    accepted = {"description": "The job that carries it out", **_json(_ref("Job"))}
    return {
        "operationId": operation_id,
        "security": _SECURITY,
        "requestBody": {"required": is_required, **_json(body)},
        "responses": {"202": accepted, **(replies or {}), **_errors(400, 401, 403, 408, 409, 413, 415, 500, *errors)},
    }


def _get(operation_id: str, description: str, schema: dict[str, Any], errors: tuple[int, ...] = ()) -> dict[str, Any]:
    success = {"description": description, **_json(schema)}
    return {
        "operationId": operation_id,
        "security": _SECURITY,
        "responses": {"200": success, **_errors(401, 403, *errors)},
    }


def _errors(*statuses: int) -> dict[str, Any]:
    content = _json(_ref("ErrorReply"))
    return {str(status): {"description": _ERROR_TEXTS[status], **content} for status in statuses}


def _job() -> dict[str, Any]:
    text, number = {"type": ["string", "null"]}, {"type": ["number", "null"]}
    count = {"type": ["integer", "null"]}
    return _object(
        {
            "id": {"type": "string"},
            "object": {"const": "admin.job"},
            "kind": {"enum": list(get_args(Kind))},
            "status": {"enum": list(get_args(Status))},
            "model": {"type": "string"},
            "created": {"type": "number"},
            "finished": number,
            "phase": {"type": "string"},
            "layer": count,
            "num_layers": count,
            "percent": number,
            "seconds_left": number,
            "work_dir": text,
            "then": {"enum": ["swap", None]},
            "gate": {"type": ["object", "null"]},
            "plan": {"type": ["object", "null"], "description": "memory before, during and after the change, bytes"},
            "quality": {"type": ["object", "null"], "description": "the row of report.json for this server"},
            "error": {"type": ["object", "null"], "description": "code and message of what went wrong"},
        }
    )


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": SCHEMA_REF.format(name=name)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
