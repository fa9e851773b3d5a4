"""What aiohttp logs by itself, made fit for a log: a client that speaks no HTTP is one line, not a traceback."""

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

logger = logging.getLogger("lmdserve.http")


class _ClientMistakes(logging.Filter):
    """Shortens records about clients' bytes; what is our own fault stays an error with its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            what = error.message if isinstance(error, HttpProcessingError) else str(error)
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "no valid HTTP: %s", (what.split("\n")[0][:200],)
            record.exc_info = record.exc_text = None
        return record.levelno >= logger.getEffectiveLevel()


logger.addFilter(_ClientMistakes())
