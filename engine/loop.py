"""The engine: an asyncio task that schedules, launches steps on one engine thread, and hands out what they bring.

Owns the life cycle (load, start, drain, death), the readers' streams and the counters of time. Everything but the
loading runs on the event loop, so that commands (a new request, a closed iterator) act on the scheduler at once; only
`Stepper.advance` is elsewhere. While it waits for one step, a runner that can have two in flight computes the next.
"""

import asyncio
import dataclasses
import logging
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .api import (
    ENGINE_THREAD_PREFIX,
    Chunk,
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineInfo,
    EngineStats,
    InvalidRequestError,
    QueueFullError,
    Request,
)
from .assembly import can_fuse
from .blocks import BlockPool
from .config import EngineConfig
from .kv_cache import KVCache
from .loader import load_model, resolve_model_folder
from .make_runner import make_runner
from .memory import plan_memory
from .memory_device import MemoryDevice, find_device
from .memory_guard import held_to_plan, return_freed_memory
from .memory_table import describe_plans
from .model_config import ModelConfig
from .option_checks import check_options, format_name
from .scheduler import Progress, Scheduler
from .sequence import new_sequence
from .speculation import NgramProposer
from .step import Chunk as StepChunk
from .step import StepRunner
from .stepper import FinishedStep, Stepper
from .stream import OutputStream, Wakeups

logger = logging.getLogger(__name__)

# Longer than any healthy step: the first one on a GPU may compile kernels, a CPU may prefill for a 20B model.
STEP_LIMIT_S = {"cuda": 180.0, "cpu": 600.0}
# After the drain's time is up, how long the step in flight may still take before the loop is cancelled.
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
            self._beat_s = time.monotonic()
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
            async with asyncio.timeout(self._step_limit_s):
                return await work
        except TimeoutError:
            raise EngineDeadError(
                f"a step has not come back for {self._step_limit_s:g} s; restart the server"
            ) from None

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


def load_engine(config: EngineConfig, *, memory: MemoryDevice | None = None) -> AsyncEngine:
    """Decide every "auto", load the model, plan and allocate the KV cache. Blocks; raises ConfigError.

    `memory` is what may be taken, where this process has loaded an engine before (`beside.py`): --max-gpu-memory is
    then held to already.
    """
    folder = resolve_model_folder(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder)
    check_options(config, model_config)
    device = _resolve_device(config)
    if device.type == "cpu":
        _leave_a_core_to_the_event_loop()
    if memory is not None:
        config = dataclasses.replace(config, max_gpu_memory=None)
    plan = plan_memory(config, model_config, memory or find_device("cuda" if device.type == "cuda" else "cpu"))
    dtype: torch.dtype = getattr(torch, plan.dtype_name)
    # Rows are independent in float32 on a CPU (linear.py), and where the fused decoder is asked to make them so.
    can_be_deterministic = can_fuse(model_config, dtype, device) or (device.type == "cpu" and dtype is torch.float32)
    _check_deterministic(config, can_be_deterministic)
    with held_to_plan(plan, device, is_limited=config.max_gpu_memory is not None):
        model = load_model(folder, model_config, dtype=dtype, device=device, lm_head_bits=config.lm_head_bits)
        kv_cache = KVCache(
            model_config,
            num_blocks=plan.num_blocks + 1,  # and the pad block
            block_size=config.cache_block_seq_len,
            quant_policy=config.quant_policy,
            dtype=dtype,
            device=device,
        )
        runner = make_runner(model, kv_cache, plan, config)
    logger.info(
        "model %s: device %s, dtype %s, weights %s, session length %d, KV cache of %d blocks of %d tokens "
        "(quant policy %d, %.0f MiB), prefix cache %s; memory plan:\n%s",
        folder,
        device,
        str(dtype).removeprefix("torch."),
        format_name(model_config),
        plan.session_len,
        plan.num_blocks,
        config.cache_block_seq_len,
        config.quant_policy,
        plan.kv_bytes / 2**20,
        "on" if config.enable_prefix_caching else "off",
        describe_plans([plan], [], model_config),
    )
    pool = BlockPool(num_blocks=plan.num_blocks, block_size=config.cache_block_seq_len)
    scheduler = Scheduler(
        pool,
        max_batch_size=plan.max_batch_size,
        max_prefill_tokens=plan.max_prefill_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        proposer=NgramProposer(config.num_draft_tokens) if config.speculate == "ngram" else None,
    )
    info = EngineInfo(
        vocab_size=model_config.vocab_size,
        session_len=plan.session_len,
        eos_token_ids=frozenset(t for t in model_config.eos_token_ids if 0 <= t < model_config.vocab_size),
        planned_bytes={part.name: part.num_bytes for part in plan.parts} | {"KV cache": plan.kv_bytes},
        num_kv_tokens=plan.num_tokens,
        kv_bits=config.quant_policy or 16,
        weight_format=format_name(model_config),
    )
    return AsyncEngine(
        runner,
        scheduler,
        pool,
        info=info,
        rope_base_for=model_config.rope_base,
        max_live_requests=plan.max_batch_size + config.max_queue_size,
        step_limit_s=STEP_LIMIT_S[device.type],
        can_be_deterministic=can_be_deterministic,
        is_always_deterministic=config.deterministic,
    )


def _check_deterministic(config: EngineConfig, is_possible: bool) -> None:
    if config.deterministic and not is_possible:
        raise ConfigError(
            "--deterministic is not possible with this compute type on this device; use --dtype float32 on a CPU, "
            "or 16 bits on a GPU of compute capability 8.0 or more"
        )


def _resolve_device(config: EngineConfig) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("--device is cuda and torch finds no CUDA device; use --device cpu, or install CUDA's torch")
    is_gpu_wanted = config.device == "cuda" or (config.device == "auto" and has_gpu)
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu_wanted else torch.device("cpu")


def _leave_a_core_to_the_event_loop() -> None:
    """Compute on all physical cores but, where there are no more logical ones, the event loop's.

    On a machine of two cores the demo model's engine made 118 tokens/s alone and 775 in a batch of 32 with one thread,
    70 and 612 with two.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)))
