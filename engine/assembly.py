"""Two ways to put loaded weights together: the plain decoder, and the fused one for CUDA with 16-bit types.

Owns the choice between them. The loader fills linears one by one and hands each over as soon as it is complete, so that
what is repacked for the GPU exists twice for one linear at a time only.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .config import HeadBits
from .layers import MLP, Attention, DecoderLayer, RMSNorm
from .linear import Linear
from .memory_device import NO_CAPABILITY
from .memory_sizes import is_fused
from .model_config import ModelConfig
from .models.decoder import Decoder

if TYPE_CHECKING:
    from .models.fused_decoder import FusedDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """One layer's weights; the linears as the assembly's `linear` and `gate_up` returned them."""

    index: int
    attention_norm: torch.Tensor
    qkv: Any
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Any
    mlp_norm: torch.Tensor
    gate_up: Any
    down: Any


class Assembly(Protocol):
    """What the loader asks for."""

    def linear(self, linear: Linear) -> Any:
        """Return what the decoder computes with in place of a loaded linear."""

    def gate_up(self, linear: Linear) -> Any:
        """Return the same for gate and up joined along their outputs."""

    def decoder(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: list[LayerParts],
        final_norm: torch.Tensor,
        head: Linear,
    ) -> "Decoder | FusedDecoder":
        """Return the model."""


def choose_assembly(config: ModelConfig, dtype: torch.dtype, device: torch.device, lm_head_bits: HeadBits) -> Assembly:
    """Return the fused assembly where its kernels run, else the plain one, whose head stays as it is."""
    if not can_fuse(config, dtype, device):
        return PlainAssembly()
    from .fused_assembly import FusedAssembly  # brings Triton, which a machine without a GPU need not have

    return FusedAssembly(config, dtype, device, lm_head_bits)


def can_fuse(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether the fused decoder's kernels cover this model on this device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else NO_CAPABILITY
    return is_fused(config, dtype.itemsize, capability)


class PlainAssembly:
    """The decoder of plain torch."""

    def linear(self, linear: Linear) -> Linear:
        """Return the linear as it is."""
        return linear

    gate_up = linear

    def decoder(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: list[LayerParts],
        final_norm: torch.Tensor,
        head: Linear,
    ) -> Decoder:
        """Return the model."""
        return Decoder(
            config,
            embedding=embedding,
            layers=[_plain_layer(config, parts) for parts in layers],
            final_norm=RMSNorm(final_norm, config.rms_norm_eps),
            head=head,
        )


def _plain_layer(config: ModelConfig, parts: LayerParts) -> DecoderLayer:
    def norm(weight: torch.Tensor) -> RMSNorm:
        return RMSNorm(weight, config.rms_norm_eps)

    return DecoderLayer(
        attention_norm=norm(parts.attention_norm),
        attention=Attention(
            layer=parts.index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv=parts.qkv,
            output=parts.output,
            q_norm=None if parts.q_norm is None else norm(parts.q_norm),
            k_norm=None if parts.k_norm is None else norm(parts.k_norm),
        ),
        mlp_norm=norm(parts.mlp_norm),
        mlp=MLP(gate_up=parts.gate_up, down=parts.down),
    )
