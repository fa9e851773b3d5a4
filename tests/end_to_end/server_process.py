"""A real server process on a free port, serving the demo model."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 120.0
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


class ServerProcess:
    """`lmdserve --model demo` as a user would start it; `url` is where it listens."""

    def __init__(self, *options: str) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", prefix="lmdserve-")  # noqa: SIM115
        command = [sys.executable, "-m", "lmdserve", "--model", "demo", "--server-port", "0", *options]
        environment = {name: value for name, value in os.environ.items() if name != "LMDSERVE_API_KEYS"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, cwd=tempfile.gettempdir()
        )
        self.url = self._read_url()

    def _read_url(self) -> str:
        assert self.process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                if found := ADDRESS.search(line):
                    return found.group()
        finally:
            watchdog.cancel()
        raise AssertionError(f"the server did not start:\n{self.log()}")

    def log(self) -> str:
        return Path(self._log.name).read_text("utf-8")

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._log.close()

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])

    def metric(self, name: str) -> float:
        """Sum of a metric's samples in /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            text = reply.read().decode("utf-8")
        samples = re.findall(rf"^{re.escape(name)}(?:{{.*?}})? (\S+)$", text, re.MULTILINE)
        assert samples, f"no metric {name}"
        return sum(map(float, samples))

    def wait_until_idle(self, timeout_s: float = 30.0) -> None:
        """Return once no sequence runs or waits and no KV block is held."""
        deadline = time.monotonic() + timeout_s
        names = ("lmdserve_requests_running", "lmdserve_requests_waiting", "lmdserve_kv_blocks_used")
        while any(self.metric(name) for name in names):
            assert time.monotonic() < deadline, {name: self.metric(name) for name in names}
            time.sleep(0.05)
