"""The process that checks whole answers against their schemas, from the server's side: started when it is needed.

Owns its life, and that no schema can hold the server up: a check that takes too long ends the process, and the next one
gets a new one. What a check is belongs to `tools/validation.py`; what is checked, to `final_check.py`.
"""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import orjson

TIME_LIMIT_S = 2.0  # a check takes 0.2 ms; the process starts in 100
_COMMAND = (sys.executable, "-m", "lmdserve.tools.validation")


class SchemaChecker:
    """Checks one text at a time, on a thread of its own. `close` ends process and thread."""

    def __init__(self, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmdserve-check")
        self._process: subprocess.Popen[bytes] | None = None

    async def problem(self, schema: str, value: str | None) -> str | None:
        """Return why `value` does not obey `schema` (both JSON), None where it does; without a value: of the schema."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, schema, value)

    def close(self) -> None:
        """End the process and the thread."""
        if self._process is not None:
            self._process.kill()
        self._thread.submit(self._end)
        self._thread.shutdown(wait=False)

    def _ask(self, schema: str, value: str | None) -> str | None:
        question = orjson.dumps({"schema": schema, "value": value}) + b"\n"
        line = self._exchange(question) or self._exchange(question)  # the first process may have been dead already
        if not line:
            return f"checking it took more than {self._time_limit_s:g} s, or more than 1 GiB; simplify the schema"
        problem: str | None = orjson.loads(line)["problem"]
        return problem

    def _exchange(self, question: bytes) -> bytes:
        """Return the answer's line, or nothing if the process ended or had to be."""
        if self._process is None:
            self._process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(self._time_limit_s / 2, process.kill)
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
            self._end()
            return b""
        return line

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None
