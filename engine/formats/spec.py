"""How one tensor of a linear lies on disk; shared by all formats, owned by none."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape and type of one tensor, and which of its axes runs along the linear's outputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # in memory; floating-point tensors are converted to it as they are read
    output_axis: int
    outputs_per_element: int = 1  # 8 where eight outputs share a packed word


@dataclass(frozen=True, slots=True, kw_only=True)
class DescriptionSpec:
    """A tensor that holds no weights: it tells of them, or is left over. It is checked and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_required: bool
    complaint: Callable[[torch.Tensor], str | None]  # what is wrong with its values, as the end of a sentence


Specs = dict[str, TensorSpec | DescriptionSpec]  # by the suffix of the tensor's name


def zeros_only(values: torch.Tensor) -> str | None:
    """The complaint about a tensor that some writers add to every linear, and that may only be 0."""
    return "is a bias, and config.json says that this linear has none" if bool(values.any()) else None
