"""GPTQ: 4-bit codes in words of eight inputs, and which group each input is in.

On disk: qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], both in plain order, scales [groups, out], g_idx
[in]. "gptq_v2" stores zero points as they are. "gptq" (v1) stores words of them less 0x11111111: a zero point of 0
borrows from its neighbours, and only the same addition to the whole word brings them back.
"""

from collections.abc import Mapping

import torch

from lmdserve.kernels import layout

from ..api import ConfigError
from ..input_order import group_index_complaint
from ..quantization_config import QuantizationScheme
from .four_bit import FourBitWeight
from .spec import DescriptionSpec, Specs, TensorSpec, zeros_only

GROUP_INDEX_SUFFIX = "g_idx"
_ONE_IN_EVERY_NIBBLE = 0x11111111


def matches(scheme: QuantizationScheme | None) -> bool:
    """Say whether a linear of this scheme is stored in this format."""
    return scheme is not None and scheme.method == "gptq"


def tensor_specs(in_features: int, out_features: int, scheme: QuantizationScheme, dtype: torch.dtype) -> Specs:
    """Return the tensors of one linear, by suffix; raise ConfigError when its sizes do not divide."""
    group_size, words = scheme.num_inputs_per_group(in_features), layout.NIBBLES_PER_WORD
    if in_features % group_size or in_features % words or out_features % words:
        raise ConfigError(
            f"GPTQ cannot hold a linear of {in_features} inputs and {out_features} outputs with group_size {group_size}"
            ": inputs must divide into groups, and both into words of 8; check quantization_config in config.json"
        )
    groups = in_features // group_size
    return {
        "qweight": TensorSpec(shape=(in_features // words, out_features), dtype=torch.int32, output_axis=1),
        "qzeros": TensorSpec(
            shape=(groups, out_features // words), dtype=torch.int32, output_axis=1, outputs_per_element=words
        ),
        "scales": TensorSpec(shape=(groups, out_features), dtype=dtype, output_axis=1),
        "g_idx": DescriptionSpec(
            shape=(in_features,),
            dtype=torch.int32,
            is_required=scheme.reorders_inputs,
            complaint=lambda index: group_index_complaint(index, group_size, may_reorder=scheme.reorders_inputs),
        ),
        "bias": DescriptionSpec(shape=(out_features,), dtype=dtype, is_required=False, complaint=zeros_only),
    }


def read_weight(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> FourBitWeight:
    """Return the weight that these tensors hold."""
    words = tensors["qzeros"]
    if scheme.layout == "gptq":
        words = words + _ONE_IN_EVERY_NIBBLE  # int32 arithmetic wraps around
    return FourBitWeight(
        codes=layout.unpack_words(tensors["qweight"].t()),
        zeros=layout.unpack_words(words).t().contiguous(),
        scales=tensors["scales"].t().contiguous(),
    )


def pack_linear(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_index: torch.Tensor | None = None,
    layout_name: str = "gptq",
) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear as they lie on disk, by suffix; `read_weight` reads them back.

    codes uint8 [out_features, in_features] and zeros uint8 [out_features, groups], values 0..15; scales of any floating
    type [out_features, groups]; group_index [in_features], the group of each input (None: runs of neighbours);
    layout_name "gptq" or "gptq_v2". ValueError when inputs or outputs do not divide into words of 8.
    """
    words = layout.pack_words(zeros.t())
    in_features, groups = codes.shape[1], scales.shape[1]
    if group_index is None:
        group_index = torch.arange(in_features) // (in_features // groups)
    return {
        "qweight": layout.pack_words(codes).t().contiguous(),
        "qzeros": words - _ONE_IN_EVERY_NIBBLE if layout_name == "gptq" else words,
        "scales": scales.t().contiguous(),
        "g_idx": group_index.to(torch.int32),
    }
