"""The OpenAI SDK against a real server: the current version and the last 2.x, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

CHECKS = Path(__file__).with_name("openai_checks.py")
OPENAI_2 = Path(sys.prefix) / "openai-2"


def run_checks(url: str, python_path: str) -> str:
    environment = {**os.environ, "PYTHONPATH": python_path}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, str(CHECKS), url]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_current_sdk(server: ServerProcess) -> None:
    assert "openai 3." in run_checks(server.url, "")


def test_the_last_2x_sdk(server: ServerProcess) -> None:
    if not OPENAI_2.exists():
        pytest.skip("the 2.x SDK is not installed; `make install-test` does it")
    assert "openai 2." in run_checks(server.url, str(OPENAI_2))
