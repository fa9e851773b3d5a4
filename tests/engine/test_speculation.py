"""Guessing ahead: what is guessed, when it is done, and that the output is the one without it, bit for bit."""

import asyncio
import random
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_runs import chunks_of, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.engine.loop import AsyncEngine
from lmdserve.engine.ngram import MAX_MATCH, MIN_MATCH, NgramIndex
from lmdserve.engine.sequence import Sequence as LiveSequence
from lmdserve.engine.sequence import new_sequence
from lmdserve.engine.speculation import FORGETTING, MAX_SEQUENCES, NgramProposer

INFO = EngineInfo(vocab_size=1000, session_len=100_000, eos_token_ids=frozenset())


def _sequence(prompt: Sequence[int], **sampling: Any) -> LiveSequence:
    request = Request(uid="a", prompt_token_ids=prompt, sampling=SamplingParams(**({"max_tokens": 9999} | sampling)))
    return new_sequence(request, info=INFO, rope_base_for=lambda n: 1e4)


def _continuation(tokens: Sequence[int], count: int) -> tuple[int, ...]:
    index = NgramIndex(array("q", tokens))
    index.extend(len(tokens))
    return index.continuation(count)


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([], ()),
        ([1], ()),
        ([1, 2], ()),
        ([1, 2, 3, 9, 2, 4], ()),
        ([1, 2, 3, 4, 5, 1, 2], (3, 4, 5)),
        ([1, 2, 3, 4, 1, 2, 5, 6, 1, 2], (5, 6, 1)),  # of two places the later
        ([7, 1, 2, 3, 4, 8, 1, 2, 5, 6, 7, 1, 2], (3, 4, 8)),  # of two places the longer match
        ([1, 2, 1, 2], (1, 2, 1)),  # a loop goes on
        ([3, 3, 3], (3, 3, 3)),
    ],
    ids=str,
)
def test_the_guess_is_what_followed_the_best_match(tokens: list[int], guess: tuple[int, ...]) -> None:
    assert _continuation(tokens, 3) == guess


@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=24), cut=st.integers(0, 24))
def test_the_index_grows_as_if_it_had_been_built_at_once(tokens: list[int], cut: int) -> None:
    """Against a search of all places; few enough that no candidate is left out."""
    index = NgramIndex(array("q", tokens))
    for num_tokens in (min(cut, len(tokens)), len(tokens)):
        index.extend(num_tokens)
    ends = [end for end in range(MIN_MATCH, len(tokens)) if tokens[end - MIN_MATCH : end] == tokens[-MIN_MATCH:]][-8:]

    def match_len(end: int) -> int:
        lengths = range(MIN_MATCH, min(MAX_MATCH, end) + 1)
        return max(length for length in lengths if tokens[end - length : end] == tokens[-length:])

    if not ends:
        assert index.continuation(1) == ()
        return
    best = max(ends, key=lambda end: (match_len(end), end))
    assert index.continuation(1) == (tokens[best],)


def _extend(proposer: NgramProposer, sequence: LiveSequence, tokens: Sequence[int]) -> list[bool]:
    """Let tokens come one a step; return at which steps the proposer would have guessed."""
    wishes = []
    for token_id in tokens:
        sequence.token_ids.append(token_id)
        wishes.append(proposer.wants_to_draft([sequence]))
        proposer.note_step(1, 0, 0.01)
    return wishes


def test_it_begins_once_the_text_repeats_itself_and_ends_when_it_does_not() -> None:
    rng = random.Random(0)
    proposer, sequence = NgramProposer(4), _sequence([1, 2])
    assert not any(_extend(proposer, sequence, [rng.randrange(1000) for _ in range(200)]))
    loop = [5, 6, 7, 8, 9, 10]
    wishes = _extend(proposer, sequence, loop * 10)
    assert True in wishes[:36]
    assert all(wishes[36:])
    assert proposer.propose(sequence) == (5, 6, 7, 8)
    wishes = _extend(proposer, sequence, [rng.randrange(1000) for _ in range(60)])
    assert not any(wishes[20:])
    assert proposer.propose(sequence) == ()


