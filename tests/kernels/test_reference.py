"""The plain-torch kernels against formulas in float64, written without them."""

import math
from collections.abc import Iterator

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdserve.kernels import layout, reference
from lmdserve.kernels.attention_plan import AttentionPlan, AttentionPlanner

GENERATOR = torch.Generator().manual_seed(11)
SIZES = (1, 63, 127, 1000)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("width", [1, 64, 250])
def test_rms_norm(num_rows: int, width: int) -> None:
    x, weight = randn(num_rows, width) * 3, randn(width)
    expected = x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * weight.double()
    assert torch.allclose(reference.rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", SIZES)
def test_rope_turns_pairs_of_halves_as_complex_numbers(num_tokens: int) -> None:
    """Element i and i + d/2 are one complex number, multiplied by exp(i * position * frequency)."""
    heads, head_dim = 3, 16
    x = randn(num_tokens, heads + 1, head_dim)
    frequencies = torch.rand(1, head_dim // 2, generator=GENERATOR)
    positions = torch.randint(2000, (num_tokens,), generator=GENERATOR)
    untouched = x[:, heads:].clone()
    pairs = torch.complex(x[:, :heads, : head_dim // 2].double(), x[:, :heads, head_dim // 2 :].double())
    turned = pairs * torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * frequencies.double())[:, None]
    reference.apply_rope_(x[:, :heads], *reference.rope_tables(positions, frequencies))
    actual = torch.complex(x[:, :heads, : head_dim // 2].double(), x[:, :heads, head_dim // 2 :].double())
    assert (actual - turned).abs().max() < 2e-3  # float32 angles up to 2000 carry errors of 1e-4
    assert torch.equal(x[:, heads:], untouched)


def test_rope_frequencies_may_differ_by_token() -> None:
    x = randn(2, 1, 8)
    frequencies = torch.rand(2, 4, generator=GENERATOR)
    positions = torch.tensor([5, 9])
    together = reference.apply_rope_(x.clone(), *reference.rope_tables(positions, frequencies))
    for row in range(2):
        tables = reference.rope_tables(positions[row : row + 1], frequencies[row : row + 1])
        assert torch.equal(reference.apply_rope_(x[row : row + 1].clone(), *tables), together[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up = (randn(63, 2 * 50) * 4).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0  # exp(200) overflows float32
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(reference.swiglu(gate_up).double(), expected, rtol=tolerance, atol=tolerance)


def steps(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Return each row's ideal step, widened by what 16-bit rounding of its minimum and scale may cost."""
    smallest, largest = rows.amin(-1), rows.amax(-1)
    return (largest - smallest + smallest.abs() / 85) / (2**bits - 1) * (1 + 1 / 85)


finite_rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.sampled_from([2, 8, 64])),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(deadline=None)
@given(rows=finite_rows, bits=st.sampled_from([8, 4]))
def test_quantized_values_are_within_half_a_step(rows: np.ndarray, bits: int) -> None:
    values = torch.from_numpy(rows)
    codes, scales = reference.quantize_kv(values, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (len(rows), rows.shape[1] * bits // 8)
    restored = reference.dequantize_kv(codes, scales, bits, torch.float32)
    rounding = values.abs().amax(-1) * 1e-6 + 1e-28
    assert ((restored - values).abs().amax(-1) <= steps(values, bits) * 0.5001 + rounding).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-20, 6e4, -1e30])
def test_constant_rows_have_no_step_to_divide_by(bits: int, value: float) -> None:
    values = torch.full((3, 16), value)
    restored = reference.dequantize_kv(*reference.quantize_kv(values, bits), bits, torch.float32)
    assert torch.allclose(restored, values, rtol=2.0**-8 / (2**bits - 1), atol=0)


def test_16_bit_scales_cost_little_next_to_exact_ones() -> None:
    """Mean error of bfloat16 scales is within 5 % of float32 scales', around zero and shifted by up to 3."""
    for shift in (0.0, 1.0, 3.0):
        values = randn(2000, 64) + shift
        for bits in (8, 4):
            restored = reference.dequantize_kv(*reference.quantize_kv(values, bits), bits, torch.float32)
            smallest, largest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
            exact_step = (largest - smallest) / (2**bits - 1)
            exact = ((values - smallest) / exact_step).round() * exact_step + smallest
            assert (restored - values).abs().mean() <= 1.05 * (exact - values).abs().mean()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_a_row_depends_on_that_row_alone(bits: int) -> None:
    values = randn(100, 64)
    codes, scales = reference.quantize_kv(values, bits)
    for start, stop in ((0, 1), (3, 5), (40, 100)):
        some_codes, some_scales = reference.quantize_kv(values[start:stop], bits)
        assert torch.equal(some_codes, codes[start:stop])
        assert torch.equal(some_scales, scales[start:stop])


@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_w4a16_weight_equals_the_awq_formula(group_size: int) -> None:
    in_features, out_features = 96, 24
    codes = torch.randint(16, (in_features, out_features), generator=GENERATOR).to(torch.uint8)
    zeros = torch.randint(16, (in_features // group_size, out_features), generator=GENERATOR).to(torch.uint8)
    scales = torch.rand(in_features // group_size, out_features, generator=GENERATOR)
    weight = reference.w4a16_weight(
        layout.pack_rows(codes.t().contiguous()), zeros.t().float(), scales.t().contiguous(), torch.float32
    )
    for out in range(out_features):
        for row in range(in_features):
            group = row // group_size
            expected = (float(codes[row, out]) - float(zeros[group, out])) * float(scales[group, out])
            assert float(weight[out, row]) == pytest.approx(expected, rel=1e-6)


def naive_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_position: int, window: int | None
) -> torch.Tensor:
    """Attend one sequence in float64, one query and head at a time; keys and values [context, kv_heads, head_dim]."""
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float64)
    for token in range(num_tokens):
        position = first_position + token
        start = 0 if window is None else max(0, position - window + 1)
        for head in range(num_heads):
            k, v = (
                keys[start : position + 1, head // group].double(),
                values[start : position + 1, head // group].double(),
            )
            scores = k @ query[token, head].double() / math.sqrt(head_dim)
            out[token, head] = torch.softmax(scores, 0) @ v
    return out.flatten(1)


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2), (10, 1)]),
    head_dim=st.sampled_from([2, 16, 20]),
    block_size=st.sampled_from([1, 3, 16, 64]),
    window=st.sampled_from([None, 1, 5, 33]),
    bits=st.sampled_from([32, 8, 4]),
    seed=st.integers(0, 1000),
)
def test_paged_attention(
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int | None,
    bits: int,
    seed: int,
) -> None:
    """A mixed batch over scattered blocks full of other numbers equals attention over each sequence by itself."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    query_lens = [query_len for query_len, _ in lens]
    context_lens = [query_len + past for query_len, past in lens]
    widths = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(widths) + 3
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = [[free.pop() for _ in range(width)] for width in widths]
    kv_data = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim, generator=generator) * 1e3
    kv_scales = None
    if bits != 32:
        kv_data, kv_scales = reference.quantize_kv(kv_data, bits)

    block_tables = torch.tensor([table + [0] * (max(widths) - len(table)) for table in tables])
    query = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator)
    contexts, slots = [], []
    for table, length in zip(tables, context_lens, strict=True):
        contexts.append(torch.randn(length, 2, num_kv_heads, head_dim, generator=generator))
        slots.append(torch.tensor([table[at // block_size] * block_size + at % block_size for at in range(length)]))

    planner = AttentionPlanner(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_blocks=num_blocks,
        block_size=block_size,
        block_bytes=1 << 19,
        sliding_window=window,
        device=torch.device("cpu"),
    )

    def plan(queries: list[int]) -> AttentionPlan:
        return planner.plan(
            query_lens=queries,
            context_lens=context_lens,
            block_tables=block_tables,
            slot_ids=torch.cat(slots),
            num_output_rows=sum(queries) + 3,
        )

    append_rows = plan(context_lens).append_rows
    reference.append_kv(torch.cat(contexts).flatten(1, 2), kv_data, kv_scales, append_rows, bits)
    actual = reference.paged_attention(
        query, kv_data, kv_scales, plan(query_lens), bits=bits, softmax_scale=head_dim**-0.5
    )

    first_row = 0
    for query_len, length, context in zip(query_lens, context_lens, contexts, strict=True):
        stored = context
        if bits != 32:
            stored = reference.dequantize_kv(*reference.quantize_kv(context, bits), bits, torch.float32)
        expected = naive_attention(
            query[first_row : first_row + query_len], stored[:, 0], stored[:, 1], length - query_len, window
        )
        assert torch.allclose(actual[first_row : first_row + query_len].double(), expected, rtol=1e-4, atol=1e-5)
        first_row += query_len


def test_query_values_far_apart_do_not_overflow() -> None:
    query = torch.full((1, 1, 4), 1e4)
    kv_data = torch.zeros(2, 2, 1, 4, 4)
    kv_data[0, 1, 0, :3] = torch.tensor([[1e4], [-1e4], [0.0]]).expand(3, 4)
    kv_data[1, 1, 0, :3] = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4)
    planner = AttentionPlanner(
        num_heads=1,
        num_kv_heads=1,
        num_blocks=2,
        block_size=4,
        block_bytes=128,
        sliding_window=None,
        device=torch.device("cpu"),
    )
    plan = planner.plan(
        query_lens=[1],
        context_lens=[3],
        block_tables=torch.tensor([[1]]),
        slot_ids=torch.tensor([6]),
        num_output_rows=1,
    )
    out = reference.paged_attention(query, kv_data, None, plan, bits=32, softmax_scale=0.5)
    assert out.tolist() == [[1.0] * 4]
