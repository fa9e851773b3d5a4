"""Linear layers as the decoder calls them: y = x W^T + b, whatever form W has in memory.

Owns the choice of matrix product. On a CPU every product goes through oneDNN, because there a row's result depends on
that row alone, for any number of rows; the default BLAS path picks its kernel, and so its rounding, by the row count.
Measured for float32 with AVX2, AVX-512 and SSE4.1 kernels, 1 and 2 threads, 33x47 up to 4096x14336 and 1 to 512 rows.
bfloat16 and float16 carry no such promise: their kernels split long inner dimensions by row count.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from lmdserve.kernels import reference

# Without oneDNN, products of one fixed number of rows keep the same promise, at up to four times the cost.
_FIXED_ROWS = 8

# The overload itself: looking it up by name costs as much as a small operation.
_onednn_linear: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise.default


def padded_row_count(num_rows: int, device: torch.device) -> int:
    """Return how many rows to carry through a step of `num_rows`: on a CPU one of few numbers, four an octave.

    oneDNN builds a program of about 1 MB for every row count that it meets and keeps 1024 of them: without steps a
    server's memory grew by 1 GB. And a lone row takes another kernel, with other rounding, so two are the least.
    """
    if device.type != "cpu" or num_rows == 0:
        return num_rows
    step = max(2, 1 << max(0, (num_rows - 1).bit_length() - 3))
    return -(-num_rows // step) * step


class Linear(Protocol):
    """A weight that can be applied: x [num_rows, in_features] -> [num_rows, out_features]."""

    in_features: int
    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b."""


class DenseLinear:
    """Plain weights in the compute type. On a CPU they are held in oneDNN's own order, and only there."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._multiply = choose_product(weight.dtype, weight.device)
        self.weight = _reorder(weight) if self._multiply is _multiply_in_onednn else weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _with_bias(self._multiply(x, self.weight), self.bias)


class SharedLinear:
    """A head tied to the embedding: the same memory serves look-ups and the product, so it is never reordered."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._multiply = choose_product(weight.dtype, weight.device)
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self.weight)


class FourBitLinear:
    """4-bit weights, dequantized for each product and dropped again: memory is what they are for.

    codes uint8 [out_features, in_features / 2] in row order; zeros and scales [out_features, groups], compute type.
    """

    def __init__(
        self, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * 2
        self._multiply = choose_product(scales.dtype, scales.device)
        self.codes = codes
        self.zeros = zeros
        self.scales = scales
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = reference.w4a16_weight(self.codes, self.zeros, self.scales, x.dtype)
        return _with_bias(self._multiply(x, weight), self.bias)


class ReorderedLinear:
    """A linear whose weight has its inputs in another order, so that scale groups are runs of neighbours."""

    def __init__(self, order: torch.Tensor, linear: Linear) -> None:
        """order int32 [in_features]: input i of `linear` is input order[i] of this one."""
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.order = order
        self.linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.index_select(1, self.order))


class JoinedLinear:
    """Linears of the same inputs, their outputs one after another."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.linears = linears

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], 1)


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def choose_product(dtype: torch.dtype, device: torch.device) -> Product:
    """Return the function that multiplies x [num_rows, in] by the transposed weight [out, in] on this device."""
    if device.type != "cpu":
        return functional.linear
    return _multiply_in_onednn if _has_onednn(dtype) else _multiply_in_fixed_tiles


def _multiply_in_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 1:  # a single row takes a matrix-vector kernel with other rounding
        return _onednn_linear(torch.cat((x, x)), weight, None, "none", [], "")[:1]
    return _onednn_linear(x, weight, None, "none", [], "")


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return reordered


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _multiply_in_fixed_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_rows = x.shape[0]
    padded = functional.pad(x, (0, 0, 0, -num_rows % _FIXED_ROWS))
    tiles = torch.chunk(padded, padded.shape[0] // _FIXED_ROWS)
    return torch.cat([functional.linear(tile, weight) for tile in tiles])[:num_rows]


def _with_bias(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product if bias is None else product.add_(bias)
