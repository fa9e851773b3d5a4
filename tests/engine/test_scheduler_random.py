"""The scheduler under random use: every invariant after every step, and each sequence's very own tokens at the end."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_bench import Bench, Guesser, expected_output

from lmdserve.engine.api import FinishReason, InvalidRequestError
from lmdserve.engine.sequence import Sequence
from lmdserve.engine.step import ChunkResult


class RandomUse(RuleBasedStateMachine):
    """Requests come, go and are aborted at any moment; each that is not aborted ends with the very tokens it should."""

    @initialize(
        num_blocks=st.integers(16, 24),
        block_size=st.integers(1, 4),
        max_batch_size=st.integers(1, 5),
        max_prefill_tokens=st.integers(1, 12),
        enable_prefix_caching=st.booleans(),
        depth=st.integers(1, 2),
        guesses=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def build(self, guesses: bool, seed: int, **options: Any) -> None:
        rng = random.Random(seed)
        self.guesser = Guesser(lambda: rng.randrange(5)) if guesses else None
        self.bench = Bench(proposer=self.guesser, **options)
        self.sequences: dict[str, tuple[Sequence, list[int]]] = {}

    @rule(
        stem=st.sampled_from([[], [1, 1, 1, 1], [1, 1, 2, 2, 3, 3], [4] * 9]),
        rest=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        max_tokens=st.integers(0, 9),
        rope_base=st.sampled_from([1e4, 2e4]),
        num_prompt_logprobs=st.sampled_from([None, None, 0]),
        ignore_eos=st.booleans(),
        deterministic=st.booleans(),
    )
    def add(self, stem: list[int], rest: list[int], **fields: Any) -> None:
        prompt = stem + rest
        try:
            sequence = self.bench.add(prompt, **fields)
        except InvalidRequestError:
            pool = self.bench.pool
            assert len(prompt) + fields["max_tokens"] - 1 > pool.num_blocks * pool.block_size
            return
        self.sequences[sequence.uid] = (sequence, prompt)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.bench.scheduler.abort(data.draw(st.sampled_from(sorted(self.sequences))))

    @precondition(lambda self: self.guesser is not None)
    @rule(is_on=st.booleans())
    def guess(self, is_on: bool) -> None:
        assert self.guesser is not None
        self.guesser.is_on = is_on

    @precondition(lambda self: len(self.bench.in_flight) < self.bench.depth and not self.drafts_are_in_flight())
    @rule()
    def launch(self) -> None:
        self.bench.launch()

    @precondition(lambda self: self.bench.in_flight)
    @rule()
    def land(self) -> None:
        self.bench.land()

    @precondition(lambda self: self.bench.in_flight)
    @rule(data=st.data(), spares_cache=st.booleans())
    def land_with_a_failure(self, data: st.DataObject, spares_cache: bool) -> None:
        results = self.bench.machine.collect()
        index = data.draw(st.integers(0, len(results) - 1))
        results[index] = ChunkResult(failure="told to", spares_cache=spares_cache)
        for progress in self.bench.scheduler.complete(self.bench.in_flight.popleft(), results):
            if progress.result.failure:
                del self.sequences[progress.sequence.uid]

    @precondition(lambda self: len(self.bench.in_flight) < self.bench.depth and not self.drafts_are_in_flight())
    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    def drafts_are_in_flight(self) -> bool:
        return any(chunk.draft_token_ids for chunks in self.bench.in_flight for chunk in chunks)

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "bench"):
            self.bench.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        if self.drafts_are_in_flight():
            self.bench.land()
        self.bench.drain()
        for sequence, prompt in self.sequences.values():
            output = sequence.token_ids[len(prompt) :].tolist()
            expected = expected_output(sequence, prompt)
            if sequence.finish_reason is FinishReason.ABORT:
                assert output == expected[: len(output)]
                continue
            assert output == expected
            is_stopped = bool(output) and output[-1] in sequence.stop_token_ids
            assert sequence.finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
            if sequence.num_prompt_logprobs is not None:
                assert [logprob.token_id for logprob in sequence.prompt_logprobs] == prompt[1:]


RandomUse.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestRandomUse = RandomUse.TestCase


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12),
    block_size=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 30),
    depth=st.integers(1, 2),
)
@settings(max_examples=100, deadline=None)
def test_in_a_pool_just_large_enough_for_one_everything_still_completes(
    lengths: list[tuple[int, int]], block_size: int, max_prefill_tokens: int, depth: int
) -> None:
    num_blocks = -(-max(prompt + max(0, output - 1) for prompt, output in lengths) // block_size)
    bench = Bench(num_blocks=num_blocks, block_size=block_size, max_prefill_tokens=max_prefill_tokens, depth=depth)
    sequences = [bench.add([index] * prompt, max_tokens=output) for index, (prompt, output) in enumerate(lengths)]
    bench.drain(max_steps=5000)
    for index, (sequence, (prompt, _)) in enumerate(zip(sequences, lengths, strict=True)):
        assert sequence.token_ids[prompt:].tolist() == expected_output(sequence, [index] * prompt)
