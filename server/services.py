"""What the handlers of one application share, behind one AppKey, and whether it takes requests."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from aiohttp import web

from .admin import Admin
from .auth import AdminDoor, KeyRing
from .config import ServerConfig
from .errors import ApiError, DrainingError, UnavailableError
from .metrics import ServerMetrics
from .serving import Servings


class Phase(Enum):
    """Where an application is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"


class Lifecycle:
    """The phase, and how many requests are being worked on."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.num_working = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check_open(self) -> None:
        """Return when new work may begin, else raise what the client is told."""
        if self.phase is Phase.DRAINING:
            raise DrainingError
        if self.phase is Phase.STARTING:
            raise UnavailableError("the engine is still starting; ask /ready when it is done")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the enclosed work as a request that a shutdown waits for; raise as `check_open` does.

        A request begins when its body is there: a client that stops half-way through it holds up nothing.
        """
        self.check_open()
        self.num_working += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_working -= 1
            if not self.num_working:
                self._idle.set()

    async def wait_until_idle(self) -> None:
        """Return once no request is being worked on."""
        await self._idle.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything a handler needs."""

    servings: Servings
    config: ServerConfig
    keys: KeyRing
    admin_door: AdminDoor
    admin: Admin | None  # None: closed
    metrics: ServerMetrics
    lifecycle: Lifecycle
    prompt_threads: ThreadPoolExecutor  # renders and tokenizes long prompts


SERVICES = web.AppKey("services", Services)
REQUEST_ID = web.RequestKey("request_id", str)
ARRIVED_S = web.RequestKey("arrived_s", float)  # on time.perf_counter's clock
PROMPT_PARAM = web.RequestKey("prompt_param", str)  # what the route calls its prompt
FAILURE = web.RequestKey("failure", ApiError)  # what went wrong, whether or not the reply had begun
