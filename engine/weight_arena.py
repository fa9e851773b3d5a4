"""One block of GPU memory for all linears' weights, so that what loading takes for a while can be given back whole.

Packing needs several times a weight's size for a moment. Weights that are allocated in between sit in the allocator's
leftovers and hold on to them: a 7B model of 4.9 GiB kept 6.5 GiB after everything else was freed.
"""

import torch

from .memory_sizes import aligned_bytes


class WeightArena:
    """Memory that is filled from its beginning, a tensor at a time, and never given back."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._free = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy that lies in the arena, or the tensor itself when there is no room left."""
        num_bytes = aligned_bytes(tensor.nbytes)
        if num_bytes > len(self._free):
            return tensor
        memory, self._free = self._free[: tensor.nbytes], self._free[num_bytes:]
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
