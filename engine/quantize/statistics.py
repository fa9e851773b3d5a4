"""What the search knows of a linear's inputs: seen once while the calibration text passes the layer, then summed up.

Three things: the mean magnitude of each channel, from which candidates for scales are made; the products of channels
within each group, from which the error of any rounding of that group follows without another look at the text; and a
sample of whole rows, on which blocks are computed. All sums are float32 or wider.
"""

from collections.abc import Sequence

import torch

from .architectures import LINEAR_KEYS, LinearKey


class InputStatistics:
    """One linear's inputs so far."""

    def __init__(self, in_features: int, group_size: int | None, device: torch.device) -> None:
        """`group_size` None: no products of channels are wanted."""
        self._magnitudes = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._num_rows = 0
        self._largest = torch.zeros((), device=device)
        self._sampled: list[torch.Tensor] = []
        self.products: torch.Tensor | None = None  # float32 [groups, group_size, group_size], sums over rows
        if group_size is not None:
            groups = in_features // group_size
            self.products = torch.zeros(groups, group_size, group_size, device=device)

    def add(self, rows: torch.Tensor, sampled: torch.Tensor) -> None:
        """Take in rows [num_rows, in_features], of which `sampled` (int64) are kept."""
        magnitudes = rows.abs()
        self._magnitudes += magnitudes.sum(0, dtype=torch.float32)
        self._largest = torch.maximum(self._largest, magnitudes.amax().float())
        self._num_rows += rows.shape[0]
        self._sampled.append(rows.index_select(0, sampled))
        if self.products is not None:
            grouped = rows.view(rows.shape[0], self.products.shape[0], -1).transpose(0, 1)
            self.products += _wide_product(grouped.transpose(1, 2), grouped)

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """Float32 [in_features]."""
        return (self._magnitudes / self._num_rows).float()

    @property
    def largest(self) -> float:
        """The largest magnitude seen."""
        return float(self._largest)

    @property
    def rows(self) -> torch.Tensor:
        """The sampled rows, [num_sampled, in_features]."""
        return torch.cat(self._sampled)


class LayerStatistics:
    """The statistics of a layer's four linears; the layer's observer."""

    def __init__(
        self,
        in_features: dict[LinearKey, int],
        *,
        group_size: int | None,
        sampled_positions: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        """`sampled_positions`: for each batch in turn, int64 positions among its rows."""
        self.inputs = {
            key: InputStatistics(size, _group_size(size, group_size), device) for key, size in in_features.items()
        }
        self._positions = sampled_positions
        self._batch = 0

    def __call__(self, key: LinearKey, inputs: torch.Tensor) -> None:
        """Take in one batch's inputs of one linear; a batch is over with the layer's last linear."""
        self.inputs[key].add(inputs.flatten(0, 1), self._positions[self._batch])
        if key == LINEAR_KEYS[-1]:
            self._batch += 1


def _group_size(in_features: int, group_size: int | None) -> int | None:
    size = in_features if group_size == -1 else group_size
    return None if size is None or in_features % size else size


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right, batched, in float32; of 16-bit operands on a GPU without rounding what is summed."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
