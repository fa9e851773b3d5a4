"""The two searches of AWQ as functions of tensors: the scale of each input channel, and the range of each group.

Activation-aware Weight Quantization (Lin et al., https://arxiv.org/abs/2306.00978). Multiplying a channel's weights and
dividing its inputs by a scale changes nothing before rounding; after it, a channel that was scaled up is rounded more
finely within its group. Which channels deserve it is read off the mean magnitude of their inputs, how much is searched:
scale = magnitude ** ratio, or, where the weights are weighed too, magnitude ** ratio / weight ** (1 - ratio).
"""

from collections.abc import Callable, Iterator

import torch

from .rounding import Rounding, full_range, grid_of, round_to_grid, rounded_in_place

_NUM_RATIOS = 20
_SMALLEST_SCALE = 1e-4
_SMALLEST_MAGNITUDE = 1e-6
# What both ends of a group's range are multiplied by, each a candidate: 1, 0.95 .. 0.5.
_CLIPS = tuple(1 - step / 20 for step in range(11))
# By how much of the full range each end of the best one then moves alone. It took 14 % off the demo model's divergence,
# and 2.7 % off that of a model of prose, where all combinations of nine clips for both ends took 3.3 %.
_MOVES = tuple(move for step in (0.05, -0.05, 0.1, -0.1) for move in ((step, 0.0), (0.0, step)))
_CHUNK_WEIGHTS = 2**26  # of a weight in the search of ranges, which takes six copies of a chunk in float32

ErrorOf = Callable[[torch.Tensor], torch.Tensor]
Share = Callable[[torch.Tensor], torch.Tensor]


def search_scale(
    weight: torch.Tensor,
    magnitude: torch.Tensor,
    rounding: Rounding,
    error_of: ErrorOf,
    *,
    share: Share | None = None,
    expand: Share | None = None,
) -> torch.Tensor:
    """Return the scale of each input channel, float32 [in_features], whose rounded weight has the least error.

    weight float32 [out_features, in_features]; magnitude float32 [in_features], the mean of the inputs' magnitudes;
    `error_of` takes a rounded weight, already divided by its scale, and returns the error of what it computes (a
    scalar tensor). Channels that must have one scale are told by `share`, which takes a value for each channel to one
    for each scale, and `expand`, which takes it back; the scales returned are then as `share` returns them. A scale of
    1 for all channels is among the candidates, so that on the sample nothing is worse than without a scale.
    """
    share, expand = share or _as_it_is, expand or _as_it_is
    best = torch.ones_like(share(magnitude))
    best_error = error_of(_rounded(weight, expand(best), rounding))
    for scale in _candidates(share(_relative_size(weight, rounding)), share(magnitude)):
        error = error_of(_rounded(weight, expand(scale), rounding))
        is_better = error < best_error  # stays on the device: nothing waits for a candidate
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, scale, best)
    return best


def search_range(weight: torch.Tensor, products: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each group of each row the range whose rounding has the least error, float32 [out_features, groups].

    weight float32 [out_features, in_features]; products float32 [groups, group_size, group_size], inputs^T inputs of
    each group: the squared error of a row's part of the output over all inputs is d^T products d, d what rounding does
    to the row. Both ends of the range shrink together, then each moves a little alone.
    """
    chunk_rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    parts = [_search_rows(rounding.grouped(rows), products, rounding) for rows in torch.split(weight, chunk_rows)]
    lows, highs = zip(*parts, strict=True)
    return torch.cat(lows), torch.cat(highs)


def _candidates(size: torch.Tensor, magnitude: torch.Tensor) -> Iterator[torch.Tensor]:
    size, magnitude = size.clamp(min=_SMALLEST_MAGNITUDE), magnitude.clamp(min=_SMALLEST_MAGNITUDE)
    for step in range(_NUM_RATIOS + 1):
        ratio = step / _NUM_RATIOS
        for scale in (magnitude**ratio, magnitude**ratio / size ** (1 - ratio)):
            scale = scale.clamp(min=_SMALLEST_SCALE)
            yield scale / (scale.max() * scale.min()).sqrt()


def _relative_size(weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Return each channel's mean magnitude of weights, relative to the largest of their groups; [in_features]."""
    sizes = rounding.grouped(weight).abs()
    largest = sizes.amax(-1, keepdim=True).clamp_(min=_SMALLEST_MAGNITUDE)
    return sizes.div_(largest).mean(0).flatten()


def _rounded(weight: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    return rounded_in_place(rounding.grouped(weight * scale), rounding).flatten(1).div_(scale)


def _search_rows(
    grouped: torch.Tensor, products: torch.Tensor, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = full_range(grouped)
    best_error = torch.full_like(low, torch.inf)
    best_low, best_high = low, high

    def attempt(new_low: torch.Tensor, new_high: torch.Tensor) -> None:
        nonlocal best_error, best_low, best_high
        error = _error_of_range(grouped, new_low, new_high, products, rounding)
        is_better = error < best_error
        best_low = torch.where(is_better, new_low, best_low)
        best_high = torch.where(is_better, new_high, best_high)
        best_error = torch.minimum(error, best_error)

    for clip in _CLIPS:
        attempt(low * clip, high * clip)
    clipped_low, clipped_high = best_low, best_high
    for move_low, move_high in () if rounding.symmetric else _MOVES:  # one end alone decides about a symmetric grid
        attempt(torch.maximum(clipped_low + low * move_low, low), torch.minimum(clipped_high + high * move_high, high))
    return best_low, best_high


def _error_of_range(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, products: torch.Tensor, rounding: Rounding
) -> torch.Tensor:
    zeros, scales = grid_of(low, high, rounding)
    codes = round_to_grid(grouped, zeros, scales)
    lost = codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(grouped).transpose(0, 1)
    return torch.bmm(lost, products).mul_(lost).sum(-1).t()


def _as_it_is(values: torch.Tensor) -> torch.Tensor:
    return values
