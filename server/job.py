"""One order that takes a while: what was asked for, how far it is and how it ended, on disk and in replies."""

import time
from typing import Any, Literal

from msgspec import Struct, field, to_builtins

from lmdserve.engine.api import SwapPlan

from .gate import Gate

Kind = Literal["quantize", "swap", "rollback"]
Status = Literal["running", "done", "failed", "cancelled"]


class JobError(Struct, frozen=True):
    """Why a job failed; the code is that of the error object with the same meaning."""

    code: str
    message: str


class Progress(Struct, frozen=True):
    """Where a job is. The numbers are null in phases that have none."""

    phase: str
    layer: int | None = None
    num_layers: int | None = None
    percent: float | None = None
    seconds_left: float | None = None


class Job(Struct, kw_only=True):
    """A job; times are Unix times in seconds, folders absolute paths."""

    id: str
    kind: Kind
    model: str  # what is quantized, or what is to serve, as replies call it
    folder: str
    created: float = field(default_factory=time.time)
    status: Status = "running"
    progress: Progress = Progress("waiting")
    finished: float | None = None
    error: JobError | None = None
    # of quantizing
    work_dir: str | None = None  # as replies call it
    output_folder: str | None = None
    options: dict[str, Any] = {}
    then: Literal["swap"] | None = None
    is_quantized: bool = False  # the output is complete; what is left is the swap
    # of changing the checkpoint
    gate: Gate | None = None
    how: Literal["auto", "beside", "drain"] = "auto"
    drain_timeout: float = 120.0
    plan: SwapPlan | None = None
    quality: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.status != "running"

    def describe(self) -> dict[str, Any]:
        """Return the job as replies show it."""
        return {
            "id": self.id,
            "object": "admin.job",
            "kind": self.kind,
            "status": self.status,
            "model": self.model,
            "created": self.created,
            "finished": self.finished,
            **to_builtins(self.progress),
            "work_dir": self.work_dir,
            "then": self.then,
            "gate": to_builtins(self.gate),
            "plan": None if self.plan is None else self.plan._asdict(),
            "quality": self.quality,
            "error": to_builtins(self.error),
        }
