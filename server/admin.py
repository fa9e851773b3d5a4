"""Orders to the server, checked and turned into jobs: which folders they mean, whether they may begin.

`jobs.py` carries them out, `routes/admin.py` speaks HTTP.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmdserve.engine.api import ConfigError, SwapPlan
from lmdserve.engine.quantize.options import QuantizeOptions

from .admin_errors import ConflictError
from .admin_protocol import QuantizeOrder, RollbackOrder, SwapOrder, options_of
from .errors import BadRequestError
from .gate import check_gate, measured_quality
from .job import Job
from .job_board import JobBoard
from .job_store import JobStore
from .jobs import Jobs, new_job_id
from .model_paths import ModelPaths
from .serving import Servings
from .swap import Loader, Swapper, Target, target_of

_PATH_OPTIONS = ("calib_dataset", "calib_data_dir", "eval_dataset")
DEFAULT_DRAIN_TIMEOUT_S = 120.0


class SwapCheck(NamedTuple):
    """What is known of a swap before it begins."""

    target: Target
    plan: SwapPlan
    quality: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """Takes orders. All methods run on the event loop."""

    servings: Servings
    loader: Loader
    paths: ModelPaths
    swapper: Swapper
    board: JobBoard
    jobs: Jobs

    async def quantize(self, order: QuantizeOrder) -> Job:
        """Start a quantization and return its job."""
        source = self._source(order.model)
        output = self.paths.new_folder(order.work_dir, "work_dir")
        if order.then is None and order.gate is not None:
            raise BadRequestError('gate: it decides about the swap, so it needs "then": "swap"', param="gate")
        job = Job(
            id=new_job_id(),
            kind="quantize",
            model=source.checkpoint,
            folder=str(source.folder),
            work_dir=self.paths.name_of(output),
            output_folder=str(output),
            options=self._options(order),
            then=order.then,
            gate=order.gate,
            how=order.how or "auto",
            drain_timeout=_drain_timeout(order.drain_timeout),
        )
        try:
            await self.jobs.quantize(job)
        except ConfigError as error:
            raise BadRequestError(f"model: {error}", param="model") from error
        return job

    async def check_swap(self, order: SwapOrder) -> SwapCheck:
        """Say how a swap would go; raise what stands in its way."""
        folder = self.paths.checkpoint(order.model, "model", demo_folder=self.loader.demo_folder)
        if folder == self.servings.current.model.folder:
            raise ConflictError(f"model: {order.model!r} serves already", param="model")
        quality = await asyncio.to_thread(measured_quality, folder, self.servings.current.engine.info.kv_bits)
        check_gate(order.gate, quality)
        target = Target(folder, self.paths.name_of(folder))
        return SwapCheck(target, await self._plan(target, order.how or "auto"), quality)

    async def swap(self, order: SwapOrder, check: SwapCheck) -> Job:
        """Start a swap that has been checked and return its job."""
        job = self._job("swap", check.target, check.plan, order)
        job.gate, job.quality = order.gate, check.quality
        await self.jobs.swap(job)
        return job

    async def roll_back(self, order: RollbackOrder) -> Job:
        """Start to go back to what was served before, and return the job; ConflictError when there is nothing."""
        target = self.swapper.previous
        if target is None:
            raise ConflictError("nothing was served before the present checkpoint, so there is no way back")
        job = self._job("rollback", target, await self._plan(target, order.how or "auto"), order)
        if self.swapper.previous != target:
            raise ConflictError("another change of checkpoints was made meanwhile; GET /admin/models shows what serves")
        await self.jobs.swap(job)
        return job

    def describe_models(self) -> dict[str, Any]:
        """Return which checkpoint serves, what a rollback would go back to, and what still finishes."""
        current = self.servings.current
        return {
            "model": current.model.name,
            "current": _describe_target(target_of(current))
            | {
                "format": current.engine.info.weight_format,
                "planned_bytes": dict(current.engine.info.planned_bytes),
                "kv_tokens": current.engine.info.num_kv_tokens,
            },
            "previous": None if self.swapper.previous is None else _describe_target(self.swapper.previous),
            "finishing": [
                _describe_target(target_of(serving)) | {"requests": self.servings.num_leases(serving)}
                for serving in self.servings.live
                if serving is not current
            ],
        }

    def _source(self, model: str | None) -> Target:
        if model is None:
            return target_of(self.servings.current)
        folder = self.paths.checkpoint(model, "model", demo_folder=self.loader.demo_folder)
        return Target(folder, self.paths.name_of(folder))

    async def _plan(self, target: Target, how: Any) -> SwapPlan:
        try:
            return await self.swapper.plan(target, how)
        except ConfigError as error:
            raise BadRequestError(f"model: {error}", param="model") from error

    def _job(self, kind: Any, target: Target, plan: SwapPlan, order: SwapOrder | RollbackOrder) -> Job:
        return Job(
            id=new_job_id(),
            kind=kind,
            model=target.checkpoint,
            folder=str(target.folder),
            how=order.how or "auto",
            drain_timeout=_drain_timeout(order.drain_timeout),
            plan=plan,
        )

    def _options(self, order: QuantizeOrder) -> dict[str, Any]:
        """Return the options, with paths inside --models-dir made absolute."""
        options = options_of(order)
        for name in _PATH_OPTIONS:
            value = options.get(name)
            if value is not None and (name == "calib_data_dir" or _is_path(value)):
                options[name] = str(self.paths.existing(value, name))
        try:
            QuantizeOptions(**options)
        except ConfigError as error:
            raise BadRequestError(str(error), param="body") from error
        return options


def make_admin(
    servings: Servings, models_dir: Path, loader: Loader, prompt_threads: Executor, worker_command: Sequence[str]
) -> Admin:
    """Return what takes orders about the checkpoints in `models_dir`."""
    paths = ModelPaths(models_dir)
    swapper = Swapper(servings, loader, prompt_threads)
    board = JobBoard(JobStore(paths.root))
    jobs = Jobs(board, swapper, servings, loader, worker_command)
    return Admin(servings=servings, loader=loader, paths=paths, swapper=swapper, board=board, jobs=jobs)


def _is_path(value: str) -> bool:
    """Tell a file from the name of a data set, none of which has a dot or a slash."""
    return "/" in value or "." in value


def _drain_timeout(asked: float | None) -> float:
    return DEFAULT_DRAIN_TIMEOUT_S if asked is None else asked


def _describe_target(target: Target) -> dict[str, Any]:
    return {"checkpoint": target.checkpoint, "folder": str(target.folder)}
