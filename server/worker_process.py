"""The server's end of a worker process: starting it, reading what it says, ending it.

A worker says where it is in lines of JSON on stdout (`lmdserve quantize --progress json`): objects with `phase`, the
last one "done" or "error". What it logs goes to the server's log.
"""

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "lmdserve.server.job_worker")
STOP_TIMEOUT_S = 10.0  # after SIGTERM, before SIGKILL
MAX_LINE_BYTES = 2**20
_NUM_LAST_LINES = 5


class WorkerError(Exception):
    """The worker ended without success; the text is its own, or what is known."""


class WorkerProcess:
    """One worker. `run` starts it; cancelling the iteration ends it."""

    def __init__(self, command: Sequence[str], num_threads: int) -> None:
        self._command = command
        self._num_threads = num_threads
        self._last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)

    async def run(self) -> AsyncIterator[dict[str, Any]]:
        """Yield each object that it prints; raise WorkerError when it fails. It has ended when this has."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._num_threads), "PYTHONUNBUFFERED": "1"}
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for the server, which tells the worker
        )
        assert process.stdout is not None
        assert process.stderr is not None
        logging_task = asyncio.create_task(self._log(process.stderr))
        said: dict[str, Any] = {}
        try:
            async for line in process.stdout:
                if (parsed := _parse(line)) is not None:
                    said = parsed
                    if said["phase"] != "error":
                        yield said
            status = await process.wait()
            await logging_task
        finally:
            await _end(process)
            logging_task.cancel()
            await asyncio.gather(logging_task, return_exceptions=True)
        if said.get("phase") == "error":
            raise WorkerError(str(said.get("message")))
        if status != 0 or said.get("phase") != "done":
            last_lines = " / ".join(self._last_lines)
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise WorkerError(f"the worker process {how}; its last words: {last_lines or 'none'}")

    async def _log(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._last_lines.append(text)
                logger.info("worker: %s", text)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict) and isinstance(value.get("phase"), str):
        return value
    logger.warning("a worker printed %r", line[:200])
    return None


async def _end(process: asyncio.subprocess.Process) -> None:
    """End it if it still runs: it may tidy up for a while, then it is killed."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
