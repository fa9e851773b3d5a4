"""The bytes of a request's body, once it claims to be JSON."""

import asyncio

from aiohttp import web

from ..errors import BadRequestError, BodyTimeoutError, ContentTypeError

BODY_TIMEOUT_S = 60.0  # the largest body takes 2 Mbit/s; a client that stops half-way would stay for ever


async def read_json(request: web.Request) -> bytes:
    """Return the body; raise ContentTypeError unless its header says that it is JSON.

    Raises BodyTimeoutError when it does not arrive in time, BadRequestError when it is not what its headers say.
    """
    if request.content_type != "application/json":
        sent = request.headers.get("Content-Type", "none")
        raise ContentTypeError(
            f"the body must be JSON, sent with the header `Content-Type: application/json`; got {sent[:80]!r}",
            param="Content-Type",
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise BodyTimeoutError(
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s; send it again", param="body"
        ) from None
    except web.RequestPayloadError as error:
        raise BadRequestError(
            f"the body cannot be read: it is not encoded as its headers say ({error}); send it plain", param="body"
        ) from None
