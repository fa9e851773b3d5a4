"""The order of launches and collections, and whose fault a failing step is."""

import threading
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest

from lmdserve.engine.api import EngineDeadError, EngineInfo, Request, SamplingParams
from lmdserve.engine.constraints import ConstraintState
from lmdserve.engine.sequence import Sequence, new_sequence
from lmdserve.engine.step import Chunk, ChunkResult
from lmdserve.engine.stepper import Stepper

INFO = EngineInfo(vocab_size=64, session_len=1000, eos_token_ids=frozenset())
BAD = 9  # a sequence of this token makes the step raise that computes it


class ScriptedRunner:
    """Writes down what it is asked to do; each chunk's result is its first token."""

    def __init__(self, max_in_flight: int, *, fails_late: bool = False, logs_samples: bool = False) -> None:
        self.logs_samples = logs_samples
        self.max_in_flight = max_in_flight
        self.device_busy_s = self.device_idle_s = 0.0
        self.fails_late = fails_late
        self.is_broken = False
        self.log: list[str] = []

    def launch(self, chunks: SequenceOf[Chunk]) -> list[int]:
        tokens = [chunk.sequence.token_ids[0] for chunk in chunks]
        self.log.append(f"launch {tokens}")
        if not self.fails_late:
            self._compute(tokens)
        return tokens

    def sample(self, step: list[int]) -> None:
        if self.logs_samples:
            self.log.append(f"sample {step}")

    def collect(self, step: list[int]) -> list[ChunkResult]:
        self.log.append(f"collect {step}")
        self._compute(step)
        return [ChunkResult((token_id,)) for token_id in step]

    def probe(self) -> None:
        self.log.append("probe")
        self._compute([])

    def _compute(self, tokens: list[int]) -> None:
        if self.is_broken or BAD in tokens:
            raise RuntimeError("told to raise")


def _chunks(*tokens: int, drafts: tuple[int, ...] = ()) -> list[Chunk]:
    return [Chunk(_sequence(token_id), 0, 1 + len(drafts), True, drafts) for token_id in tokens]


def _sequence(token_id: int) -> Sequence:
    request = Request(uid=f"r{token_id}", prompt_token_ids=[token_id], sampling=SamplingParams())
    return new_sequence(request, info=INFO, rope_base_for=lambda n: 1e4)


def _outcomes(results: SequenceOf[ChunkResult]) -> list[Any]:
    return [result.failure or result.token_ids[0] for result in results]


def test_one_step_at_a_time_is_launched_and_collected_at_once() -> None:
    runner = ScriptedRunner(1)
    stepper = Stepper(runner)
    first, second = _chunks(1), _chunks(2)
    assert [step.chunks for step in stepper.advance(first)] == [first]
    assert [step.chunks for step in stepper.advance(second)] == [second]
    assert runner.log == ["launch [1]", "collect [1]", "launch [2]", "collect [2]"]


def test_with_two_in_flight_the_next_step_is_launched_before_the_last_is_collected() -> None:
    runner = ScriptedRunner(2)
    stepper = Stepper(runner)
    steps = [_chunks(1), _chunks(2), _chunks(3)]
    finished = [[step.chunks for step in stepper.advance(chunks)] for chunks in (*steps, [])]
    assert finished == [[], [steps[0]], [steps[1]], [steps[2]]]
    assert runner.log == [
        "launch [1]", "launch [2]", "collect [1]", "launch [3]", "collect [2]", "collect [3]"
    ]  # fmt: skip


class Anything:
    """A constraint that bars nothing; it tells when it is asked."""

    is_over = must_end = False

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.lock = threading.Lock()

    def mask(self) -> None:
        self._log.append("mask")

    def accept(self, token_id: int) -> None:
        self._log.append(f"accept {token_id}")

    def take_forced(self) -> list[int]:
        return []


def test_a_constrained_step_is_launched_before_the_last_one_s_tokens_are_known_and_sampled_after() -> None:
    runner = ScriptedRunner(2, logs_samples=True)
    stepper = Stepper(runner)
    sequence = _sequence(5)
    sequence.constraint = ConstraintState(Anything(runner.log), may_be_late=False)
    steps = []
    for start in (0, 1, 2):
        steps.append([Chunk(sequence, start, 1, True)])
        stepper.advance(steps[-1])
        sequence.token_ids.append(5)
    stepper.close()
    assert runner.log == [
        "launch [5]", "mask", "sample [5]",
        "launch [5]", "collect [5]", "accept 5", "mask", "sample [5]",
        "launch [5]", "collect [5]", "accept 5", "mask", "sample [5]",
    ]  # fmt: skip


