"""The engine: an asyncio task that schedules, launches steps on one engine thread, and hands out what they bring.

Owns the life cycle (start, drain, death), the readers' streams and the counters of time. Everything runs on the event
loop, so that commands (a new request, a closed iterator) act on the scheduler at once; only `Stepper.advance` is
elsewhere. While it waits for one step, a runner that can have two in flight computes the next.
"""

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .api import (
    ENGINE_THREAD_PREFIX,
    Chunk,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineInfo,
    EngineStats,
    InvalidRequestError,
    QueueFullError,
    Request,
)
from .blocks import BlockPool
from .memory_guard import return_freed_memory
from .scheduler import Progress, Scheduler
from .sequence import new_sequence
from .step import Chunk as StepChunk
from .step import StepRunner
from .stepper import FinishedStep, Stepper
from .stream import OutputStream, Wakeups

logger = logging.getLogger(__name__)

# When the time of a drain, or of a step, is up: how long the step in flight may still take before it is given up.
LAST_STEP_LIMIT_S = 5.0
# While steps are launched ahead, the engine thread must not wait Python's default of 5 ms whenever the event loop is
# busy: 256 streams over HTTP beside a 7 ms step left the device idle 8 to 12 % of the time with it, 1 to 4 % with 0.5.
GIL_SWITCH_INTERVAL_S = 0.0005
FINISH_WINDOW = 64  # finished requests that the estimate of the waiting time looks back on
DEFAULT_RETRY_AFTER_S = 1.0  # before two requests have finished, nothing better is known


class FinishRate:
    """How fast requests finish: what a refused client is told to wait, for one place in the queue."""

    def __init__(self) -> None:
        self._finished_at_s: deque[float] = deque(maxlen=FINISH_WINDOW)

    def record(self, now_s: float) -> None:
        """Count a finished request."""
        self._finished_at_s.append(now_s)

    def skip(self, seconds: float) -> None:
        """Leave time out in which there was nothing to finish."""
        self._finished_at_s = deque((at_s + seconds for at_s in self._finished_at_s), maxlen=FINISH_WINDOW)

    def seconds_per_request(self, now_s: float) -> float:
        """Return the mean time from one finish to the next; time without any since the last one counts."""
        if len(self._finished_at_s) < 2:
            return DEFAULT_RETRY_AFTER_S
        return (now_s - self._finished_at_s[0]) / (len(self._finished_at_s) - 1)


