"""Sampling: each parameter against transformers' processors or plain arithmetic, draws against their distribution."""

import math
import random
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmdserve.engine import sampler
from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.engine.sampler import NO_CHOICE, sample, token_logprobs, uniform
from lmdserve.engine.sequence import Sequence, new_sequence

VOCAB_SIZE = 40
EOS = 39


def _sequence(
    *, prompt: SequenceOf[int] = (1, 2, 3), output: SequenceOf[int] = (), vocab_size: int = VOCAB_SIZE, **sampling: Any
) -> Sequence:
    info = EngineInfo(vocab_size=vocab_size, session_len=10_000, eos_token_ids=frozenset({EOS}))
    params = SamplingParams(**({"max_tokens": 1000} | sampling))
    request = Request(uid="x", prompt_token_ids=prompt, sampling=params)
    sequence = new_sequence(request, info=info, rope_base_for=lambda n: 1e4)
    sequence.token_ids.extend(output)
    return sequence


def _rows(*sequences: Sequence) -> list[sampler.SampleRow]:
    return [sampler.SampleRow(sequence, sequence.num_output_tokens) for sequence in sequences]


def _logits(num_rows: int = 1, *, seed: int = 0, scale: float = 2.0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _draws(logits: torch.Tensor, count: int, **sampling: Any) -> Counter[int]:
    """Draw `count` times from one row of logits, each time with another seed."""
    sequences = [_sequence(seed=seed, vocab_size=logits.shape[-1], **sampling) for seed in range(count)]
    return Counter(s.token_id for s in sample(logits.expand(count, -1).contiguous(), sequences))


def _reference_probabilities(logits: torch.Tensor, **sampling: Any) -> numpy.ndarray[Any, Any]:
    """Return the distribution of one row after transformers' warpers, in the order SamplingParams states."""
    warpers = LogitsProcessorList()
    if sampling.get("temperature", 1.0) != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling["temperature"]))
    if sampling.get("top_k"):
        warpers.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling.get("top_p", 1.0) < 1.0:
        warpers.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling.get("min_p"):
        warpers.append(MinPLogitsWarper(sampling["min_p"]))
    probabilities: numpy.ndarray[Any, Any] = warpers(torch.zeros(1, 1), logits.clone()).double().softmax(-1)[0].numpy()
    return probabilities


def _chi_square_is_plausible(counts: Counter[int], probabilities: numpy.ndarray[Any, Any]) -> bool:
    """Compare at about four standard deviations; cells expected fewer than five times are put together."""
    total = sum(counts.values())
    cells: list[tuple[float, float]] = []
    rest_seen = rest_expected = 0.0
    for token_id, probability in enumerate(probabilities):
        expected = probability * total
        if expected < 5:
            rest_seen += counts[token_id]
            rest_expected += expected
        else:
            cells.append((counts[token_id], expected))
    if rest_expected >= 5:
        cells.append((rest_seen, rest_expected))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = max(1, len(cells) - 1)
    return statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_uniform_is_splitmix64_in_both_arguments() -> None:
    """Published outputs of SplitMix64 seeded with 0 and 1234567; the second argument is mixed in the same way."""
    assert sampler._split_mix(0) == 0xE220A8397B1DCDAF
    assert sampler._split_mix(1234567) == 6457827717110365317
    values = [uniform(seed, position) for seed in (-1, 0, 1, 2**70 + 3) for position in range(50)]
    assert len(set(values)) == 200
    assert all(0.0 <= value < 1.0 for value in values)
    assert uniform(7, 3) == uniform(7, 3)


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    for points in ([(seed, 0) for seed in range(4000)], [(5, position) for position in range(4000)]):
        values = numpy.array([uniform(seed, position) for seed, position in points])
        histogram = numpy.histogram(values, bins=20, range=(0, 1))[0]
        assert _chi_square_is_plausible(Counter(dict(enumerate(histogram))), numpy.full(20, 1 / 20))
        assert abs(numpy.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = _logits(5)
    logits[3, 7] = logits[3, 30] = 50.0
    samples = sample(logits, [_sequence(temperature=0.0) for _ in range(5)])
    assert [s.token_id for s in samples] == numpy.argmax(logits.numpy(), axis=-1).tolist()
    assert samples[3].token_id == 7


def test_nothing_to_sample_is_fine() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), []) == []


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8},
        {"temperature": 0.8, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 2.0, "top_k": 10, "top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers_warpers(sampling: dict[str, Any]) -> None:
    logits = _logits(seed=len(str(sampling)))
    probabilities = _reference_probabilities(logits, **sampling)
    counts = _draws(logits, 4000, **sampling)
    assert set(counts) <= set(numpy.flatnonzero(probabilities).tolist()), "a token outside the allowed set was drawn"
    assert _chi_square_is_plausible(counts, probabilities)


@pytest.mark.parametrize("vocab_size", [600, 5000])
@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 300, "top_p": 0.95}, {"top_k": 400}], ids=str)
def test_the_kept_set_is_right_when_it_is_larger_than_the_quick_search(
    vocab_size: int, scale: float, sampling: dict[str, Any]
) -> None:
    """Flat distributions have nuclei beyond NUCLEUS_HEAD; the set is read off the weights that survive."""
    logits = _logits(3, seed=vocab_size, scale=scale, vocab_size=vocab_size)
    weights = (logits - logits.max(-1, keepdim=True).values).exp()
    thresholds = sampler._thresholds(weights, [SamplingParams(**sampling)] * 3)
    for row in range(3):
        kept = set((weights[row] >= thresholds[row]).nonzero().flatten().tolist())
        wanted = set(numpy.flatnonzero(_reference_probabilities(logits[row : row + 1], **sampling)).tolist())
        assert len(kept ^ wanted) <= (1 if "top_p" in sampling else 0), "only the token on the edge may differ"
        assert len(kept) > sampler.NUCLEUS_HEAD or scale > 1


