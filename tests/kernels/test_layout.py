"""4-bit layouts against words that reference packers wrote, and round trips over all sizes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_words import fp16, read_formats, words

from lmdserve.kernels import layout


@pytest.fixture
def formats() -> dict[str, Any]:
    return read_formats()


def test_awq_packing_writes_the_reference_words(formats: dict[str, Any]) -> None:
    awq = formats["awq_gemm"]
    codes = torch.tensor(awq["int_weights[out][in]"]).t()
    zeros = torch.tensor(formats["zero_points_uint4[out][group]"]).t()
    assert torch.equal(layout.pack_awq(codes), words(awq["qweight_hex"]))
    assert torch.equal(layout.pack_awq(zeros), words(awq["qzeros_hex"]))


def test_awq_unpacking_reads_the_reference_words(formats: dict[str, Any]) -> None:
    awq = formats["awq_gemm"]
    assert layout.unpack_awq(words(awq["qweight_hex"])).t().tolist() == awq["int_weights[out][in]"]
    assert layout.unpack_awq(words(awq["qzeros_hex"])).t().tolist() == formats["zero_points_uint4[out][group]"]


def test_awq_dequantizes_to_the_reference_numbers(formats: dict[str, Any]) -> None:
    awq = formats["awq_gemm"]
    weight = layout.dequantize_awq(
        words(awq["qweight_hex"]), words(awq["qzeros_hex"]), fp16(awq["scales_fp16_hex"]), torch.float32
    )
    assert weight.tolist() == awq["dequantized[out][in]"]


def test_without_zero_points_the_zero_is_eight() -> None:
    qweight = layout.pack_awq(torch.arange(16).repeat(4, 1).t().contiguous().repeat(1, 2))  # [16, 8]: input i holds i
    scales = torch.full((2, 8), 0.5)
    weight = layout.dequantize_awq(qweight, None, scales, torch.float32)
    assert weight.tolist() == [[(code - 8) * 0.5 for code in range(16)]] * 8


@given(rows=st.integers(1, 9), words_per_row=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_awq_round_trip(rows: int, words_per_row: int, seed: int) -> None:
    values = torch.randint(16, (rows, words_per_row * 8), generator=torch.Generator().manual_seed(seed))
    packed = layout.pack_awq(values)
    assert packed.shape == (rows, words_per_row)
    assert torch.equal(layout.unpack_awq(packed).long(), values)


@given(shape=st.lists(st.integers(1, 5), max_size=2), half=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_row_round_trip(shape: list[int], half: int, seed: int) -> None:
    values = torch.randint(16, (*shape, half * 2), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = layout.pack_rows(values)
    assert packed.shape == (*shape, half)
    out = torch.full(values.shape, float("nan"))
    assert torch.equal(layout.unpack_rows(packed, out), values.float())


def test_row_order_is_low_nibbles_first() -> None:
    assert layout.pack_rows(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [0x31, 0x42]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="12 columns"):
        layout.pack_awq(torch.zeros(2, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="row of 3 values"):
        layout.pack_rows(torch.zeros(2, 3, dtype=torch.uint8))
