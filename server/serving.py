"""Which loaded checkpoint answers new requests, and which ones still answer older ones.

A request leases a `Serving` (weights, text side and planner in one) for its whole life, so that no change of weights
ever touches it. Owns the leases and the sums over all engines; `swap.py` decides when which checkpoint serves.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace

from lmdserve.engine.api import Engine, EngineDeadError, EngineStats, QueueFullError

from .errors import DrainingError
from .generation import Planner
from .model import ServedModel
from .output_rules import OutputRules

MAX_WAITING = 1024  # requests held back while one checkpoint makes room for the next; one more is refused with 429
WAITING_RETRY_AFTER_S = 5.0  # about what loading a checkpoint takes
_NOTHING = EngineStats(
    num_running=0, num_waiting=0, num_total_blocks=0, num_used_blocks=0, num_cached_blocks=0, prompt_tokens_total=0,
    generation_tokens_total=0, cached_tokens_total=0, preemptions_total=0, steps_total=0, heartbeat_age_s=0.0,
)  # fmt: skip
_NOT_ADDED = ("heartbeat_age_s", "device_memory_bytes")  # the largest is told: all engines share one process


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Serving:
    """One loaded checkpoint, ready to answer."""

    engine: Engine
    model: ServedModel
    planner: Planner

    def close(self) -> None:
        """End the threads of the text side; the engine has a life of its own."""
        self.planner.outputs.close()


def make_serving(engine: Engine, model: ServedModel, prompt_threads: Executor) -> Serving:
    """Return what answers requests with `engine` and `model`."""
    outputs = OutputRules(model, engine.info)
    outputs.warm_up()
    planner = Planner(model=model, info=engine.info, executor=prompt_threads, outputs=outputs)
    return Serving(engine=engine, model=model, planner=planner)


class Servings:
    """The current Serving and those that still finish requests. All methods run on the event loop."""

    def __init__(self, first: Serving) -> None:
        self._current = first
        self._live = [first]  # whose engines have not been released
        self._leases: Counter[Serving] = Counter()
        self._retired = _NOTHING  # what the counters of released engines had come to
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._unused: dict[Serving, asyncio.Event] = {}  # of those that somebody waits to see unused
        self._num_waiting = 0
        self._failure: Exception | None = None

    @property
    def current(self) -> Serving:
        """What serves new requests; while one checkpoint makes room for the next, the one that did so last."""
        return self._current

    @property
    def live(self) -> list[Serving]:
        """All whose engines still hold memory."""
        return list(self._live)

    def num_leases(self, serving: Serving) -> int:
        """Return how many requests still need it."""
        return self._leases[serving]

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Serving]:
        """Give the current Serving and keep it alive within; wait for one where there is none right now."""
        while not self._is_open.is_set():  # who wakes up late may find it closed again
            await self._wait()
        if self._failure is not None:
            raise self._failure
        serving = self._current
        self._leases[serving] += 1
        try:
            yield serving
        finally:
            self._leases[serving] -= 1
            if not self._leases[serving]:
                del self._leases[serving]
                if serving in self._unused:
                    self._unused[serving].set()

    async def wait_until_unused(self, serving: Serving) -> None:
        """Return once no request needs it."""
        while self._leases[serving]:
            await self._unused.setdefault(serving, asyncio.Event()).wait()
            self._unused.pop(serving, None)

    def hold_back(self) -> None:
        """Let new requests wait until `serve` or `resume`; running ones go on."""
        self._is_open.clear()

    def resume(self) -> None:
        """Give new requests the current Serving again."""
        self._is_open.set()

    def add(self, serving: Serving) -> None:
        """Count a started engine in, before it serves anybody."""
        self._live.append(serving)

    def serve(self, serving: Serving) -> None:
        """Give all new requests this one, which has been added."""
        self._current, self._failure = serving, None
        self._is_open.set()

    def remove(self, serving: Serving) -> None:
        """Forget one whose engine is about to be released, and keep what it has counted."""
        self._retired = _counters_of(_sum([self._retired, serving.engine.stats()]))
        self._live.remove(serving)

    def fail(self, error: Exception) -> None:
        """Refuse every request that waits or comes, with this error."""
        self._failure = error
        self._is_open.set()

    def close(self) -> None:
        """Refuse what still waits: the server stops."""
        if not self._is_open.is_set():
            self.fail(DrainingError())

    def stats(self) -> EngineStats:
        """Return the sums over all engines there are and were; who waits for the next one waits too."""
        held_back = replace(_NOTHING, num_waiting=self._num_waiting)
        return _sum([self._retired, held_back, *(serving.engine.stats() for serving in self._live)])

    def check_health(self) -> None:
        """Raise EngineDeadError unless requests are served, or will be once the next checkpoint is loaded."""
        if isinstance(self._failure, EngineDeadError):
            raise self._failure
        if self._current in self._live:
            self._current.engine.check_health()

    async def _wait(self) -> None:
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(
                f"{self._num_waiting} requests wait for the next checkpoint, as many as are allowed; try again later",
                WAITING_RETRY_AFTER_S,
            )
        self._num_waiting += 1
        try:
            await self._is_open.wait()
        finally:
            self._num_waiting -= 1


def _sum(parts: Iterable[EngineStats]) -> EngineStats:
    parts = list(parts)
    totals = {}
    for field in fields(EngineStats):
        values = [getattr(part, field.name) for part in parts]
        totals[field.name] = max(values) if field.name in _NOT_ADDED else sum(values)
    return EngineStats(**totals)


def _counters_of(stats: EngineStats) -> EngineStats:
    """Return the totals alone; what is a state of the moment ends with its engine."""
    return replace(
        _NOTHING, **{field.name: getattr(stats, field.name) for field in fields(stats) if field.name.endswith("_total")}
    )
