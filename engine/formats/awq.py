"""AWQ: 4-bit codes and zero points in words of eight, one scale a group of neighbouring inputs.

"gemm" (AutoAWQ, LMDeploy) packs along outputs, interleaved: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8]
(absent when zero_point is false: all are 8), scales [groups, out]. "gemv" (AutoAWQ) packs along inputs, in plain order:
qweight int32 [out, in / 8], qzeros int32 [out, W] and scales [out, 8 W], W words that hold the groups and padding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmdserve.kernels import layout

from ..api import ConfigError
from ..quantization_config import QuantizationScheme
from .four_bit import FourBitWeight
from .spec import Specs, TensorSpec

GROUP_INDEX_SUFFIX = None
_SYMMETRIC_ZERO = 8


def matches(scheme: QuantizationScheme | None) -> bool:
    """Say whether a linear of this scheme is stored in this format."""
    return scheme is not None and scheme.method == "awq"


def describe_gemm(group_size: int, unquantized_modules: Sequence[str]) -> dict[str, Any]:
    """Return quantization_config for what `pack_linear` packs."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,  # symmetric weights too: their zero points are written, and all are 8
        "modules_to_not_convert": list(unquantized_modules) or None,
    }


def tensor_specs(in_features: int, out_features: int, scheme: QuantizationScheme, dtype: torch.dtype) -> Specs:
    """Return the tensors of one linear, by suffix; raise ConfigError when its sizes do not divide."""
    group_size = scheme.num_inputs_per_group(in_features)
    is_gemv = scheme.layout == "gemv"
    words = layout.NIBBLES_PER_WORD
    if in_features % group_size or in_features % (words if is_gemv else 2) or (not is_gemv and out_features % words):
        raise ConfigError(
            f"AWQ cannot hold a linear of {in_features} inputs and {out_features} outputs with group_size {group_size}:"
            f" inputs must divide into groups and {'inputs' if is_gemv else 'outputs'} into words of 8; "
            "check quantization_config in config.json"
        )
    groups = in_features // group_size
    if is_gemv:
        return _gemv_specs(in_features, out_features, _gemv_words(groups, group_size), dtype)
    packed = {"output_axis": 1, "outputs_per_element": words}
    specs: Specs = {
        "qweight": TensorSpec(shape=(in_features, out_features // words), dtype=torch.int32, **packed),
        "scales": TensorSpec(shape=(groups, out_features), dtype=dtype, output_axis=1),
    }
    if scheme.has_zeros:
        specs["qzeros"] = TensorSpec(shape=(groups, out_features // words), dtype=torch.int32, **packed)
    return specs


def read_weight(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> FourBitWeight:
    """Return the weight that these tensors hold."""
    if scheme.layout == "gemv":
        return _read_gemv(tensors, scheme)
    codes = layout.unpack_awq(tensors["qweight"]).t().contiguous()
    scales = tensors["scales"].t().contiguous()
    if scheme.has_zeros:
        zeros = layout.unpack_awq(tensors["qzeros"]).t().contiguous()
    else:
        zeros = torch.full_like(scales, _SYMMETRIC_ZERO, dtype=torch.uint8)
    return FourBitWeight(codes=codes, zeros=zeros, scales=scales)


def pack_linear(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear as "gemm" has them on disk, by suffix; `read_weight` reads them back.

    codes uint8 [out_features, in_features] and zeros uint8 [out_features, groups], values 0..15; scales of any floating
    type [out_features, groups]. ValueError when the outputs do not divide into words of 8.
    """
    return {
        "qweight": layout.pack_awq(codes.t()),
        "qzeros": layout.pack_awq(zeros.t()),
        "scales": scales.t().contiguous(),
    }


def _gemv_words(groups: int, group_size: int) -> int:
    """Return how many words a row of zero points takes: padded, for small groups to a multiple of 2 or 4."""
    words = -(-groups // layout.NIBBLES_PER_WORD)
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    return -(-words // multiple) * multiple


def _gemv_specs(in_features: int, out_features: int, words: int, dtype: torch.dtype) -> Specs:
    per_word = layout.NIBBLES_PER_WORD
    return {
        "qweight": TensorSpec(shape=(out_features, in_features // per_word), dtype=torch.int32, output_axis=0),
        "qzeros": TensorSpec(shape=(out_features, words), dtype=torch.int32, output_axis=0),
        "scales": TensorSpec(shape=(out_features, words * per_word), dtype=dtype, output_axis=0),
    }


def _read_gemv(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> FourBitWeight:
    codes = layout.unpack_words(tensors["qweight"])
    groups = codes.shape[1] // scheme.num_inputs_per_group(codes.shape[1])
    return FourBitWeight(
        codes=codes,
        zeros=layout.unpack_words(tensors["qzeros"])[:, :groups].contiguous(),
        scales=tensors["scales"][:, :groups].contiguous(),
    )
