"""Holds a process to its memory plan: torch refuses what goes past it, and running out is told in its numbers.

Also gives memory back that nothing uses any more.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .api import ConfigError
from .memory import MemoryPlan

_GIB = 2**30


@contextmanager
def held_to_plan(plan: MemoryPlan, device: torch.device, *, is_limited: bool) -> Iterator[None]:
    """Load and allocate within this; with `is_limited` torch never takes more than the plan, also afterwards.

    Raises ConfigError where memory runs out.
    """
    if device.type == "cuda" and is_limited:
        num_torch_bytes = plan.limit_bytes - plan.context_bytes
        torch.cuda.set_per_process_memory_fraction(num_torch_bytes / torch.cuda.mem_get_info(device)[1], device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory ran out while the model was loaded: {plan.peak_bytes / _GIB:.2f} GiB were planned and "
            f"{plan.limit_bytes / _GIB:.2f} GiB may be taken; another program may have taken some meanwhile; "
            "lower --cache-max-entry-count or --max-prefill-token-num"
        ) from error


def return_freed_memory() -> None:
    """Give what torch and malloc hold without use back to the device and the system."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
