"""What can go wrong with an order to the server itself, beside what can with any request (`errors.py`)."""

from .errors import ApiError


class AdminOffError(ApiError):
    """Nobody may give orders to this server."""

    status = 403
    type = "invalid_request_error"
    code = "admin_off"


class ConflictError(ApiError):
    """The order is proper, and what the server is or does now stands in its way."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class GateError(ApiError):
    """The quality of a checkpoint is below what was asked for; the message has the numbers."""

    status = 409
    type = "invalid_request_error"
    code = "gate_failed"


class NoReportError(ApiError):
    """A gate was asked for, and there are no numbers to hold it against."""

    status = 422
    type = "invalid_request_error"
    code = "no_report"


class JobNotFoundError(ApiError):
    """A job that this server does not know."""

    status = 404
    type = "invalid_request_error"
    code = "job_not_found"


class StorageError(ApiError):
    """The disk does not take what has to be written."""

    status = 507
    type = "server_error"
    code = "insufficient_storage"
