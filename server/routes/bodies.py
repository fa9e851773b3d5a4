"""The bytes of a request's body, once it claims to be JSON."""

from aiohttp import web

from ..errors import ContentTypeError


async def read_json(request: web.Request) -> bytes:
    """Return the body; raise ContentTypeError unless its header says that it is JSON."""
    if request.content_type != "application/json":
        sent = request.headers.get("Content-Type", "none")
        raise ContentTypeError(
            f"the body must be JSON, sent with the header `Content-Type: application/json`; got {sent[:80]!r}",
            param="Content-Type",
        )
    return await request.read()
