"""AWQ's searches against the same searches written as loops over explicit inputs."""

import pytest
import torch
from reference_words import read_formats

from lmdserve.engine.quantize.rounding import Rounding, full_range, round_weight
from lmdserve.engine.quantize.search import search_range, search_scale

GROUP = 8
ROUNDINGS = [
    Rounding(GROUP, symmetric, dtype) for symmetric in (False, True) for dtype in (torch.float16, torch.bfloat16)
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def nearest(value: float) -> int:
    return int(torch.tensor(value).round())


def rounded_by_hand(row: list[float], low: float, high: float, rounding: Rounding) -> list[float]:
    """Round one group, as the format's definition says: whole zero point in 0..15, scale as it is stored."""
    step = max(-low / 8, high / 7) if rounding.symmetric else (high - low) / 15
    scale = float(torch.tensor(step).to(rounding.scale_dtype)) or 1.0
    zero = 8 if rounding.symmetric else min(15, max(0, nearest(-low / scale)))
    return [(min(15, max(0, nearest(value / scale) + zero)) - zero) * scale for value in row]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_rounding_is_the_formats_definition(rounding: Rounding) -> None:
    weight = torch.randn(5, 3 * GROUP) * torch.tensor([1e-3, 1, 40, 0, 1]).unsqueeze(1)
    weight[4] = weight[4].abs() + 0.5  # a range without 0 in it
    low, high = full_range(rounding.grouped(weight))
    actual = round_weight(weight, low, high, rounding)
    assert actual.codes.max() <= 15
    assert actual.zeros.max() <= 15
    for row, values in enumerate(weight.view(5, 3, GROUP).tolist()):
        for group, part in enumerate(values):
            expected = rounded_by_hand(part, min(0.0, *part), max(0.0, *part), rounding)
            found = actual.dequantized().view(5, 3, GROUP)[row, group]
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_rounding_to_nearest_is_autoawqs() -> None:
    """AutoAWQ's packer on the same weights: its zero points and scales, and its codes but for one tie."""
    vectors = read_formats()
    weight = torch.tensor(vectors["W"])
    rounding = Rounding(8, False, torch.float16)
    actual = round_weight(weight, *full_range(rounding.grouped(weight)), rounding)
    assert actual.zeros.tolist() == vectors["zero_points_uint4[out][group]"]
    scales = [[int(scale, 16) for scale in row] for row in vectors["asym_scales_fp16_hex[out][group]"]]
    assert actual.scales.view(torch.int16).tolist() == scales
    different = actual.codes.int() - torch.tensor(vectors["awq_gemm"]["int_weights[out][in]"])
    assert different.abs().sum() <= 1
    lost = torch.tensor(vectors["awq_gemm"]["dequantized[out][in]"]) - weight
    assert (actual.dequantized() - weight).norm() <= lost.norm() + 1e-6


@pytest.mark.parametrize("rounding", ROUNDINGS[::2], ids=str)
def test_the_range_found_is_the_best_of_those_tried(rounding: Rounding) -> None:
    weight = torch.randn(20, 2 * GROUP).pow(3)  # long tails, which clipping is for
    inputs = torch.randn(50, 2 * GROUP) * torch.logspace(-1, 1, 2 * GROUP)
    grouped_inputs = inputs.view(50, 2, GROUP).transpose(0, 1)
    low, high = search_range(weight, grouped_inputs.transpose(1, 2) @ grouped_inputs, rounding)
    num_clipped = num_moved = 0
    for row in range(20):
        for group in range(2):
            part = weight.view(20, 2, GROUP)[row, group]
            least, largest = min(0.0, float(part.min())), max(0.0, float(part.max()))

            def error_of(low: float, high: float, part: torch.Tensor = part, group: int = group) -> float:
                rounded = torch.tensor(rounded_by_hand(part.tolist(), low, high, rounding))
                return float((grouped_inputs[group] @ (rounded - part)).square().sum())

            errors = {clip: error_of(least * clip, largest * clip) for clip in [1 - step / 20 for step in range(11)]}
            clip = min(errors, key=errors.__getitem__)
            moved = [(min(1.0, clip + step), clip) for step in (-0.1, -0.05, 0.05, 0.1)]
            best = min(errors[clip], *(error_of(least * a, largest * b) for x in moved for a, b in (x, x[::-1])))
            found = error_of(float(low[row, group]), float(high[row, group]))
            assert found == pytest.approx(best, rel=1e-3)
            num_clipped += errors[1.0] > errors[clip]
            num_moved += errors[clip] > best
    assert num_clipped > 4, "the case must be one where clipping matters"
    assert rounding.symmetric or num_moved > 4, "and one where the ends want to be clipped differently"


def test_a_scale_saves_the_channels_that_matter() -> None:
    """One channel in sixteen has inputs a hundred times as large: that is the case AWQ was made for."""
    rounding = Rounding(16, False, torch.float16)
    weight, inputs = torch.randn(64, 32), torch.randn(200, 32)
    inputs[:, ::16] *= 100

    def error_of(rounded: torch.Tensor) -> torch.Tensor:
        return (inputs @ (rounded - weight).t()).square().mean()

    scale = search_scale(weight, inputs.abs().mean(0), rounding, error_of)
    plain = round_weight(weight, *full_range(rounding.grouped(weight)), rounding).dequantized()
    scaled = weight * scale
    rounded = round_weight(scaled, *full_range(rounding.grouped(scaled)), rounding).dequantized() / scale
    assert scale[::16].min() > 2 * scale.median()
    assert error_of(rounded) < 0.25 * error_of(plain)


def test_no_scale_is_found_where_none_helps() -> None:
    def error_of(rounded: torch.Tensor) -> torch.Tensor:
        return torch.tensor(1.0)

    scale = search_scale(torch.randn(8, 16), torch.rand(16), Rounding(8, False, torch.float16), error_of)
    assert scale.tolist() == [1.0] * 16


def test_a_scale_that_gives_nan_is_never_taken() -> None:
    weight = torch.randn(8, 16)

    def error_of(rounded: torch.Tensor) -> torch.Tensor:
        is_plain = torch.equal(
            rounded, round_weight(weight, *full_range(ROUNDINGS[0].grouped(weight)), ROUNDINGS[0]).dequantized()
        )
        return torch.tensor(1.0 if is_plain else torch.nan)

    assert search_scale(weight, torch.rand(16), ROUNDINGS[0], error_of).tolist() == [1.0] * 16


def test_channels_that_share_a_scale_get_one() -> None:
    weight, inputs = torch.randn(8, 16), torch.randn(100, 16) * torch.logspace(-1, 1, 16)

    def expand(values: torch.Tensor) -> torch.Tensor:
        return values.repeat(2)

    scale = search_scale(
        weight,
        inputs.abs().mean(0),
        ROUNDINGS[0],
        lambda rounded: (inputs @ (rounded - weight).t()).square().mean(),
        share=lambda values: values.view(2, 8).mean(0),
        expand=expand,
    )
    assert scale.shape == (8,)
    assert scale.max() > scale.min()