class AsyncEngine:
    """The Engine of `api.py`: see there for what its methods promise."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        pool: BlockPool,
        *,
        info: EngineInfo,
        rope_base_for: Callable[[int], float],
        max_live_requests: int,
        step_limit_s: float,
        can_be_deterministic: bool = True,
        is_always_deterministic: bool = False,
    ) -> None:
        self.info = info
        self._runner = runner
        self._stepper = Stepper(runner)
        self._scheduler = scheduler
        self._pool = pool
        self._rope_base_for = rope_base_for
        self._max_live_requests = max_live_requests
        self._step_limit_s = step_limit_s
        self._can_be_deterministic = can_be_deterministic
        self._is_always_deterministic = is_always_deterministic
        self._streams: dict[str, OutputStream] = {}
        self._wakeups = Wakeups()
        self._finish_rate = FinishRate()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=ENGINE_THREAD_PREFIX)
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_draining = False
        self._is_idle = True
        self._death: str | None = None
        self._steps_total = 0
        self._beat_s = time.monotonic()
        self._is_first_step = True  # after idling: it is timed from nothing

    async def start(self) -> None:
        """Start the batching loop; once."""
        if self._task is not None:
            raise RuntimeError("the engine was started before; build a new one")
        if self._runner.max_in_flight > 1:
            sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
        self._task = asyncio.create_task(self._run(), name="engine loop")

    async def stop(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish for up to `timeout_s`, abort the rest, free everything."""
        self._is_draining = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout_s)
            self._abort_all()
            await asyncio.wait({self._task}, timeout=LAST_STEP_LIMIT_S)
            self._task.cancel()
            await asyncio.wait({self._task})
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._stepper.close()

    def release(self) -> None:
        """Give the memory of weights and KV cache back, after `stop`."""
        self._thread.shutdown()  # the end of the last step still holds them for a moment
        del self._runner, self._stepper
        return_freed_memory()

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield chunks until one has a finish_reason. Closing the generator early aborts the sequence."""
        stream = self._submit(request)
        try:
            while True:
                chunk = await stream.next_chunk()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if not stream.is_ended:
                self._scheduler.abort(request.uid)
                self._streams.pop(request.uid, None)

    def stats(self) -> EngineStats:
        """Return the current counters."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_total_blocks=pool.num_blocks,
            num_used_blocks=pool.num_held,
            num_cached_blocks=pool.num_cached,
            prompt_tokens_total=scheduler.prompt_tokens_total,
            generation_tokens_total=scheduler.generation_tokens_total,
            cached_tokens_total=scheduler.cached_tokens_total,
            preemptions_total=scheduler.preemptions_total,
            steps_total=self._steps_total,
            heartbeat_age_s=0.0 if self._is_idle else time.monotonic() - self._beat_s,
            drafted_tokens_total=scheduler.drafted_tokens_total,
            accepted_tokens_total=scheduler.accepted_tokens_total,
            device_memory_bytes=torch.cuda.memory_reserved(),
            device_busy_s_total=self._runner.device_busy_s,
            device_idle_s_total=self._runner.device_idle_s,
        )

    def check_health(self) -> None:
        """Raise EngineDeadError unless the loop is alive; a step that hangs ends the loop by itself."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        if self._task is None or self._task.done():
            raise EngineDeadError("the engine is not running")

    def _submit(self, request: Request) -> OutputStream:
        if self._death is not None:
            raise EngineDeadError(self._death)
        if self._is_draining:
            raise EngineDrainingError("the engine is shutting down and takes no new requests")
        if self._task is None:
            raise EngineError("the engine has not been started; call start() first")
        if request.deterministic and not self._can_be_deterministic:
            raise InvalidRequestError(
                "deterministic is not possible with this server's compute type and device; leave it out, or serve "
                "with --dtype float32 on a CPU, or in 16 bits on a GPU of compute capability 8.0 or more",
                "deterministic",
            )
        sequence = new_sequence(
            request,
            info=self.info,
            rope_base_for=self._rope_base_for,
            is_deterministic=self._is_always_deterministic,
        )
        self._check_queue()
        self._scheduler.add(sequence)
        stream = self._streams[request.uid] = OutputStream(sequence)
        self._wake.set()
        return stream

    def _check_queue(self) -> None:
        num_live = self._scheduler.num_running + self._scheduler.num_waiting
        if num_live >= self._max_live_requests:
            raise QueueFullError(
                f"{num_live} requests are running or waiting, as many as are allowed; try again later",
                self._finish_rate.seconds_per_request(time.monotonic()),
            )

    async def _run(self) -> None:
        """Step until drained or dead. Whatever ends the loop, no reader is left waiting."""
        try:
            while await self._has_work():
                await self._step()
        except EngineDeadError as error:
            logger.critical("the engine is dead: %s", error)
            self._die(str(error))
        except asyncio.CancelledError:
            self._die("the engine was stopped")
            raise
        except Exception as error:
            logger.exception("the engine loop failed")
            self._die(f"the engine failed with {type(error).__name__}: {error}; restart the server")

    async def _has_work(self) -> bool:
        """Sleep while there is nothing to do; False when there never will be."""
        while not self._is_busy():
            if self._is_draining:
                return False
            self._is_idle = True
            self._wake.clear()
            await self._wake.wait()
        if self._is_idle:
            self._is_idle = False
            self._is_first_step = True
            previous_s, self._beat_s = self._beat_s, time.monotonic()
            self._finish_rate.skip(self._beat_s - previous_s)
        return True

    def _is_busy(self) -> bool:
        scheduler = self._scheduler
        return bool(scheduler.num_running or scheduler.num_waiting or scheduler.num_steps_in_flight)

    async def _step(self) -> None:
        """Launch the next step, wait for the oldest one in flight where that has to be, publish what it brought."""
        chunks = self._scheduler.schedule()
        if not chunks and not self._scheduler.num_steps_in_flight and not self._scheduler.awaits_masks:
            raise RuntimeError("requests wait and none can be scheduled")
        for sequence in self._scheduler.newly_admitted:
            self._streams[sequence.uid].note_admission()
        for step in await self._advance(chunks):
            for progress in self._scheduler.complete(step.chunks, step.results):
                self._publish(progress)
            self._steps_total += 1
            self._note_time(step)

    def _note_time(self, step: FinishedStep) -> None:
        """Step after step, the time from one end to the next is what a step takes."""
        previous_s, self._beat_s = self._beat_s, time.monotonic()
        if self._is_first_step:
            self._is_first_step = False
        else:
            self._scheduler.note_step_time(step.chunks, self._beat_s - previous_s)

    async def _advance(self, chunks: list[StepChunk]) -> list[FinishedStep]:
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._stepper.advance, chunks)
        try:
            for limit_s in (self._step_limit_s, LAST_STEP_LIMIT_S):  # a process that was stopped had no time to step
                await asyncio.wait({work}, timeout=limit_s)
                if work.done():
                    return work.result()
        finally:
            work.cancel()
        raise EngineDeadError(f"a step has not come back for {self._step_limit_s:g} s; restart the server")

    def _publish(self, progress: Progress) -> None:
        uid = progress.sequence.uid
        stream = self._streams[uid]
        stream.put(progress)
        if stream.has_news:
            self._wakeups.add(stream)
        if stream.is_ended:
            del self._streams[uid]
            self._finish_rate.record(time.monotonic())

    def _abort_all(self) -> None:
        for uid, stream in self._streams.items():
            self._scheduler.abort(uid)
            stream.abort()
        self._streams.clear()

    def _die(self, reason: str) -> None:
        self._death = reason
        for uid, stream in self._streams.items():
            self._scheduler.abort(uid)
            stream.fail(EngineDeadError(reason))
        self._streams.clear()