class Failing(Anything):
    def mask(self) -> None:
        raise ValueError("told to fail")


def test_what_was_computed_is_right_where_a_constraint_fails_and_doubtful_where_the_step_does() -> None:
    stepper = Stepper(ScriptedRunner(1))
    chunks = _chunks(5, BAD)
    chunks[0].sequence.constraint = ConstraintState(Failing([]))
    (finished,) = stepper.advance(chunks)
    stepper.close()
    of_constraint, of_step = finished.results
    assert of_constraint.failure is not None
    assert of_constraint.spares_cache
    assert of_step.failure is not None
    assert not of_step.spares_cache


def test_a_step_beside_without_constraints_is_sampled_at_once() -> None:
    runner = ScriptedRunner(2, logs_samples=True)
    stepper = Stepper(runner)
    for token_id in (1, 2):
        stepper.advance(_chunks(token_id))
    assert runner.log == ["launch [1]", "sample [1]", "launch [2]", "sample [2]", "collect [1]"]


def test_a_step_with_drafts_is_waited_for() -> None:
    runner = ScriptedRunner(2)
    (finished,) = Stepper(runner).advance(_chunks(1, drafts=(4,)))
    assert _outcomes(finished.results) == [1]


@pytest.mark.parametrize("fails_late", [False, True], ids=["at the launch", "at the collection"])
def test_a_step_that_raises_is_repeated_one_by_one(fails_late: bool) -> None:
    runner = ScriptedRunner(1, fails_late=fails_late)
    (finished,) = Stepper(runner).advance(_chunks(1, BAD, 3))
    failure = "computing this request failed with RuntimeError: told to raise"
    assert _outcomes(finished.results) == [1, failure, 3]
    assert "probe" not in runner.log
    assert [line for line in runner.log if line.startswith("launch")] == [
        "launch [1, 9, 3]", "launch [1]", "launch [9]", "launch [3]"
    ]  # fmt: skip


def test_a_launch_that_raises_lets_the_step_in_flight_come_back_first() -> None:
    runner = ScriptedRunner(2)
    stepper = Stepper(runner)
    assert stepper.advance(_chunks(1, 2)) == []
    first, second = stepper.advance(_chunks(1, BAD))
    assert _outcomes(first.results) == [1, 2]
    assert _outcomes(second.results)[0] == 1
    assert second.results[1].failure is not None
    assert runner.log[:3] == ["launch [1, 2]", "launch [1, 9]", "collect [1, 2]"]


def test_a_step_that_fails_at_its_collection_takes_the_one_on_top_with_it() -> None:
    runner = ScriptedRunner(2, fails_late=True)
    stepper = Stepper(runner)
    assert stepper.advance(_chunks(1, BAD)) == []
    first, second = stepper.advance(_chunks(1, 2))
    assert _outcomes(first.results)[0] == 1
    assert first.results[1].failure is not None
    assert _outcomes(second.results) == [1, 2]
    assert runner.log[:4] == ["launch [1, 9]", "launch [1, 2]", "collect [1, 9]", "collect [1, 2]"]
    assert runner.log[4:] == [
        "launch [1]", "collect [1]", "launch [9]", "collect [9]", "launch [1]", "collect [1]", "launch [2]",
        "collect [2]",
    ]  # fmt: skip


def test_when_all_fail_a_probe_decides_whose_fault_it_is() -> None:
    runner = ScriptedRunner(1)
    (finished,) = Stepper(runner).advance(_chunks(BAD))
    assert finished.results[0].failure is not None
    assert runner.log[-1] == "probe"
    runner.is_broken = True
    with pytest.raises(EngineDeadError, match="cannot compute any more"):
        Stepper(runner).advance(_chunks(1, 2))


def test_a_runner_that_calls_itself_dead_is_believed() -> None:
    class DeadRunner(ScriptedRunner):
        def launch(self, chunks: SequenceOf[Chunk]) -> list[int]:
            raise EngineDeadError("gone")

    with pytest.raises(EngineDeadError, match="gone"):
        Stepper(DeadRunner(2)).advance(_chunks(1))
