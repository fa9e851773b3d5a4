"""compressed-tensors' "pack-quantized": 4-bit codes in words of eight inputs, zero points in words of eight outputs.

On disk, in plain order: weight_packed int32 [out, in / 8], weight_scale [out, groups], weight_zero_point int32
[out / 8, groups] (absent for symmetric weights: all are 8), weight_shape [2], and for weights quantized in the order of
activations weight_g_idx [in]. Its signed numbers are stored plus 8, so that codes and zero points are 0..15 here too.
"""

from collections.abc import Mapping

import torch

from lmdserve.kernels import layout

from ..api import ConfigError
from ..input_order import group_index_complaint
from ..quantization_config import QuantizationScheme
from .four_bit import FourBitWeight
from .spec import DescriptionSpec, Specs, TensorSpec

GROUP_INDEX_SUFFIX = "weight_g_idx"
_SYMMETRIC_ZERO = 8


def matches(scheme: QuantizationScheme | None) -> bool:
    """Say whether a linear of this scheme is stored in this format."""
    return scheme is not None and scheme.method == "compressed-tensors"


def tensor_specs(in_features: int, out_features: int, scheme: QuantizationScheme, dtype: torch.dtype) -> Specs:
    """Return the tensors of one linear, by suffix; raise ConfigError when its sizes do not divide."""
    group_size, words = scheme.num_inputs_per_group(in_features), layout.NIBBLES_PER_WORD
    if in_features % group_size or in_features % words or (scheme.has_zeros and out_features % words):
        raise ConfigError(
            f"a linear of {in_features} inputs and {out_features} outputs with group_size {group_size} cannot be read "
            "from compressed-tensors: inputs must divide into groups and words of 8, and outputs with zero points into "
            "words of 8; check quantization_config in config.json"
        )
    groups = in_features // group_size
    specs: Specs = {
        "weight_packed": TensorSpec(shape=(out_features, in_features // words), dtype=torch.int32, output_axis=0),
        "weight_scale": TensorSpec(shape=(out_features, groups), dtype=dtype, output_axis=0),
        "weight_shape": DescriptionSpec(
            shape=(2,),
            dtype=torch.int64,
            is_required=True,
            complaint=lambda shape: _shape_complaint(shape, out_features, in_features),
        ),
        "weight_g_idx": DescriptionSpec(
            shape=(in_features,),
            dtype=torch.int32,
            is_required=scheme.reorders_inputs,
            complaint=lambda index: group_index_complaint(index, group_size, may_reorder=scheme.reorders_inputs),
        ),
    }
    if scheme.has_zeros:
        specs["weight_zero_point"] = TensorSpec(
            shape=(out_features // words, groups), dtype=torch.int32, output_axis=0, outputs_per_element=words
        )
    return specs


def read_weight(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> FourBitWeight:
    """Return the weight that these tensors hold."""
    scales = tensors["weight_scale"]
    if scheme.has_zeros:
        zeros = layout.unpack_words(tensors["weight_zero_point"].t()).t().contiguous()
    else:
        zeros = torch.full_like(scales, _SYMMETRIC_ZERO, dtype=torch.uint8)
    return FourBitWeight(codes=layout.unpack_words(tensors["weight_packed"]), zeros=zeros, scales=scales)


def pack_linear(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_index: torch.Tensor | None = None,
    has_zeros: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear as they lie on disk, by suffix; `read_weight` reads them back.

    codes uint8 [out_features, in_features] and zeros uint8 [out_features, groups], values 0..15; scales of any floating
    type [out_features, groups]; group_index [in_features], the group of each input (None: runs of neighbours).
    has_zeros False leaves the zero points out. ValueError when sizes do not divide into words of 8, or when zero points
    other than 8 would be left out.
    """
    if not has_zeros and bool((zeros != _SYMMETRIC_ZERO).any()):
        raise ValueError("a symmetric weight has zero points of 8 only")
    tensors = {
        "weight_packed": layout.pack_words(codes),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if has_zeros:
        tensors["weight_zero_point"] = layout.pack_words(zeros.t()).t().contiguous()
    if group_index is not None:
        tensors["weight_g_idx"] = group_index.to(torch.int32)
    return tensors


def _shape_complaint(shape: torch.Tensor, out_features: int, in_features: int) -> str | None:
    stated = shape.tolist()
    return (
        None
        if stated == [out_features, in_features]
        else f"says {stated}, and config.json {[out_features, in_features]}"
    )
