"""Carries out orders that take a while: quantizing in a worker process, and changing the checkpoint that serves.

One quantization at a time and one change at a time. Owns the tasks, what is tidied up when a job ends badly, and the
resumption of what a killed server left behind.
"""

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from lmdserve.engine.api import EngineError

from .admin_errors import ConflictError
from .errors import ApiError
from .gate import check_gate, measured_quality
from .job import Job, JobError, Progress
from .job_board import JobBoard
from .serving import Servings
from .swap import Loader, Swapper, Target
from .worker_process import WorkerError, WorkerProcess

logger = logging.getLogger(__name__)

CORES_FOR_SERVING_ON_GPU = 4  # event loop, engine thread, prompts, grammars


class Jobs:
    """Starts, follows up and ends jobs. All methods run on the event loop."""

    def __init__(
        self, board: JobBoard, swapper: Swapper, servings: Servings, loader: Loader, worker_command: Sequence[str]
    ) -> None:
        self._board = board
        self._swapper = swapper
        self._servings = servings
        self._loader = loader
        self._worker_command = worker_command
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._changing: Job | None = None  # the job whose turn it is to change the checkpoint

    def start(self) -> None:
        """Take up what a server before this one left unfinished."""
        for job in self._board.open():
            if job.kind == "quantize":
                logger.info("job %s goes on: quantizing %s", job.id, job.model)
                self._start(job, self._quantize)
            else:
                text = "the server ended before the change was complete; it serves --model again"
                self._board.finish(job, "failed", JobError("interrupted", text))

    async def stop(self) -> None:
        """End all work; unfinished quantizations go on when a server starts again."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._swapper.close()
        self._board.close()

    async def quantize(self, job: Job) -> None:
        """Start a quantization; ConflictError with what stands in its way, ConfigError when there is no checkpoint."""
        await asyncio.to_thread(self._check_gpu, job)
        for other in self._board.jobs:
            if other.kind == "quantize" and not other.is_over:
                raise ConflictError(f"job {other.id} is quantizing {other.model} now; wait for it, or DELETE it")
        self._board.add(job)
        self._start(job, self._quantize)

    async def swap(self, job: Job) -> None:
        """Start a change of checkpoints, whose plan has been made; ConflictError when one is under way."""
        if self._swapper.is_busy:
            raise ConflictError("another change of checkpoints is under way; GET /admin/jobs shows it")
        await self._swapper.take_turn()  # at once
        try:
            self._board.add(job)
        except ApiError:
            self._swapper.end_turn()
            raise
        self._start(job, self._swap_in_turn)

    async def cancel(self, job: Job) -> None:
        """End a job and tidy up; return when that is done. ConflictError when it is over or past that point."""
        if job.is_over:
            raise ConflictError(f"job {job.id} is {job.status} already")
        if job is self._changing and not self._swapper.can_cancel:
            raise ConflictError(
                f"job {job.id} is past the point where it can be cancelled; POST /admin/models/rollback goes back"
            )
        self._cancelled.add(job.id)
        task = self._tasks[job.id]
        task.cancel()
        await asyncio.wait({task})

    def _start(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(self._carry_out(job, work), name=f"job {job.id}")
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def _carry_out(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        """Do the work and note how it ended; a server that stops notes nothing."""
        try:
            await work(job)
        except asyncio.CancelledError:
            if job.id not in self._cancelled:
                raise
            self._cancelled.remove(job.id)
            await self._tidy_up(job)
            self._board.finish(job, "cancelled")
        except Exception as error:
            await self._tidy_up(job)
            self._board.finish(job, "failed", _describe(job, error))
        else:
            self._board.finish(job, "done")

    async def _tidy_up(self, job: Job) -> None:
        """Remove an output that is not complete."""
        if job.output_folder is not None and not job.is_quantized:
            await asyncio.to_thread(shutil.rmtree, job.output_folder, ignore_errors=True)

    async def _quantize(self, job: Job) -> None:
        assert job.output_folder is not None
        if not job.is_quantized:
            await self._run_worker(job)
            job.is_quantized = True
            self._board.note(job)
        job.quality = await asyncio.to_thread(measured_quality, Path(job.output_folder), self._kv_bits)
        if job.then is None:
            return
        check_gate(job.gate, job.quality)
        self._board.report(job, Progress("waiting"))
        await self._swapper.take_turn()
        assert job.work_dir is not None
        try:
            target = Target(Path(job.output_folder), job.work_dir)
            job.plan = await self._swapper.plan(target, job.how)
            await self._change(job, target)
        finally:
            self._swapper.end_turn()

    async def _run_worker(self, job: Job) -> None:
        gpu_bytes = await asyncio.to_thread(self._spare_gpu_bytes, job)
        limit = () if gpu_bytes is None else ("--gpu-bytes", str(gpu_bytes))
        arguments = (job.folder, f"--work-dir={job.output_folder}", *_option_arguments(job.options))
        command = (*self._worker_command, str(os.getpid()), *limit, *arguments, "--resume", "--progress=json")
        worker = WorkerProcess(command, _num_worker_threads(is_on_gpu=gpu_bytes is not None))
        async with aclosing(cast("Any", worker.run())) as sayings:
            async for said in sayings:
                self._board.report(job, _progress(said))

    async def _swap_in_turn(self, job: Job) -> None:
        try:
            await self._change(job, Target(Path(job.folder), job.model))
        finally:
            self._swapper.end_turn()

    async def _change(self, job: Job, target: Target) -> None:
        assert job.plan is not None

        def on_phase(phase: str) -> None:
            self._board.report(job, Progress(phase))

        self._changing = job
        try:
            if job.kind == "rollback":
                await self._swapper.roll_back(target, job.plan, drain_timeout_s=job.drain_timeout, on_phase=on_phase)
            else:
                await self._swapper.swap(target, job.plan, drain_timeout_s=job.drain_timeout, on_phase=on_phase)
        finally:
            self._changing = None

    @property
    def _kv_bits(self) -> int:
        return self._servings.current.engine.info.kv_bits

    def _check_gpu(self, job: Job) -> None:
        """Refuse what would run out of the memory that serving leaves it, minutes later."""
        spare_bytes = self._spare_gpu_bytes(job)
        if spare_bytes is None:
            return
        has_evaluation = not job.options.get("skip_evaluation", False)
        needed_bytes = self._loader.quantizing_gpu_bytes(Path(job.folder), has_evaluation=has_evaluation)
        if spare_bytes < needed_bytes:
            instead = 'send "device": "cpu"' + (', or "skip_evaluation": true' if has_evaluation else "")
            raise ConflictError(
                f"serving leaves {max(0, spare_bytes) / 2**30:.1f} GiB of the GPU, and quantizing {job.model} takes "
                f"about {needed_bytes / 2**30:.1f} GiB; serve with a lower --cache-max-entry-count, {instead}"
            )

    def _spare_gpu_bytes(self, job: Job) -> int | None:
        if job.options.get("device") == "cpu":
            return None
        return self._loader.spare_gpu_bytes(self._servings.current.engine.info)


def new_job_id() -> str:
    """Return an id that no job has."""
    return f"job-{secrets.token_hex(8)}"


def _option_arguments(options: dict[str, Any]) -> list[str]:
    """Return options of the order as `lmdserve quantize` reads them."""
    arguments = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments.append(f"--{option}={value}")
    return arguments


def _num_worker_threads(*, is_on_gpu: bool) -> int:
    """Leave serving its cores: all but one compute where it runs on the CPU; priority decides about the rest."""
    num_cores = len(os.sched_getaffinity(0))
    return max(1, num_cores - CORES_FOR_SERVING_ON_GPU if is_on_gpu else num_cores // 4)


def _progress(said: dict[str, Any]) -> Progress:
    return Progress(said["phase"], **{name: said.get(name) for name in Progress.__struct_fields__ if name != "phase"})


def _describe(job: Job, error: Exception) -> JobError:
    match error:
        case WorkerError():
            return JobError("quantization_failed", str(error))
        case ApiError():
            return JobError(error.code or error.type, error.message)
        case EngineError():
            return JobError("swap_failed", str(error))
    logger.error("job %s failed on a bug", job.id, exc_info=error)
    return JobError("internal_error", f"{type(error).__name__}; see the server's log under job {job.id}")
