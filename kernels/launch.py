"""What every Triton launcher needs: a launch that is quick on the host, programmatic dependent launch, the interpreter.

Owns no kernel. With programmatic dependent launch (Hopper and later) a kernel may start while the one before it in the
stream still runs. A kernel launched so waits before it touches anything an earlier kernel wrote, and lets the next one
start once its main loop is done: starting it earlier made a chain of decoder layers 3 to 55 % slower on an H200,
because the waiting programs hold the places of the running ones. Attention, the norm of one row and long products of
few rows (w4a16_hopper.py) let it start earlier, where that was measured to be faster.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface

# Compiled kernels with the values of their constexpr parameters, by all that Triton compiles another kernel for.
_ready: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
_this_thread = threading.local()


@cache
def has_programmatic_launch(device: torch.device) -> bool:
    """Say whether kernels on this device may be launched before their predecessor has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def is_interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which has no inline assembly."""
    return bool(triton.knobs.runtime.interpret)


def launch_options(device: torch.device) -> dict[str, Any]:
    """Return the arguments that each launch passes: `PDL`, the kernels' constexpr, and the launcher's own switch."""
    if has_programmatic_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Do `kernel[grid](*arguments, **options)` with the device's launch options, in a fraction of the time on the host.

    arguments: all parameters that are no constexpr, in order; options: constexprs by name, and the compiler's. Triton
    binds and inspects them anew for every launch; here what it found is kept by everything it looks at: types, whether
    pointers and integers are multiples of 16, whether integers are one.
    """
    key = (kernel, device, *options.items(), *map(_kind, arguments))
    ready = None if _is_compiling_ahead() else _ready.get(key)
    if ready is not None:
        compiled, constants = ready
        compiled[*grid, 1, 1](*arguments, *constants)
        return
    options |= launch_options(device)
    launched = kernel[grid](*arguments, **options)
    if isinstance(launched, CompiledKernel):
        _ready[key] = launched, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Any:
    """Return what Triton compiles another kernel for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, float):
        return float
    return argument.base.dtype, *argument.block_shape, argument.layout  # a TensorDescriptor


def _is_compiling_ahead() -> bool:
    return getattr(_this_thread, "is_compiling_ahead", False)


@contextmanager
def compile_ahead(num_threads: int) -> Iterator[None]:
    """Within, a launch compiles its kernel, `num_threads` kernels at once, and runs nothing; at the end all are ready.

    Everything but Triton's launches happens as always. Other threads launch as always too: a model may be loaded beside
    one that computes. One thread at a time may be within.
    """
    start = KernelInterface.__getitem__

    def compile_only(kernel: Any, grid: Any) -> Any:
        return partial(kernel.run, grid=grid, warmup=True) if _is_compiling_ahead() else start(kernel, grid)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="lmdserve-compile") as executor:
        KernelInterface.__getitem__ = compile_only
        _this_thread.is_compiling_ahead = True
        try:
            with triton.AsyncCompileMode(executor):
                yield
        finally:
            _this_thread.is_compiling_ahead = False
            KernelInterface.__getitem__ = start


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return when everything that earlier kernels of the stream wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next_kernel(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel of the stream start; it still waits for this one before it reads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
