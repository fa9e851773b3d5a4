"""The CUDA stream that an engine computes on, given to the next engine when that one is gone.

cuBLAS keeps 32 MiB for every stream that it ever computed on, and graphs that were captured hold their address, so it
cannot be freed while any engine lives: with a new stream each, a process would lose as much with every swap.
"""

import weakref

import torch

_unused: dict[int, list[torch.cuda.Stream]] = {}  # by the index of the device; streams live as long as the process


def compute_stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """Return a stream that nobody computes on, for as long as its owner lives."""
    index = torch.cuda.current_device() if device.index is None else device.index
    unused = _unused.setdefault(index, [])
    stream: torch.cuda.Stream = unused.pop() if unused else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    weakref.finalize(owner, unused.append, stream)
    return stream
