"""Plain Hugging Face weights: `weight` [out_features, in_features] in any 16- or 32-bit floating type."""

from collections.abc import Mapping

import torch

from ..linear import DenseLinear, Linear
from ..model_config import QuantizationConfig
from .spec import TensorSpec


def matches(quantization: QuantizationConfig | None) -> bool:
    """Say whether a linear with this configuration is stored in this format."""
    return quantization is None


def tensor_specs(
    in_features: int, out_features: int, quantization: QuantizationConfig | None, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Return the tensors of one linear, by suffix."""
    return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype, output_axis=0)}


def build_linear(
    tensors: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None,
    quantization: QuantizationConfig | None,
    dtype: torch.dtype,
) -> Linear:
    """Return the linear that computes with these tensors."""
    return DenseLinear(tensors["weight"], bias)
