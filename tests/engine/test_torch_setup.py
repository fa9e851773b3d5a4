"""What is settled before torch is imported: defaults that give way to the user's, and a context begun meanwhile."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmdserve.engine import torch_setup


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")  # so that what is set below is undone, too
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    torch_setup.prepare_torch()
    assert torch_setup.os.environ["OMP_WAIT_POLICY"] == after


class FakeDriver:
    """Counts the calls that make a context."""

    def __init__(self, *, init_status: int = 0) -> None:
        self.calls: list[str] = []
        self._init_status = init_status

    def cuInit(self, flags: int) -> int:
        self.calls.append("init")
        return self._init_status

    def cuDeviceGet(self, device: Any, index: int) -> int:
        self.calls.append(f"device {index}")
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.calls.append("context")
        return 0


def _begin(monkeypatch: pytest.MonkeyPatch, torch_folder: Path, driver: FakeDriver | None) -> None:
    """Run begin_cuda_context on a torch in `torch_folder` and wait for what it started."""

    def load(name: str) -> FakeDriver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    spec = SimpleNamespace(origin=str(torch_folder / "__init__.py"))
    monkeypatch.setattr(torch_setup.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch_setup.ctypes, "CDLL", load)
    torch_setup.begin_cuda_context()
    for thread in threading.enumerate():
        if thread.name == "CUDA context":
            thread.join(10)


@pytest.fixture
def cuda_torch(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    return tmp_path


def test_a_context_is_made_for_the_first_gpu(monkeypatch: pytest.MonkeyPatch, cuda_torch: Path) -> None:
    driver = FakeDriver()
    _begin(monkeypatch, cuda_torch, driver)
    assert driver.calls == ["init", "device 0", "context"]


def test_a_torch_without_cuda_makes_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = FakeDriver()
    _begin(monkeypatch, tmp_path, driver)
    assert driver.calls == []


def test_no_driver_and_no_gpu_are_left_to_torch_to_report(monkeypatch: pytest.MonkeyPatch, cuda_torch: Path) -> None:
    _begin(monkeypatch, cuda_torch, None)
    driver = FakeDriver(init_status=100)
    _begin(monkeypatch, cuda_torch, driver)
    assert driver.calls == ["init"]
