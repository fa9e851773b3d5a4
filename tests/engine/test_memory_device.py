"""Which GPU is asked about and what its answers become; the driver's library is a fake."""

from types import SimpleNamespace
from typing import Any

import pytest

from lmdserve.engine import memory_device
from lmdserve.engine.memory_device import MemoryDevice, find_gpu, imagined_gpu, this_machine

GIB = 2**30


class FakeDriver:
    """nvml functions as ctypes would call them; remembers which device was asked for."""

    def __init__(self, *, init_status: int = 0) -> None:
        self.asked: list[Any] = []
        self.is_shut_down = False
        self.nvmlInit_v2 = lambda: init_status

    def nvmlShutdown(self) -> int:
        self.is_shut_down = True
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.asked.append(index.value)
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.asked.append(uuid)
        return 0

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, info: Any) -> int:
        assert info._obj.version == 40 | 2 << 24
        info._obj.total, info._obj.reserved, info._obj.free = 81 * GIB, GIB, 70 * GIB
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: Any) -> int:
        name.value = b"NVIDIA A100"
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 8, 0
        return 0


def _install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeDriver:
    fake = SimpleNamespace(**{name: getattr(memory_device.ctypes, name) for name in ("c_void_p", "c_int", "c_uint")})
    for name in ("sizeof", "byref", "create_string_buffer"):
        setattr(fake, name, getattr(memory_device.ctypes, name))
    fake.CDLL = lambda name: driver
    monkeypatch.setattr(memory_device, "ctypes", fake)
    return driver


@pytest.mark.parametrize(("visible", "asked"), [(None, 0), ("2,3", 2), ("GPU-ab12", b"GPU-ab12"), ("MIG-c", b"MIG-c")])
def test_the_first_visible_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: Any) -> None:
    driver = _install(monkeypatch, FakeDriver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() == MemoryDevice("cuda", "NVIDIA A100", 80 * GIB, 70 * GIB, (8, 0))
    assert driver.asked == [asked]
    assert driver.is_shut_down


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_hidden_gpus_are_not_found(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    _install(monkeypatch, FakeDriver())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() is None


def test_a_driver_that_does_not_start_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, FakeDriver(init_status=9))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpu() is None


def test_an_imagined_gpu_is_empty_and_of_the_kind_that_is_here() -> None:
    here = MemoryDevice("cuda", "NVIDIA H200", 140 * GIB, 3 * GIB, (9, 0))
    assert imagined_gpu(24 * GIB, here) == MemoryDevice("cuda", "NVIDIA H200", 24 * GIB, 24 * GIB, (9, 0))
    assert imagined_gpu(24 * GIB, None).capability == (8, 0)


def test_the_machine_has_more_memory_than_is_free() -> None:
    machine = this_machine()
    assert 0 < machine.free_bytes <= machine.total_bytes
