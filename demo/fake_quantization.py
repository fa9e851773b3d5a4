"""What quantization does to numbers, without packing any: to measure how the demo model bears it."""

import torch
from torch import Tensor

from .decoding import KVTransform


def quantized_weight(weight: Tensor, *, bits: int = 4, group_size: int = 128) -> Tensor:
    """Round `weight` [rows, columns] to asymmetric integers per row and group of columns, and back."""
    groups = weight.float().view(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp(min=1e-8)
    zero = (-low / scale).round()
    integers = ((groups / scale).round() + zero).clamp(0, levels)
    rounded: Tensor = (integers - zero) * scale
    return rounded.flatten(1).to(weight.dtype)


def quantized_kv(bits: int) -> KVTransform:
    """Return a transform that rounds keys or values [..., head_dim] per token and head, asymmetric."""

    def transform(states: Tensor) -> Tensor:
        wide = states.float()
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).half().float()
        low = low.half().float()
        rounded: Tensor = ((wide - low) / scale).round().clamp(0, 2**bits - 1) * scale + low
        return rounded.to(states.dtype)

    return transform


@torch.no_grad()
def quantize_linears(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a network's state with every matrix inside the layers rounded to 4 bits in groups of 128."""
    return {
        name: quantized_weight(tensor) if name.startswith("layers.") and tensor.dim() == 2 else tensor
        for name, tensor in state.items()
    }
