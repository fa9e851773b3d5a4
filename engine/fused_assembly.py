"""Puts loaded weights together for the fused decoder; each linear is repacked for the kernels once it is complete."""

import torch

from lmdserve.kernels.w4a16_tiles import can_pack, pack_weight
from lmdserve.kernels.w4a16_workspace import Workspace

from .assembly import LayerParts
from .fused_linear import CublasLinear, FusedLinear, PackedLinear, UnpackedLinear
from .linear import DenseLinear, FourBitLinear, Linear, SharedLinear
from .model_config import ModelConfig
from .models.fused_decoder import FusedDecoder, FusedLayer


class FusedAssembly:
    """The Assembly of assembly.py; all packed linears share one workspace."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = Workspace(device)

    def linear(self, linear: Linear) -> FusedLinear:
        """Return the linear in the form its products are fastest in."""
        return self._fuse(linear, interleave_halves=False)

    def gate_up(self, linear: Linear) -> FusedLinear:
        """Return the same with each gate beside its up, so that one tile holds both."""
        return self._fuse(linear, interleave_halves=True)

    def decoder(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: list[LayerParts],
        final_norm: torch.Tensor,
        head: Linear,
    ) -> FusedDecoder:
        """Return the model."""
        return FusedDecoder(
            config,
            embedding=embedding,
            layers=[FusedLayer(**{name: getattr(parts, name) for name in LayerParts.__slots__}) for parts in layers],
            final_norm=final_norm,
            head=self.linear(head),
        )

    def _fuse(self, linear: Linear, *, interleave_halves: bool) -> FusedLinear:
        if isinstance(linear, DenseLinear):
            return CublasLinear(linear.weight, linear.bias)
        if isinstance(linear, SharedLinear):
            return CublasLinear(linear.weight, None)
        assert isinstance(linear, FourBitLinear), "these are all kinds of linear there are"
        group_size = linear.in_features // linear.scales.shape[1]
        if not can_pack(linear.out_features, linear.in_features, group_size):
            return UnpackedLinear(linear)
        weight = pack_weight(
            linear.codes, linear.zeros, linear.scales, linear.scales.dtype, interleave_halves=interleave_halves
        )
        return PackedLinear(weight, linear.bias, self._workspace)