def test_equal_weights_at_the_cut_stay_together() -> None:
    logits = torch.full((1, VOCAB_SIZE), -10.0)
    logits[0, [3, 8, 20]] = 1.0
    assert set(_draws(logits, 300, top_k=2)) == {3, 8, 20}
    assert set(_draws(logits, 300, top_p=0.1)) == {3, 8, 20}


def test_extreme_parameters_leave_the_best_token() -> None:
    logits = _logits()
    best = int(logits.argmax())
    for sampling in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-3}, {"temperature": 1e-300}):
        assert set(_draws(logits, 50, **sampling)) == {best}, sampling


@pytest.mark.parametrize(("u", "token_id"), [(0.0, 8), (1.0 - 2.0**-53, 30)])
def test_the_ends_of_the_unit_interval_draw_kept_tokens(
    monkeypatch: pytest.MonkeyPatch, u: float, token_id: int
) -> None:
    """A draw at 0 must not take the first token of the vocabulary, whose weight is 0."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: u)
    logits = _logits(seed=2)
    logits[0, [8, 20, 30]] = torch.tensor([30.0, 31.0, 29.0])
    assert sample(logits, [_sequence(top_k=3)])[0].token_id == token_id


def test_a_limit_beyond_the_vocabulary_changes_nothing() -> None:
    logits = _logits()
    assert _draws(logits, 200, top_k=VOCAB_SIZE + 5) == _draws(logits, 200)


def test_repetition_penalty_is_the_one_of_transformers() -> None:
    logits = _logits(seed=3)
    prompt, output = [1, 2, 3, 3], [4, 5, 5]
    wanted = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([prompt + output]), logits.clone())
    sequence = _sequence(prompt=prompt, output=output, repetition_penalty=1.8)
    torch.testing.assert_close(sampler._adjusted(logits, torch.tensor([0]), _rows(sequence)), wanted)


def test_presence_and_frequency_penalties_count_output_only() -> None:
    logits = _logits(seed=4)
    sequence = _sequence(prompt=[1, 2], output=[2, 9, 9, 9], presence_penalty=0.5, frequency_penalty=-0.25)
    wanted = logits.clone()
    wanted[0, 2] += -0.5 + 0.25 * 1
    wanted[0, 9] += -0.5 + 0.25 * 3
    torch.testing.assert_close(sampler._adjusted(logits, torch.tensor([0]), _rows(sequence)), wanted)


def test_bias_comes_before_penalties_and_the_ban_after_both() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    sequence = _sequence(
        prompt=[5], output=[], repetition_penalty=2.0, logit_bias={5: 8.0, EOS: 100.0, 6: -1.0}, min_tokens=1
    )
    adjusted = sampler._adjusted(logits, torch.tensor([0]), _rows(sequence))[0]
    assert (adjusted[5], adjusted[6], adjusted[EOS]) == (4.0, -1.0, -math.inf)
    assert adjusted.isfinite().sum() == VOCAB_SIZE - 1
    assert not logits.any(), "the model's own logits stay as they were: logprobs come from them"


def test_penalties_follow_the_output_from_step_to_step() -> None:
    """What the sampler keeps between steps equals a fresh count at every step, also after several new tokens."""
    sampling = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
    kept = _sequence(prompt=[1, 2, 2], **sampling)
    logits = _logits(seed=9)
    row = torch.tensor([0])
    for new_tokens in ([], [4], [4, 5], [2], []):
        kept.token_ids.extend(new_tokens)
        fresh = _sequence(prompt=[1, 2, 2], output=kept.token_ids[3:], **sampling)
        assert torch.equal(sampler._adjusted(logits, row, _rows(kept)), sampler._adjusted(logits, row, _rows(fresh)))


def test_min_tokens_bans_every_stop_token_until_it_is_reached() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS], logits[0, 12], logits[0, 20] = 9.0, 8.0, 7.0
    fields = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": frozenset({12})}
    for output, ignore_eos, token_id in (([], False, 20), ([1], False, 20), ([1, 1], False, EOS), ([], True, EOS)):
        sequence = _sequence(output=output, ignore_eos=ignore_eos, **fields)
        assert sample(logits, [sequence])[0].token_id == token_id


def test_logprobs_are_the_models_own_whatever_the_request_changes() -> None:
    logits = _logits(3, seed=5)
    wanted = torch.from_numpy(logits.double().numpy()).log_softmax(-1)
    sequences = [
        _sequence(temperature=0.0, num_logprobs=3),
        _sequence(temperature=0.0),
        _sequence(temperature=0.3, seed=1, logit_bias={8: 50.0}, num_logprobs=0),
    ]
    first, second, third = sample(logits, sequences)
    assert second.logprob is None
    assert first.logprob is not None
    assert third.logprob is not None
    assert (first.logprob.token_id, third.logprob.token_id, third.logprob.top) == (first.token_id, 8, ())
    assert first.logprob.logprob == pytest.approx(float(wanted[0].max()), abs=1e-5)
    assert third.logprob.logprob == pytest.approx(float(wanted[2, 8]), abs=1e-5)
    best = wanted[0].topk(3)
    assert [token_id for token_id, _ in first.logprob.top] == best.indices.tolist()
    assert [logprob for _, logprob in first.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_prompt_logprobs_of_given_tokens() -> None:
    logits = _logits(2, seed=6)
    wanted = logits.double().log_softmax(-1)
    records = token_logprobs(logits, [4, 39], 2)
    assert [record.token_id for record in records] == [4, 39]
    assert [record.logprob for record in records] == pytest.approx(
        [float(wanted[0, 4]), float(wanted[1, 39])], abs=1e-5
    )
    assert [len(record.top) for record in records] == [2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"repetition_penalty": 2.0}], ids=str)
def test_a_broken_row_fails_alone(bad: float, sampling: dict[str, Any]) -> None:
    logits = _logits(3)
    whole = sample(logits, [_sequence(seed=1, **sampling) for _ in range(3)])
    broken = logits.clone()
    broken[1, 17] = bad
    samples = sample(broken, [_sequence(seed=1, **sampling) for _ in range(3)])
    assert samples[1].failure is not None
    assert "not finite" in samples[1].failure
    assert [samples[0], samples[2]] == [whole[0], whole[2]]


def test_a_request_that_bans_every_token_is_told_so() -> None:
    everything = frozenset(range(VOCAB_SIZE))
    for temperature in (0.0, 1.0):
        sequence = _sequence(temperature=temperature, min_tokens=1, stop_token_ids=everything)
        (result,) = sample(_logits(), [sequence])
        assert result.failure == NO_CHOICE


def _random_sampling(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.3]),
        "top_k": rng.choice([0, 0, 3, 300]),
        "top_p": rng.choice([1.0, 0.9, 0.3]),
        "min_p": rng.choice([0.0, 0.0, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "frequency_penalty": rng.choice([0.0, 0.3]),
        "min_tokens": rng.choice([0, 5]),
        "logit_bias": rng.choice([{}, {3: 1.5}]),
        "num_logprobs": rng.choice([None, 4]),
    }


@pytest.mark.parametrize("vocab_size", [199, 1000])
def test_a_row_does_not_depend_on_its_neighbours(vocab_size: int) -> None:
    """Every row of a mixed batch is the same, to the bit, as the row alone, first, last and in the middle."""
    rng = random.Random(vocab_size)
    logits = _logits(33, seed=8, scale=1.0, vocab_size=vocab_size)
    fields = [
        _random_sampling(rng) | {"seed": row, "output": rng.sample(range(30), rng.randrange(9))} for row in range(33)
    ]
    together = sample(logits, [_sequence(vocab_size=vocab_size, **f) for f in fields])
    backwards = sample(logits.flip(0), [_sequence(vocab_size=vocab_size, **f) for f in reversed(fields)])
    assert together == backwards[::-1]
    for row in range(33):
        assert sample(logits[row : row + 1], [_sequence(vocab_size=vocab_size, **fields[row])]) == [together[row]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), num_output=st.integers(0, 5), row_seed=st.integers(0, 1000))
def test_the_draw_is_the_inverse_cdf_at_uniform(seed: int, num_output: int, row_seed: int) -> None:
    """In plain Python: the first token at which the running sum of weights passes u times the total."""
    logits = _logits(seed=row_seed)
    (result,) = sample(logits, [_sequence(seed=seed, output=[0] * num_output)])
    weights = [math.exp(float(logit) - float(logits.max())) for logit in logits[0]]
    target = uniform(seed, num_output) * math.fsum(weights)
    running = 0.0
    passing = []
    for token_id, weight in enumerate(weights):
        running += weight
        passing += [token_id] if running > target else []
    assert result.token_id == passing[0]


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(64, VOCAB_SIZE)
    assert len({s.token_id for s in sample(logits, [_sequence() for _ in range(64)])}) > 5
