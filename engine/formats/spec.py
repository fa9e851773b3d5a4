"""How one tensor of a linear lies on disk; shared by all formats, owned by none."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape and type of one tensor, and which of its axes runs along the linear's outputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # in memory; floating-point tensors are converted to it as they are read
    output_axis: int
    outputs_per_element: int = 1  # 8 where eight outputs share a packed word