def test_guesses_that_cost_too_much_end_and_are_tried_again_much_later() -> None:
    proposer, sequence = NgramProposer(4), _sequence([1, 2, 3] * 20)
    assert _extend(proposer, sequence, [1, 2, 3] * 20)[-1]
    proposer.note_step(1, 4, 5.0)  # the first of its kind: kernels are compiled, a graph is captured
    assert proposer.wants_to_draft([sequence])
    for _ in range(60):
        proposer.note_step(1, 4, 0.01 * 6)  # each would bring up to five tokens for six times the price
    assert not proposer.wants_to_draft([sequence])
    wishes = _extend(proposer, sequence, [1, 2, 3] * 500)
    assert not any(wishes[: round(0.05 / FORGETTING)])
    assert any(wishes)


def test_large_batches_are_left_alone() -> None:
    proposer = NgramProposer(4)
    sequences = [_sequence([1, 2, 3] * 20) for _ in range(MAX_SEQUENCES + 1)]
    for sequence in sequences:
        _extend(proposer, sequence, [1, 2, 3] * 20)
    assert proposer.wants_to_draft(sequences[:-1])
    assert not proposer.wants_to_draft(sequences)


def test_one_sequence_that_repeats_itself_does_not_make_many_others_wait() -> None:
    proposer = NgramProposer(4)
    looping = _sequence([1, 2, 3] * 20)
    _extend(proposer, looping, [1, 2, 3] * 20)
    others = [_sequence([100 + n, 200 + n]) for n in range(11)]
    assert proposer.wants_to_draft([looping])
    assert proposer.wants_to_draft([looping, *others[:2]])
    assert not proposer.wants_to_draft([looping, *others])


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"logit_bias": {1: 1.0}},
        {"min_tokens": 500},
    ],
    ids=str,
)  # fmt: skip
def test_requests_whose_tokens_depend_on_counts_are_left_alone(sampling: dict[str, Any]) -> None:
    proposer, sequence = NgramProposer(4), _sequence([1, 2, 3] * 20, **sampling)
    assert not any(_extend(proposer, sequence, [1, 2, 3] * 40))
    assert proposer.propose(sequence) == ()


def test_a_long_prompt_is_taken_in_little_by_little() -> None:
    proposer, sequence = NgramProposer(4), _sequence([1, 2, 3] * 5000)
    sequence.token_ids.append(1)
    for _ in range(4):
        assert sequence.guess_record is None or sequence.guess_record.guess == ()
        proposer.wants_to_draft([sequence])
    assert sequence.guess_record.guess == (2, 3, 1, 2)


