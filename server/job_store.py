"""Jobs on disk, so that they survive the server: one JSON file each in a hidden folder of --models-dir.

Owns the folder, the lock that keeps a second server out of it, and that a file is whole or as it was before.
"""

import fcntl
import logging
import os
from pathlib import Path

import msgspec

from .admin_errors import ConflictError, StorageError
from .job import Job

logger = logging.getLogger(__name__)

FOLDER_NAME = ".jobs"
MAX_KEPT_JOBS = 200  # the oldest finished ones go


class JobStore:
    """The jobs of one --models-dir. `open` before anything else."""

    def __init__(self, models_dir: Path) -> None:
        self._folder = models_dir / FOLDER_NAME
        self._lock: int | None = None

    def open(self) -> list[Job]:
        """Take the folder for this server and return its jobs, oldest first; none where it cannot be taken."""
        try:
            self._take_lock()
        except OSError as error:
            logger.warning("no jobs in %s: %s", self._folder, error)
            return []
        jobs = [job for path in self._folder.glob("*.json") if (job := _read(path)) is not None]
        jobs.sort(key=lambda job: job.created)
        for job in [job for job in jobs if job.is_over][:-MAX_KEPT_JOBS]:
            jobs.remove(job)
            self._path(job).unlink(missing_ok=True)
        return jobs

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, job: Job) -> None:
        """Write the job; StorageError, and nothing changed, when the disk does not take it."""
        if self._lock is None:
            self._try_again()
        path = self._path(job)
        draft = path.with_suffix(".tmp")
        try:
            with draft.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(job), indent=2))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise StorageError(f"the job cannot be noted in {self._folder}: {error.strerror or error}") from error

    def _try_again(self) -> None:
        try:
            self._take_lock()
        except BlockingIOError:
            raise ConflictError(
                f"another server runs the jobs of {self._folder.parent}; ask that one, or give this one its own "
                "--models-dir"
            ) from None
        except OSError as error:
            raise StorageError(f"{self._folder} cannot be written: {error.strerror or error}") from error

    def _take_lock(self) -> None:
        self._folder.mkdir(exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel opens it when the process ends, however
        except OSError:
            os.close(lock)
            raise
        self._lock = lock

    def _path(self, job: Job) -> Path:
        return self._folder / f"{job.id}.json"


def _read(path: Path) -> Job | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Job)
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("the job in %s cannot be read and is left alone: %s", path, error)
        return None
