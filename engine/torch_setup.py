"""What has to be settled before torch is imported. No torch here."""

import ctypes
import importlib.util
import os
import threading
import warnings
from pathlib import Path


def prepare_torch() -> None:
    """Let OpenMP's threads sleep instead of spin while they wait (unless the user chose otherwise), and keep torch
    from warning that numpy, which nothing here needs, is not installed.

    The event loop, other programs and torch share the cores. A spinning thread burns the time slice that the thread it
    waits for needs: on two cores beside one busy program a step of a model of the demo's size took 52 ms spinning and
    11 ms sleeping at one stream, 808 ms and 65 ms at 32.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def begin_cuda_context() -> None:
    """Begin to create the CUDA context of the first GPU on a thread; torch, imported meanwhile, takes the same one.

    On an H200 machine that takes 0.3 s, which `import torch` then hides. Nothing happens without a GPU or where torch
    has no CUDA, and torch reports what goes wrong.
    """
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        return
    if (Path(torch_spec.origin).parent / "lib" / "libtorch_cuda.so").exists():
        threading.Thread(target=_create_cuda_context, name="CUDA context", daemon=True).start()


def _create_cuda_context() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
