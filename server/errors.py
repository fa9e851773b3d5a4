"""Every way a request can fail, as one tree of exceptions with one JSON shape: OpenAI's error object.

Library code (engine, text, tools) raises its own types; `describe` is the only place that turns them into these.
Writing the reply is left to `app.py` (before the first byte) and `sse.py` (after it).
"""

import logging
import math
from typing import ClassVar

import orjson

from lmdserve.engine.api import (
    ContextTooLongError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    FormatFailedError,
    InvalidRequestError,
    QueueFullError,
)

logger = logging.getLogger(__name__)

DRAINING_RETRY_AFTER_S = 5.0  # about what a replacement needs to take over the address
DEAD_RETRY_AFTER_S = 30.0  # a restart has to load the model again


class ApiError(Exception):
    """A failed request: what the client is told, under which status, and whether trying again makes sense.

    `param` names the field at fault ("messages[2].content"), or the header, or "body" for the body as a whole.
    """

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    should_retry: ClassVar[bool | None] = None  # None: what the client does with this status by itself is right

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Return what the reply's headers say about trying again; OpenAI's SDK reads all three."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after_s * 1000)))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers

    def body(self) -> bytes:
        """Return the JSON that stands for this error in a reply and in a stream."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


class BadRequestError(ApiError):
    """A field that is malformed, out of its limits, or asks for something we do not do."""

    status = 400
    type = "invalid_request_error"


class UnsupportedFieldError(BadRequestError):
    """A known field or value that would change the answer and that this server cannot honour."""

    code = "unsupported_field"


class ContextLengthExceededError(BadRequestError):
    """The prompt leaves no room for an answer."""

    code = "context_length_exceeded"


class AuthenticationError(ApiError):
    """No API key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"WWW-Authenticate": "Bearer"}


class ModelNotFoundError(ApiError):
    """A model that is not served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFoundError(ApiError):
    """A path that does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowedError(ApiError):
    """A path that exists, with another method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: list[str]) -> None:
        super().__init__(message)
        self.allowed = allowed

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Allow": ", ".join(self.allowed)}


class BodyTimeoutError(ApiError):
    """A body that does not arrive."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"


class BodyTooLargeError(ApiError):
    """A body over the server's limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class ContentTypeError(ApiError):
    """A body that does not claim to be JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_type"


class HttpError(ApiError):
    """A request that broke a rule of HTTP itself; the status is the one aiohttp chose."""

    type = "invalid_request_error"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class InvalidOutputError(ApiError):
    """The model's whole answer does not obey a schema that its grammar could enforce in part only."""

    status = 422
    type = "invalid_output_error"
    code = "invalid_output"

    def __init__(self, message: str, *, failed_generation: str) -> None:
        super().__init__(message)
        self.failed_generation = failed_generation

    def body(self) -> bytes:
        error = orjson.loads(super().body())["error"]
        return orjson.dumps({"error": {**error, "failed_generation": self.failed_generation}})


class OutputFormatError(BadRequestError):
    """The output format, or the tools, could not be followed to the answer's end: it is impossible or too costly."""

    code = "format_failed"
    should_retry = False


class OverloadedError(ApiError):
    """The queue is full; the engine knows when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    should_retry = True


class DrainingError(ApiError):
    """The server is shutting down; whatever takes its place will answer."""

    status = 503
    type = "service_unavailable_error"
    code = "draining"
    should_retry = True

    def __init__(self, message: str = "the server is shutting down and takes no new requests; try again soon") -> None:
        super().__init__(message, retry_after_s=DRAINING_RETRY_AFTER_S)


class UnavailableError(ApiError):
    """The engine is dead or not running; retrying at once would only add load."""

    status = 503
    type = "service_unavailable_error"
    code = "engine_unavailable"
    should_retry = False

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=DEAD_RETRY_AFTER_S)


class GenerationFailedError(ApiError):
    """The engine gave up on this one request and said why."""

    should_retry = False
    code = "generation_failed"


class InternalError(ApiError):
    """A bug. The client learns the request id only; the traceback is in the log under the same id."""

    should_retry = False
    code = "internal_error"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"an internal error occurred; the server's log has the details under request id {request_id}")


def describe(error: Exception, request_id: str, *, prompt_param: str = "messages") -> ApiError:
    """Return what the client is told about any exception; a bug is logged here, with its traceback.

    `prompt_param` is what the route calls its prompt: the engine knows only that the prompt is too long.
    """
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return _from_invalid_request(error, prompt_param)
        case QueueFullError():
            return OverloadedError(str(error), retry_after_s=error.retry_after_s)
        case EngineDrainingError():
            return DrainingError(str(error))
        case EngineDeadError():
            return UnavailableError(str(error))
        case FormatFailedError():
            return OutputFormatError(str(error))
        case EngineError():
            return GenerationFailedError(str(error))
    logger.error("request %s failed on a bug", request_id, exc_info=error)
    return InternalError(request_id)


def _from_invalid_request(error: InvalidRequestError, prompt_param: str) -> ApiError:
    param = prompt_param if error.param in ("messages", "prompt") else error.param
    kind = ContextLengthExceededError if isinstance(error, ContextTooLongError) else BadRequestError
    return kind(str(error), param=param)
