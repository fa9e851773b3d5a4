"""Plain Hugging Face weights: `weight` [out_features, in_features] in any 16- or 32-bit floating type."""

from collections.abc import Mapping

import torch

from ..quantization_config import QuantizationScheme
from .spec import Specs, TensorSpec

GROUP_INDEX_SUFFIX = None


def matches(scheme: QuantizationScheme | None) -> bool:
    """Say whether a linear of this scheme is stored in this format."""
    return scheme is None


def tensor_specs(in_features: int, out_features: int, scheme: QuantizationScheme | None, dtype: torch.dtype) -> Specs:
    """Return the tensors of one linear, by suffix."""
    return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype, output_axis=0)}


def read_weight(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme | None) -> torch.Tensor:
    """Return the weight."""
    return tensors["weight"]
