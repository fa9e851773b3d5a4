"""The scratch memory of 4-bit products: parts of sums, counters, unpacked slices of weights. Its user owns it.

One stream's products share one workspace: each is done with it before the next one writes.
"""

import torch

from .w4a16_plan import Tile

# A slice of an unpacked weight, and its product where that is needed, should stay in the L2 cache (50 MB on an H200).
SCRATCH_BYTES = 64 << 20
_NUM_COUNTERS = 1 << 14


def workspace_bytes() -> int:
    """Return what a `Workspace` takes; it does not depend on the model."""
    return SCRATCH_BYTES + _NUM_COUNTERS * 4


class Workspace:
    """Scratch for `w4a16_matmul` and its like on one device and stream; `workspace_bytes()` large."""

    def __init__(self, device: torch.device, *, scratch_bytes: int = SCRATCH_BYTES) -> None:
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        self._scratch = {dtype: scratch.view(dtype) for dtype in (torch.float16, torch.bfloat16)}
        self.partials = scratch.view(torch.float32)
        # Programs that are done with their part of a tile; the last one sets its counter back to zero.
        self.counters = torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all the scratch as a flat 16-bit tensor."""
        return self._scratch[dtype]

    def rows_at_once(self, tile: Tile, padded_out_features: int) -> int:
        """Return for how many rows the ordered sum of parts fits, in whole tiles."""
        bytes_per_tile = tile.block_m * padded_out_features * tile.num_splits * 4
        tiles_n = padded_out_features // tile.block_n
        num_tiles = min(self.partials.numel() * 4 // bytes_per_tile, self.counters.numel() // tiles_n)
        if num_tiles == 0:
            raise ValueError(
                f"the workspace of {self.partials.numel() * 4} bytes is too small for the parts of {tile.block_m} rows "
                f"of {padded_out_features} results in {tile.num_splits} splits: {bytes_per_tile} bytes"
            )
        return num_tiles * tile.block_m
