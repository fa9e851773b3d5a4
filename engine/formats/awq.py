"""AWQ's "gemm" format: 4-bit codes and zero points packed eight outputs a word, one scale a group of inputs.

On disk: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] (absent when zero_point is false: all are 8),
scales [groups, out]. In memory: codes by output row, so that dequantizing gives the weight the matrix product wants.
"""

from collections.abc import Mapping

import torch

from lmdserve.kernels import layout

from ..api import ConfigError
from ..cpu_four_bit import build_four_bit_linear
from ..linear import FourBitLinear, Linear
from ..model_config import QuantizationConfig
from .spec import TensorSpec

_SYMMETRIC_ZERO = 8


def matches(quantization: QuantizationConfig | None) -> bool:
    """Say whether a linear with this configuration is stored in this format."""
    return quantization is not None and quantization.method == "awq"


def tensor_specs(
    in_features: int, out_features: int, quantization: QuantizationConfig, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Return the tensors of one linear, by suffix; raise ConfigError when its sizes do not divide."""
    group_size = in_features if quantization.group_size == -1 else quantization.group_size
    if in_features % group_size or in_features % 2 or out_features % layout.NIBBLES_PER_WORD:
        raise ConfigError(
            f"AWQ cannot hold a linear of {in_features} inputs and {out_features} outputs with group_size {group_size}:"
            " inputs must divide into groups and outputs into words of 8; check quantization_config in config.json"
        )
    groups, words = in_features // group_size, out_features // layout.NIBBLES_PER_WORD
    packed = {"output_axis": 1, "outputs_per_element": layout.NIBBLES_PER_WORD}
    specs = {
        "qweight": TensorSpec(shape=(in_features, words), dtype=torch.int32, **packed),
        "scales": TensorSpec(shape=(groups, out_features), dtype=dtype, output_axis=1),
    }
    if quantization.zero_point:
        specs["qzeros"] = TensorSpec(shape=(groups, words), dtype=torch.int32, **packed)
    return specs


def build_linear(
    tensors: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
) -> Linear:
    """Return the linear that computes with these tensors."""
    codes = layout.unpack_awq(tensors["qweight"]).t().contiguous()
    scales = tensors["scales"].t().contiguous()
    if quantization.zero_point:
        zeros = layout.unpack_awq(tensors["qzeros"]).t().to(dtype).contiguous()
    else:
        zeros = torch.full_like(scales, _SYMMETRIC_ZERO)
    if codes.device.type == "cpu":
        return build_four_bit_linear(codes, zeros, scales, bias)
    return FourBitLinear(layout.pack_rows(codes), zeros, scales, bias)


def pack_linear(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear as they lie on disk, by suffix; the inverse of what `build_linear` reads.

    codes uint8 [out_features, in_features] and zeros uint8 [out_features, groups], values 0..15; scales of any floating
    type [out_features, groups]. ValueError when the outputs do not divide into words of 8.
    """
    return {
        "qweight": layout.pack_awq(codes.t()),
        "qzeros": layout.pack_awq(zeros.t()),
        "scales": scales.t().contiguous(),
    }
