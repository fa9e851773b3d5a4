"""Keys: who may call which route. Keys are compared by digest, each in constant time, and never logged.

API keys open everything but /admin, admin keys /admin alone.
"""

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import web

from .admin_errors import AdminOffError
from .config import ServerConfig, is_loopback
from .errors import AuthenticationError

OPEN_PATHS = frozenset({"/health", "/ready"})  # probes have no key
# What a browser or a proxy adds: behind one, the peer's address says nothing about who asks.
FOREIGN_HEADERS = ("Origin", "Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


class KeyRing:
    """The keys that open this server; without any, it is open to all who can reach it.

    `kind` and `option` are what messages call such a key and where it is set.
    """

    def __init__(self, keys: Iterable[str], *, kind: str = "API key", option: str = "--api-keys") -> None:
        self._digests = tuple(_digest(key) for key in keys)
        self._kind = kind
        self._option = option

    def check(self, path: str, authorization: str | None) -> None:
        """Return when a request for `path` with this Authorization header may pass, else raise AuthenticationError."""
        if not self._digests or path in OPEN_PATHS:
            return
        if authorization is None:
            raise AuthenticationError(
                f"no {self._kind} was sent; send one in the header `Authorization: Bearer KEY`", param="Authorization"
            )
        scheme, _, key = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationError(
                f"the Authorization header must read `Bearer KEY`, with an {self._kind} of this server",
                param="Authorization",
            )
        if not self._holds(key.strip()):
            raise AuthenticationError(
                f"this {self._kind} is not one of the server's keys (its {self._option}); check the key that you send",
                param="Authorization",
            )

    def _holds(self, key: str) -> bool:
        digest = _digest(key)
        # Every key is compared, so that the time tells neither which one matched nor how many there are before it.
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


class AdminDoor:
    """Who may give orders: holders of an admin key, or with `--admin` programs on this machine."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._keys = KeyRing(config.admin_keys, kind="admin key", option="--admin-keys")

    @staticmethod
    def guards(request: web.Request) -> bool:
        """Say whether a request is for /admin, by its path or by the route that it found."""
        resource = request.match_info.route.resource
        paths = (request.path, "" if resource is None else resource.canonical)
        return any(path == "/admin" or path.startswith("/admin/") for path in paths)

    def check(self, request: web.Request) -> None:
        """Return when this request may pass, else raise AdminOffError or AuthenticationError."""
        if self._config.admin_keys:
            self._keys.check(request.path, request.headers.get("Authorization"))
        elif not self._config.admin:
            raise AdminOffError(
                "orders are off; start the server with --models-dir and --admin-keys (or LMDSERVE_ADMIN_KEYS), or on "
                "this machine alone with --admin"
            )
        elif not _comes_from_here(request):
            raise AdminOffError(
                "without --admin-keys orders are taken from programs on this machine only, not through browsers or "
                "proxies"
            )


def _comes_from_here(request: web.Request) -> bool:
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    host = request.headers.get("Host", "").rsplit(":", 1)[0]
    is_direct = not any(name in request.headers for name in FOREIGN_HEADERS)
    return peer is not None and is_loopback(peer[0]) and is_loopback(host) and is_direct


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
