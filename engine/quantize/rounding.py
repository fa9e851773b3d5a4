"""Rounding a weight to 4-bit codes with a zero point and a scale for each group of inputs, and back.

Owns the arithmetic of the format, (code - zero) * scale, and nothing of how ranges are chosen or codes are packed.
Zero points are whole and inside 0..15, so a group's range always includes 0; scales are rounded to the type that they
are stored in before codes are computed from them.
"""

from dataclasses import dataclass

import torch

_LARGEST_CODE = 15
_SYMMETRIC_ZERO = 8


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the weights of a run are rounded."""

    group_size: int  # -1: all inputs of a row
    symmetric: bool
    scale_dtype: torch.dtype

    def num_groups(self, in_features: int) -> int:
        """Return into how many groups a row divides; 0 when it does not."""
        size = in_features if self.group_size == -1 else self.group_size
        return 0 if in_features % size else in_features // size

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [out_features, in_features] as [out_features, groups, group_size]."""
        return weight.view(weight.shape[0], self.num_groups(weight.shape[1]), -1)


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """codes uint8 [out_features, in_features]; zeros uint8 and scales [out_features, groups]."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """Return the weight that these stand for, float32 [out_features, in_features]."""
        zeros, scales = self.zeros.unsqueeze(-1).float(), self.scales.unsqueeze(-1).float()
        grouped = self.codes.view(*self.zeros.shape, -1).float()
        return grouped.sub_(zeros).mul_(scales).flatten(1)


def full_range(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest weight of each group and 0, float32 [out_features, groups]."""
    low, high = torch.aminmax(grouped, dim=-1)
    return low.clamp_(max=0), high.clamp_(min=0)


def grid_of(low: torch.Tensor, high: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros and scales, float32 as they will be read, of groups with these ranges; a scale is never 0."""
    if rounding.symmetric:
        scales = torch.maximum(low / -_SYMMETRIC_ZERO, high / (_LARGEST_CODE - _SYMMETRIC_ZERO))
    else:
        scales = (high - low) / _LARGEST_CODE
    scales = scales.to(rounding.scale_dtype).float()
    scales = torch.where(scales == 0, 1.0, scales)  # a group of zeros, or too small for the type: its codes are 0
    zeros = torch.full_like(scales, _SYMMETRIC_ZERO) if rounding.symmetric else (-low / scales).round_()
    return zeros.clamp_(0, _LARGEST_CODE), scales


def round_to_grid(grouped: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the codes of weights [out_features, groups, group_size], float32 0..15."""
    return (grouped / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, _LARGEST_CODE)


def rounded_in_place(grouped: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Replace weights [out_features, groups, group_size] by what rounding to nearest makes of them, and return them."""
    zeros, scales = (part.unsqueeze(-1) for part in grid_of(*full_range(grouped), rounding))
    return grouped.div_(scales).round_().add_(zeros).clamp_(0, _LARGEST_CODE).sub_(zeros).mul_(scales)


def round_weight(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rounding: Rounding) -> RoundedWeight:
    """Round a weight, float32 [out_features, in_features], within the range of each of its groups."""
    zeros, scales = grid_of(low, high, rounding)
    codes = round_to_grid(rounding.grouped(weight), zeros, scales)
    return RoundedWeight(codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales.to(rounding.scale_dtype))
