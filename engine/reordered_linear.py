"""Linears of the fused decoder for weights quantized in the order of activations (`input_order.py`).

Owns the gathering of activations and where they are gathered to; the products are `fused_linear.py`'s. Both classes are
FusedLinears. One scratch serves all of a model: a product is done with it before the next one gathers.
"""

from collections.abc import Iterator, Sequence

import torch

from lmdserve.kernels.gather_columns import gather_columns
from lmdserve.kernels.swiglu import swiglu

from .fused_linear import FusedLinear
from .memory_sizes import GATHERED_ROWS, JOINED_ROWS


def gather_scratch(num_inputs: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the memory that activations are gathered to, for linears of up to `num_inputs` inputs."""
    return torch.empty(GATHERED_ROWS * num_inputs, dtype=dtype, device=device)


class GatheredLinear:
    """A linear whose weight has its inputs in another order: the rows' values are brought into it first."""

    def __init__(self, linear: FusedLinear, order: torch.Tensor, scratch: torch.Tensor) -> None:
        """order int32 [in_features]: input i of `linear` is input order[i] of this one; scratch of `gather_scratch`."""
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = linear
        self.order = order
        self._gathered = scratch[: GATHERED_ROWS * linear.in_features].view(GATHERED_ROWS, linear.in_features)

    def accumulates(self, num_rows: int) -> bool:
        """As the product does."""
        return self.linear.accumulates(num_rows)

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        for gathered, out_rows in self._pieces(x, out):
            self.linear.store(gathered, out_rows, deterministic=deterministic)

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        for gathered, out_rows in self._pieces(x, accumulator):
            self.linear.add(gathered, out_rows, deterministic=deterministic)

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        for gathered, out_rows in self._pieces(x, out):
            self.linear.swiglu(gathered, out_rows, deterministic=deterministic)

    def _pieces(self, x: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(x), GATHERED_ROWS):
            rows = x[start : start + GATHERED_ROWS]
            gathered = self._gathered[: len(rows)]
            gather_columns(rows, self.order, gathered)
            yield gathered, out[start : start + len(rows)]


class JoinedLinear:
    """Linears of the same inputs, their outputs one after another: q, k and v whose weights differ in their order."""

    def __init__(self, linears: Sequence[FusedLinear]) -> None:
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self._linears = linears

    def accumulates(self, num_rows: int) -> bool:
        """As the products do."""
        return all(linear.accumulates(num_rows) for linear in self._linears)

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        for linear, columns in zip(self._linears, self._columns(out), strict=True):
            linear.store(x, columns, deterministic=deterministic)

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear."""
        for linear, columns in zip(self._linears, self._columns(accumulator), strict=True):
            linear.add(x, columns, deterministic=deterministic)

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        """See FusedLinear; gate and up are a temporary of few rows at a time."""
        for rows, out_rows in zip(torch.split(x, JOINED_ROWS), torch.split(out, JOINED_ROWS), strict=True):
            gate_up = rows.new_empty(rows.shape[0], self.out_features)
            self.store(rows, gate_up, deterministic=deterministic)
            swiglu(gate_up, out_rows)

    def _columns(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(out, [linear.out_features for linear in self._linears], 1)
