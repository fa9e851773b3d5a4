"""Several tokens of one sequence in a step, guessed or forced: what is kept, and where there is room for none."""

import threading
from typing import Any

import pytest
from scheduler_bench import VOCAB_SIZE, Bench, Guesser, expected_output, expected_until_eos, sizes_until_idle

from lmdserve.engine.api import FinishReason
from lmdserve.engine.decode_chunks import MAX_RUN_TOKENS
from lmdserve.engine.step import ChunkResult


def test_right_guesses_bring_several_tokens_a_step() -> None:
    bench = Bench(depth=2, proposer=Guesser(lambda: 2))
    sequence = bench.add(range(3), max_tokens=10)
    assert sizes_until_idle(bench) == [{"r1": 3}, {}, {"r1": 5}, {"r1": 5}, {"r1": 3}]
    assert sequence.token_ids[3:].tolist() == expected_output(sequence, range(3))
    assert sequence.finish_reason is FinishReason.LENGTH
    assert bench.scheduler.drafted_tokens_total == 4 + 4 + 2
    assert bench.scheduler.accepted_tokens_total == 2 + 2 + 2
    assert bench.scheduler.generation_tokens_total == 10


def test_a_stop_token_among_right_guesses_ends_the_sequence_there() -> None:
    bench = Bench(proposer=Guesser(lambda: 4), block_size=1)
    prompt = next([n] for n in range(VOCAB_SIZE) if 3 < len(expected_until_eos([n]) or ()) < 7)
    sequence = bench.add(prompt, max_tokens=30, ignore_eos=False)
    bench.drain()
    assert sequence.token_ids.tolist() == expected_until_eos(prompt)
    assert sequence.finish_reason is FinishReason.STOP
    again = bench.add([*sequence.token_ids, 1], max_tokens=1)
    bench.drain()
    assert again.num_cached_tokens == sequence.num_tokens - 1, "what came after the stop token is not in the cache"


def test_without_room_for_guesses_there_are_none_and_nobody_gives_way() -> None:
    bench = Bench(num_blocks=4, block_size=2, proposer=Guesser(lambda: 0))
    first, second = bench.add([1], max_tokens=4), bench.add([2], max_tokens=4)
    bench.drain()
    assert bench.scheduler.preemptions_total == 0
    for sequence in (first, second):
        assert sequence.token_ids[1:].tolist() == expected_output(sequence, sequence.token_ids[:1])


@pytest.mark.parametrize("max_batch_size", [4, 6])
def test_a_step_has_no_more_decode_rows_than_it_may(max_batch_size: int) -> None:
    bench = Bench(max_batch_size=max_batch_size, max_decode_rows=6, proposer=Guesser(lambda: 0))
    for n in range(4):
        bench.add([n], max_tokens=6)
    bench.step()
    for _ in range(3):
        assert sum(chunk.num_sampled_rows for chunk in bench.step()) == 6
    bench.drain()


class Anything:
    """A constraint that bars nothing."""

    is_over = must_end = False

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def mask(self) -> None:
        return None

    def accept(self, token_id: int) -> None:
        pass

    def take_forced(self) -> list[int]:
        return []


def _with_forced(bench: Bench, num_forced: int, *, max_tokens: int = 50) -> None:
    """Add a sequence whose prompt is computed, with a sampled token and so many forced ones behind it."""
    sequence = bench.add(range(3), max_tokens=max_tokens, constraint=Anything())
    (chunk,) = chunks = bench.schedule()
    bench.machine.run(chunks)
    bench.scheduler.complete(chunks, [ChunkResult(tuple(range(7, 8 + num_forced)))])
    assert (chunk.is_run, sequence.num_pending_tokens) == (False, 1 + num_forced)


@pytest.mark.parametrize(
    ("num_forced", "options", "expected"),
    [
        (5, {}, [(6, True, True)]),
        (5, {"max_decode_rows": 4}, [(4, True, False), (2, True, True)]),
        (MAX_RUN_TOKENS - 1, {"max_decode_rows": 99}, [(MAX_RUN_TOKENS, True, True)]),
        (
            MAX_RUN_TOKENS,
            {"max_decode_rows": 99, "max_prefill_tokens": 15, "num_blocks": 1, "block_size": 64},
            [(15, False, False), (10, True, True)],
        ),
    ],
    ids=["at once", "as rows allow", "the longest", "one more is a prompt"],
)
def test_forced_tokens_are_computed_as_a_run(
    num_forced: int, options: dict[str, Any], expected: list[tuple[int, bool, bool]]
) -> None:
    bench = Bench(**options)
    _with_forced(bench, num_forced)
    chunks = [chunk for _ in expected for chunk in bench.step()]
    assert [(chunk.num_new_tokens, chunk.is_run, chunk.is_sampled) for chunk in chunks] == expected
    bench.drain()


def test_a_run_takes_no_more_blocks_than_there_are_and_goes_on_a_token_at_a_time() -> None:
    bench = Bench(num_blocks=3, block_size=4)
    _with_forced(bench, 5, max_tokens=10)
    bench.pool.allocate(1)
    (chunk,) = bench.scheduler.schedule()
    assert (chunk.num_new_tokens, chunk.is_run, chunk.is_sampled) == (1, False, False)
