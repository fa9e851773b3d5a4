"""All jobs that the server knows, and who follows them: a reader gets the present state, then each later one.

Owns the list and the notes on disk. What jobs do is `jobs.py`'s business.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from .admin_errors import JobNotFoundError
from .errors import ApiError
from .job import Job, JobError, Progress, Status
from .job_store import JobStore

logger = logging.getLogger(__name__)


class JobBoard:
    """Jobs by id, oldest first. All methods run on the event loop."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._jobs: dict[str, Job] = {}
        self._news: dict[str, asyncio.Event] = {}

    def open(self) -> list[Job]:
        """Read the jobs on disk and return those that a server left running."""
        self._jobs = {job.id: job for job in self._store.open()}
        return [job for job in self._jobs.values() if not job.is_over]

    def close(self) -> None:
        """Leave the folder to others; unfinished jobs stay noted as running."""
        self._store.close()

    @property
    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        return list(self._jobs.values())

    def find(self, job_id: str) -> Job:
        """Return a job; JobNotFoundError if there is none of this id."""
        if job_id not in self._jobs:
            raise JobNotFoundError(f"there is no job {job_id[:80]!r}; GET /admin/jobs lists all", param="id")
        return self._jobs[job_id]

    def add(self, job: Job) -> None:
        """Note a new job; StorageError, and there is none, when the disk does not take it."""
        self._store.save(job)
        self._jobs[job.id] = job

    def report(self, job: Job, progress: Progress) -> None:
        """Say where a job is. That is not noted on disk: a resumed job says it again."""
        job.progress = progress
        self._tell(job)

    def note(self, job: Job) -> None:
        """Note what has changed about a job, on disk as far as that takes it."""
        try:
            self._store.save(job)
        except ApiError as error:
            logger.error("job %s: %s", job.id, error.message)
        self._tell(job)

    def finish(self, job: Job, status: Status, error: JobError | None = None) -> None:
        """Note how a job ended."""
        job.status, job.error, job.finished = status, error, time.time()
        if status == "done":
            job.progress = Progress("done", percent=100.0)
        logger.info(
            "job %s (%s of %s) %s%s", job.id, job.kind, job.model, status, f": {error.message}" if error else ""
        )
        self.note(job)

    async def follow(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Yield the job as it is, then whenever it has changed, until it is over. A slow reader skips states."""
        while True:
            news = self._news.setdefault(job.id, asyncio.Event())
            yield job.describe()
            if job.is_over:
                return
            await news.wait()

    def _tell(self, job: Job) -> None:
        """Wake all readers; the next state has an event of its own."""
        news = self._news.pop(job.id, None)
        if news is not None:
            news.set()
