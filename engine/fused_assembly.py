"""Puts loaded weights together for the fused decoder; each linear is repacked for the kernels once it is complete."""

import dataclasses

import torch

from lmdserve.kernels.w4a16_tiles import can_pack, pack_weight
from lmdserve.kernels.w4a16_workspace import Workspace

from .assembly import LayerParts
from .config import HeadBits
from .fused_linear import CublasLinear, FusedLinear, Head, Int8Head, PackedLinear, UnpackedLinear
from .linear import DenseLinear, FourBitLinear, JoinedLinear, Linear, ReorderedLinear, SharedLinear
from .memory_sizes import ComputeForm, arena_bytes, most_gathered_inputs
from .model_config import ModelConfig
from .models.fused_decoder import FusedDecoder, FusedLayer
from .reordered_linear import GatheredLinear, gather_scratch
from .reordered_linear import JoinedLinear as FusedJoinedLinear
from .weight_arena import WeightArena


class FusedAssembly:
    """The Assembly of assembly.py; all packed linears share one workspace, and the layers' weights one arena."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, lm_head_bits: HeadBits) -> None:
        self._lm_head_bits = lm_head_bits
        self._workspace = Workspace(device)
        self._gather_scratch = gather_scratch(most_gathered_inputs(config), dtype, device)
        self._arena = WeightArena(arena_bytes(config, ComputeForm(dtype.itemsize, is_fused=True)), device)

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
            layers=[_fused_layer(parts) for parts in layers],
            final_norm=final_norm,
            head=_head(head, self._lm_head_bits),
        )

    def _fuse(self, linear: Linear, *, interleave_halves: bool) -> FusedLinear:
        if isinstance(linear, ReorderedLinear):
            inner = self._fuse(linear.linear, interleave_halves=interleave_halves)
            return GatheredLinear(inner, self._arena.place(linear.order), self._gather_scratch)
        if isinstance(linear, JoinedLinear):
            return FusedJoinedLinear([self._fuse(part, interleave_halves=False) for part in linear.linears])
        assert isinstance(linear, DenseLinear | FourBitLinear), "the kinds of linear that layers have"
        if isinstance(linear, DenseLinear):
            return CublasLinear(self._arena.place(linear.weight), self._placed(linear.bias))
        group_size = linear.in_features // linear.scales.shape[1]
        if not can_pack(linear.out_features, linear.in_features, group_size):
            codes, zeros, scales = map(self._arena.place, (linear.codes, linear.zeros, linear.scales))
            return UnpackedLinear(FourBitLinear(codes, zeros, scales, self._placed(linear.bias)))
        weight = pack_weight(
            linear.codes, linear.zeros, linear.scales, linear.scales.dtype, interleave_halves=interleave_halves
        )
        weight = dataclasses.replace(weight, records=self._arena.place(weight.records))
        return PackedLinear(weight, self._placed(linear.bias), self._workspace)

    def _placed(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else self._arena.place(bias)


def _fused_layer(parts: LayerParts) -> FusedLayer:
    """Return the layer; its norms write what qkv, and gate and up, take in the order that those want."""
    fields = {name: getattr(parts, name) for name in LayerParts.__slots__}
    for name in ("qkv", "gate_up"):
        linear = fields[name]
        if isinstance(linear, GatheredLinear):
            fields |= {name: linear.linear, f"{name}_order": linear.order}
    return FusedLayer(**fields)


def _head(head: Linear, bits: HeadBits) -> Head:
    """Return the head's product; its weight was allocated before the layers' and stays where it is."""
    assert isinstance(head, DenseLinear | SharedLinear), "heads are never quantized on disk"
    return CublasLinear(head.weight, None) if bits == 16 else Int8Head(head.weight)
