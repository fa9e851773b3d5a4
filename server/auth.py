"""API keys: who may call which route. Keys are compared by digest, each in constant time, and never logged."""

import hashlib
import hmac
from collections.abc import Iterable

from .errors import AuthenticationError

OPEN_PATHS = frozenset({"/health", "/ready"})  # probes have no key


class KeyRing:
    """The keys that open this server; without any, it is open to all who can reach it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def check(self, path: str, authorization: str | None) -> None:
        """Return when a request for `path` with this Authorization header may pass, else raise AuthenticationError."""
        if not self._digests or path in OPEN_PATHS:
            return
        if authorization is None:
            raise AuthenticationError(
                "no API key was sent; send one in the header `Authorization: Bearer KEY`", param="Authorization"
            )
        scheme, _, key = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationError(
                "the Authorization header must read `Bearer KEY`, with an API key of this server", param="Authorization"
            )
        if not self._holds(key.strip()):
            raise AuthenticationError(
                "this API key is not one of the server's keys (its --api-keys); check the key that you send",
                param="Authorization",
            )

    def _holds(self, key: str) -> bool:
        digest = _digest(key)
        # Every key is compared, so that the time tells neither which one matched nor how many there are before it.
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
