"""A weight as a format holds it, to the linear that computes with it: outputs and inputs put in order, groups in runs.

Owns what is done once at load for weights quantized in the order of activations (`input_order.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lmdserve.kernels import layout

from .cpu_four_bit import build_four_bit_linear
from .formats import FourBitWeight
from .linear import DenseLinear, FourBitLinear, JoinedLinear, Linear, ReorderedLinear


class Outputs(NamedTuple):
    """Outputs of a linear whose inputs have one order; q, k and v, or gate and up, may have several."""

    num_outputs: int
    input_order: torch.Tensor | None  # int64 [in_features]; None: as they are


def build_linear(
    weight: torch.Tensor | FourBitWeight,
    bias: torch.Tensor | None,
    parts: Sequence[Outputs],
    *,
    output_order: torch.Tensor | None,
    dtype: torch.dtype,
) -> Linear:
    """Return the linear of `parts` one after another, its outputs in `output_order` (int64 [out_features]) if given.

    `output_order` moves no output from one part to another.
    """
    if isinstance(weight, torch.Tensor):
        order = None if output_order is None else output_order.to(weight.device)
        return DenseLinear(weight if order is None else weight[order], _rows_of(bias, order))
    order = None if output_order is None else output_order.to(weight.codes.device)
    weight, bias = _rows(weight, order), _rows_of(bias, order)
    if all(_same_order(part.input_order, parts[0].input_order) for part in parts):
        return _sorted_linear(weight, bias, parts[0].input_order, dtype)
    linears, start = [], 0
    for part in parts:
        rows = torch.arange(start, start + part.num_outputs, device=weight.codes.device)
        linears.append(_sorted_linear(_rows(weight, rows), _rows_of(bias, rows), part.input_order, dtype))
        start += part.num_outputs
    return JoinedLinear(linears)


def _sorted_linear(
    weight: FourBitWeight, bias: torch.Tensor | None, order: torch.Tensor | None, dtype: torch.dtype
) -> Linear:
    zeros, scales = weight.zeros.to(dtype), weight.scales.to(dtype)
    if order is None:
        return _four_bit_linear(weight.codes, zeros, scales, bias)
    order = order.to(weight.codes.device)
    return ReorderedLinear(order.to(torch.int32), _four_bit_linear(weight.codes[:, order], zeros, scales, bias))


def _four_bit_linear(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Linear:
    if codes.device.type == "cpu":
        return build_four_bit_linear(codes, zeros, scales, bias)
    return FourBitLinear(layout.pack_rows(codes), zeros, scales, bias)


def _rows(weight: FourBitWeight, rows: torch.Tensor | None) -> FourBitWeight:
    if rows is None:
        return weight
    return FourBitWeight(codes=weight.codes[rows], zeros=weight.zeros[rows], scales=weight.scales[rows])


def _rows_of(bias: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    return bias if bias is None or rows is None else bias[rows]


def _same_order(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
