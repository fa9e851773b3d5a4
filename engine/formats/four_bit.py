"""A 4-bit weight as all formats mean it, whatever words it is packed in: codes, zero points, scales, groups."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitWeight:
    """W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], where g is the group of input i."""

    codes: torch.Tensor  # uint8 [out_features, in_features], 0..15
    zeros: torch.Tensor  # uint8 [out_features, groups], 0..15
    scales: torch.Tensor  # floating-point [out_features, groups]

    def dequantize(self, group_index: torch.Tensor | None) -> torch.Tensor:
        """Return W in float32; exact for 16-bit scales. group_index [in_features]; None: groups are runs of inputs."""
        codes, zeros, scales = self.codes.float(), self.zeros.float(), self.scales.float()
        if group_index is not None:
            return (codes - zeros[:, group_index]).mul_(scales[:, group_index])
        grouped = codes.view(*scales.shape, -1)
        grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
        return codes
