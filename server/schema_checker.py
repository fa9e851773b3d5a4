"""The processes that check whole answers against their schemas, from the server's side: started when they are needed.

Owns their lives, and that no schema can hold the server up: a check that takes too long ends its process, and the next
one gets a new one. What a check is belongs to `tools/validation.py`; what is checked, to `final_check.py`.
"""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import orjson

TIME_LIMIT_S = 2.0  # a check takes 0.2 ms
START_LIMIT_S = 30.0  # of a process; it takes 0.1 s where a core is free
NUM_PROCESSES = 4  # at most; a second one starts when the first is busy, so that slow checks hold up few others
_COMMAND = (sys.executable, "-m", "lmdserve.tools.validation")
_GREETING = orjson.dumps({"schema": "true", "value": None}) + b"\n"


class SchemaChecker:
    """Checks texts on threads, each with a process of its own. `close` ends them all."""

    def __init__(self, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._threads = ThreadPoolExecutor(NUM_PROCESSES, thread_name_prefix="lmdserve-check")
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by thread
        self._is_closed = False

    async def problem(self, schema: str, value: str | None) -> str | None:
        """Return why `value` does not obey `schema` (both JSON), None where it does; without a value: of the schema."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, schema, value)

    def close(self) -> None:
        """End the processes and the threads, and the checks that they are at."""
        self._is_closed = True
        for process in list(self._processes.values()):
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for thread in list(self._processes):
            self._end(thread)

    def _ask(self, schema: str, value: str | None) -> str | None:
        question = orjson.dumps({"schema": schema, "value": value}) + b"\n"
        line = self._exchange(question) or self._exchange(question)  # the first process may have been dead already
        if not line:
            return f"checking it took more than {self._time_limit_s:g} s, or more than 1 GiB; simplify the schema"
        problem: str | None = orjson.loads(line)["problem"]
        return problem

    def _exchange(self, question: bytes) -> bytes:
        """Return the answer's line, or nothing if the process ended or had to be."""
        if self._is_closed:
            return b""
        thread = threading.get_ident()
        if thread not in self._processes:
            self._processes[thread] = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._send(thread, _GREETING, START_LIMIT_S)
        return self._send(thread, question, self._time_limit_s / 2) if thread in self._processes else b""

    def _send(self, thread: int, question: bytes, time_limit_s: float) -> bytes:
        process = self._processes[thread]
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(time_limit_s, process.kill)
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self._end(thread)
            return b""
        return line

    def _end(self, thread: int) -> None:
        process = self._processes.pop(thread)
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate()
