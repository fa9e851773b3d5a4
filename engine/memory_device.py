"""What memory a device has and how much of it is free, asked of the driver, /proc and cgroups. No torch.

Owns the questions; what is done with the answers is `memory.py`'s business. The GPU's driver is asked through its
management library, which creates no context: a plan costs no GPU memory and milliseconds.
"""

import ctypes
import os
from pathlib import Path
from typing import Literal, NamedTuple

from .api import ConfigError

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_MANAGEMENT_LIBRARY = "libnvidia-ml.so.1"
_NAME_LENGTH = 96
_FIRST_UUID_LETTERS = ("GPU-", "MIG-")

# Measured on an H200 with torch 2.11 and CUDA 13: a context in which no kernel has run yet.
NEW_CONTEXT_BYTES = 527 * 2**20

NO_CAPABILITY = (0, 0)  # of a CPU
# What an unknown GPU is planned as when only its size is given.
_ASSUMED_CAPABILITY = (8, 0)


class MemoryDevice(NamedTuple):
    """A device as the plan sees it, before the process has taken anything."""

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = NO_CAPABILITY  # CUDA compute capability


class _MemoryInfo(ctypes.Structure):
    """nvmlMemory_v2_t; `reserved` belongs to the driver, and CUDA does not count it."""

    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def find_device(kind: Literal["cuda", "cpu"]) -> MemoryDevice:
    """Return the device that an engine of this kind runs on; for "cuda" torch has found a GPU.

    Memory that torch holds but does not use counts as free, and so does this process's own context: a plan counts it.
    """
    return this_machine() if kind == "cpu" else _ask_torch()


def find_gpu() -> MemoryDevice | None:
    """Return the first GPU that CUDA_VISIBLE_DEVICES leaves, None when there is none or no driver to ask."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not (wanted.isdecimal() or wanted.startswith(_FIRST_UUID_LETTERS)):
        return None
    try:
        library = ctypes.CDLL(_MANAGEMENT_LIBRARY)
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    try:
        return _ask_driver(library, wanted)
    finally:
        library.nvmlShutdown()


def imagined_gpu(total_bytes: int, like: MemoryDevice | None) -> MemoryDevice:
    """Return an empty GPU of this size, of the kind that is there when there is one."""
    if like is None:
        return MemoryDevice("cuda", "a GPU", total_bytes, total_bytes, _ASSUMED_CAPABILITY)
    return like._replace(total_bytes=total_bytes, free_bytes=total_bytes)


def this_machine() -> MemoryDevice:
    """Return the CPU's memory: the machine's, or what a container's limit leaves of it."""
    meminfo = _read_meminfo()
    in_container = container_available_bytes(_CGROUP)
    free = meminfo["MemAvailable"] if in_container is None else min(meminfo["MemAvailable"], in_container)
    return MemoryDevice("cpu", "this machine", meminfo["MemTotal"], free)


def container_available_bytes(cgroup: Path) -> int | None:
    """Return what the container's limit (cgroup v2) leaves, page cache counted as free; None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))


def _ask_driver(library: ctypes.CDLL, wanted: str) -> MemoryDevice | None:
    handle, info = ctypes.c_void_p(), _MemoryInfo(version=ctypes.sizeof(_MemoryInfo) | 2 << 24)
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if wanted.isdecimal():
        status = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(wanted)), ctypes.byref(handle))
    else:
        status = library.nvmlDeviceGetHandleByUUID(wanted.encode(), ctypes.byref(handle))
    if status != 0 or library.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(info)) != 0:
        return None
    library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_LENGTH))
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return MemoryDevice("cuda", name.value.decode(), info.total - info.reserved, info.free, (major.value, minor.value))


def _ask_torch() -> MemoryDevice:
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    free = min(free + NEW_CONTEXT_BYTES, total)
    properties = torch.cuda.get_device_properties()
    return MemoryDevice("cuda", properties.name, total, free, (properties.major, properties.minor))


def _read_meminfo() -> dict[str, int]:
    """Return MemTotal and MemAvailable in bytes."""
    found = {}
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[name] = int(value.split()[0]) * 1024
    if len(found) < 2:
        raise ConfigError(f"{_MEMINFO} has no MemAvailable; give --cache-max-entry-count as a number of blocks")
    return found
