"""Linear layers of the fused decoder: products that write where they are told, or add to what is there.

Owns the choice between our 4-bit kernels, cuBLAS and the fixed-order product of deterministic steps for one weight; the
kernels themselves choose their tiles. x is [num_rows, in_features] in the compute type everywhere. With `deterministic`
a row of the result depends on the same row of x alone, bit for bit.
"""

from typing import Protocol

import torch

from lmdserve.kernels.dense import dense_add, dense_matmul
from lmdserve.kernels.reference import w4a16_weight
from lmdserve.kernels.swiglu import swiglu
from lmdserve.kernels.w4a16 import w4a16_add, w4a16_matmul, w4a16_swiglu
from lmdserve.kernels.w4a16_tiles import PackedWeight
from lmdserve.kernels.w4a16_workspace import Workspace
from lmdserve.kernels.w8a16 import quantize_rows, w8a16_matmul, w8a16_scratch

from .linear import FourBitLinear
from .step_buffers import MOST_ROWS_TO_ACCUMULATE

# Gate and up of 16-bit models are a temporary of this many rows at a time: 117 MB for InternLM2.5-7B.
_MOST_ROWS_OF_GATE_UP = 2048
# The 8-bit product's smallest tile: one configuration for every row.
_DETERMINISTIC_HEAD_ROWS = 8


class Head(Protocol):
    """A weight W [out_features, in_features], with a bias b or none."""

    in_features: int
    out_features: int

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """Write x W^T + b to `out`, [num_rows, out_features], in the compute type or float32."""


class FusedLinear(Head, Protocol):
    """A linear of a layer."""

    def accumulates(self, num_rows: int) -> bool:
        """Say whether `add` to a cleared buffer beats `store` for this many rows."""

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        """Add x W^T + b to `accumulator`, float32 [num_rows, out_features]."""

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """Write silu(gate) * up to `out`, [num_rows, out_features / 2]; gates are the first half of the outputs."""


class PackedLinear:
    """4-bit weights in the order that the tensor cores want."""

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None, workspace: Workspace) -> None:
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self._weight = weight
        self._bias = bias
        self._workspace = workspace

    def accumulates(self, num_rows: int) -> bool:
        """Few rows are split over the inputs, and the parts are cheapest to join by adding."""
        return num_rows <= MOST_ROWS_TO_ACCUMULATE

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear; `out` has the compute type."""
        w4a16_matmul(x, self._weight, out, self._workspace, bias=self._bias, deterministic=deterministic)

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        w4a16_add(x, self._weight, accumulator, self._workspace, bias=self._bias, deterministic=deterministic)

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        w4a16_swiglu(x, self._weight, out, self._workspace, bias=self._bias, deterministic=deterministic)


class CublasLinear:
    """16-bit weights as they are: cuBLAS, which also adds to float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._transposed = weight.t()
        self._bias = bias

    def accumulates(self, num_rows: int) -> bool:
        """Storing is one launch either way."""
        return False

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        if deterministic:
            dense_matmul(x, self._weight, out)
        elif out.dtype == x.dtype:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.mm(x, self._transposed, out_dtype=out.dtype, out=out)
        if self._bias is not None:
            out.add_(self._bias)

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        if deterministic:
            dense_add(x, self._weight, accumulator)
        else:
            torch.addmm(accumulator, x, self._transposed, out_dtype=torch.float32, out=accumulator)
        if self._bias is not None:
            accumulator.add_(self._bias)

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        limit = _MOST_ROWS_OF_GATE_UP
        for rows, out_rows in zip(torch.split(x, limit), torch.split(out, limit), strict=True):
            gate_up = rows.new_empty(rows.shape[0], self.out_features)
            self.store(rows, gate_up, deterministic=deterministic)
            swiglu(gate_up, out_rows)


class UnpackedLinear:
    """A 4-bit weight whose shape the packed kernels do not take: dequantized for each product, and dropped."""

    def __init__(self, linear: FourBitLinear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._linear = linear

    def accumulates(self, num_rows: int) -> bool:
        """As CublasLinear."""
        return False

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        self._dequantized(x.dtype).store(x, out, deterministic=deterministic)

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        self._dequantized(x.dtype).add(x, accumulator, deterministic=deterministic)

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        self._dequantized(x.dtype).swiglu(x, out, deterministic=deterministic)

    def _dequantized(self, dtype: torch.dtype) -> CublasLinear:
        linear = self._linear
        return CublasLinear(w4a16_weight(linear.codes, linear.zeros, linear.scales, dtype), linear.bias)


class Int8Head:
    """The output head in 8 bits, quantized at load (kernels/w8a16.py)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = quantize_rows(weight)
        self._scratch = w8a16_scratch(self.in_features, weight.dtype, weight.device)

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See Head; `out` is float32. Deterministic rows go through the product of few rows, a tile at a time."""
        limit = _DETERMINISTIC_HEAD_ROWS if deterministic else max(1, len(x))
        for rows, out_rows in zip(torch.split(x, limit), torch.split(out, limit), strict=True):
            w8a16_matmul(rows, self._weight, out_rows, self._scratch)