class Guesses:
    """A proposer that always guesses: what really comes up to a random place, nonsense from there on, or nonsense."""

    def __init__(self, expected: dict[tuple[int, ...], list[int]], rng: random.Random) -> None:
        self._expected = expected
        self._rng = rng

    def wants_to_draft(self, sequences: Sequence[LiveSequence]) -> bool:
        return True

    def propose(self, sequence: LiveSequence) -> tuple[int, ...]:
        count = self._rng.randrange(6)
        garbage = [self._rng.randrange(199) for _ in range(count)]
        right = self._expected.get(tuple(sequence.token_ids[: sequence.num_prompt_tokens]), [])
        first = sequence.num_output_tokens
        num_right = self._rng.randrange(6)
        return tuple([*right[first : first + num_right], *garbage][:count])

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        pass


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "num_logprobs": 2}],
    ids=["greedy", "seeded"],
)
@pytest.mark.parametrize("quant_policy", [0, 8])
async def test_the_output_is_the_one_without_guesses(run_tiny_engine: Any, sampling: Any, quant_policy: int) -> None:
    """Also with a pool so small that sequences give way, and with a prefix cache that must not hold wrong guesses."""
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 199) for _ in range(rng.choice([1, 7, 8, 20]))] for _ in range(12)]

    async def run(engine: AsyncEngine, index: int) -> tuple[list[int], list[Any]]:
        params = SamplingParams(max_tokens=30, ignore_eos=index % 2 == 0, seed=index, **sampling)
        request = Request(uid=f"r{index}", prompt_token_ids=prompts[index], sampling=params)
        chunks = await chunks_of(engine, request)
        tokens = [token_id for chunk in chunks for token_id in chunk.token_ids]
        return tokens, [record for chunk in chunks for record in chunk.logprobs or ()]

    async def run_all(engine: AsyncEngine) -> list[tuple[list[int], list[Any]]]:
        return await asyncio.gather(*(run(engine, index) for index in range(len(prompts))))

    async with run_tiny_engine(quant_policy=quant_policy) as engine:
        plain = await run_all(engine)
    expected = {tuple(prompt): tokens for prompt, (tokens, _) in zip(prompts, plain, strict=True)}
    async with run_tiny_engine(quant_policy=quant_policy, num_blocks=30, session_len=120) as engine:
        engine._scheduler._proposer = Guesses(expected, rng)
        assert await run_all(engine) == plain
        assert await run_all(engine) == plain, "from the prefix cache"
        stats = engine.stats()
    assert 100 < stats.accepted_tokens_total < stats.drafted_tokens_total
    assert stats.preemptions_total > 0


async def test_guesses_wait_for_the_steps_in_flight(build_fake_engine: Any, fake_model: Any) -> None:
    """Also where steps are launched ahead, each guess continues a token that is known."""
    rng = random.Random(8)
    prompts = [[rng.randrange(60) for _ in range(rng.randint(1, 20))] for _ in range(20)]
    expected = {tuple(prompt): fake_model.greedy(prompt, 25) for prompt in prompts}

    async def run(engine: AsyncEngine, index: int) -> list[int]:
        await asyncio.sleep(rng.random() * 0.05)
        params = SamplingParams(temperature=0.0, max_tokens=25)
        request = Request(uid=f"r{index}", prompt_token_ids=prompts[index], sampling=params)
        return await tokens_of(engine, request)

    engine = build_fake_engine(num_blocks=40)
    engine._scheduler._proposer = Guesses(expected, rng)
    await engine.start()
    outputs = await asyncio.gather(*(run(engine, index) for index in range(len(prompts))))
    await engine.stop(5.0)
    assert outputs == [expected[tuple(prompt)] for prompt in prompts]
    engine._scheduler.check()
    assert engine.stats().accepted_tokens_total > 0


@pytest.fixture(scope="module")
def looping_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose next token follows from the last one alone, so that greedy text soon is a loop."""
    folder = tmp_path_factory.mktemp("looping")
    shutil.copy(tiny_checkpoint / "config.json", folder)
    weights = load_file(tiny_checkpoint / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
            weight.zero_()
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("max_batch_size", [1, 40])
async def test_a_text_that_repeats_itself_takes_fewer_steps(
    run_tiny_engine: Any, looping_checkpoint: Path, max_batch_size: int
) -> None:
    """Also where one sequence is the whole batch: its guesses found no row to be computed in, and nobody was told."""
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    request = Request(uid="a", prompt_token_ids=[5], sampling=params)
    tokens, steps = {}, {}
    for speculate in ("off", "ngram"):
        async with run_tiny_engine(
            model=str(looping_checkpoint), speculate=speculate, max_batch_size=max_batch_size
        ) as engine:
            tokens[speculate] = await tokens_of(engine, request)
            stats = engine.stats()
        steps[speculate] = stats.steps_total
    assert tokens["ngram"] == tokens["off"]
    assert stats.accepted_tokens_total > 0
    assert (steps["off"], steps["ngram"]) == (150, 150 - stats.accepted_tokens_total)
