"""The engine thread's side of a step: launch and collect in order, and find out whose fault a failing step is.

Owns the runner's steps in flight. It knows no scheduler and no streams: chunks come in, steps with their results go
out, oldest first, each step once.
"""

import logging
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple

from .api import EngineDeadError
from .constraints import ConstraintState, MaskThreads
from .sequence import Sequence
from .step import Chunk, ChunkResult, StepRunner

logger = logging.getLogger(__name__)


class FinishedStep(NamedTuple):
    """A step that is over, with one result a chunk."""

    chunks: SequenceOf[Chunk]
    results: SequenceOf[ChunkResult]


@dataclass(slots=True)
class _Launched:
    chunks: SequenceOf[Chunk]
    handle: Any
    is_sampled: bool = False
    late: frozenset[Sequence] = frozenset()  # sampled without their masks, so that what was sampled is worth nothing


class Stepper:
    """Drives a runner with one or two steps in flight. All methods are called on the engine thread.

    The forward pass of a step is launched before the tokens of the step before it are known. Where sequences are
    constrained, its sampling has to wait for them: a token, then the mask behind it.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._in_flight: deque[_Launched] = deque()  # only the newest may not be sampled yet
        self._masks = MaskThreads()

    def advance(self, chunks: SequenceOf[Chunk]) -> list[FinishedStep]:
        """Launch a step, unless `chunks` is empty, then wait for the oldest one unless the device can take one more.

        Returns the steps that are over now. With nothing to launch and nothing in flight, waits a little for a late
        mask. Raises EngineDeadError when nothing works any more.
        """
        self._masks.note_ready()
        if not chunks:
            if self._in_flight:
                return self._collect_oldest()
            self._masks.wait_for_late()
            return []
        try:
            self._launch(chunks)
        except Exception as error:
            return [*self._drain(), self._compute_one_by_one(chunks, error)]
        if len(self._in_flight) < self._runner.max_in_flight and not any(chunk.draft_token_ids for chunk in chunks):
            return []
        return self._collect_oldest()

    def close(self) -> None:
        """End the threads that compute masks."""
        self._masks.close()

    def _launch(self, chunks: SequenceOf[Chunk]) -> None:
        launched = _Launched(chunks, self._runner.launch(chunks))
        if not self._in_flight or not any(_constraints(chunks)):
            self._sample(launched)
        self._in_flight.append(launched)

    def _sample(self, launched: _Launched) -> None:
        """Have a step sampled; the tokens of all steps before it are known where it matters."""
        self._prepare(launched.chunks)
        launched.late = frozenset(
            chunk.sequence
            for chunk in launched.chunks
            if chunk.sequence.constraint is not None and not chunk.sequence.constraint.is_ready
        )
        self._runner.sample(launched.handle)
        launched.is_sampled = True

    def _collect_oldest(self) -> list[FinishedStep]:
        """Wait for the oldest step; when it fails, those launched on top of it are computed again with it."""
        oldest = self._in_flight.popleft()
        try:
            results = self._runner.collect(oldest.handle)
        except Exception as error:
            steps = [oldest.chunks, *(self._abandon(launched) for launched in self._in_flight)]
            self._in_flight.clear()
            return [self._compute_one_by_one(chunks, error) for chunks in steps]
        return [self._finished(oldest.chunks, results, oldest.late), *self._sample_next()]

    def _sample_next(self) -> list[FinishedStep]:
        """Have the next step sampled if that had to wait; return it as over if that fails."""
        if not self._in_flight or self._in_flight[0].is_sampled:
            return []
        try:
            self._sample(self._in_flight[0])
        except Exception as error:
            return [self._compute_one_by_one(self._in_flight.popleft().chunks, error)]
        return []

    def _drain(self) -> list[FinishedStep]:
        finished = []
        while self._in_flight:
            finished += self._collect_oldest()
        return finished

    def _abandon(self, launched: _Launched) -> SequenceOf[Chunk]:
        """Wait for a step whose results are worth nothing; return its chunks."""
        try:
            if not launched.is_sampled:
                self._runner.sample(launched.handle)
            self._runner.collect(launched.handle)
        except Exception:
            logger.debug("a step on top of a failed one failed too", exc_info=True)
        return launched.chunks

    def _compute_one_by_one(self, chunks: SequenceOf[Chunk], error: Exception) -> FinishedStep:
        """Repeat a step one sequence at a time (K and V go where they went before): only those fail that make it raise.

        No step is in flight.
        """
        if isinstance(error, EngineDeadError):
            raise error
        logger.error("a step of %d sequences failed; each is tried alone", len(chunks), exc_info=error)
        launched = [_Launched([chunk], None) for chunk in chunks]
        results = [self._compute_alone(alone) for alone in launched]
        if all(result.failure is not None for result in results):
            self._probe()
        return self._finished(chunks, results, frozenset().union(*(alone.late for alone in launched)))

    def _compute_alone(self, launched: _Launched) -> ChunkResult:
        try:
            launched.handle = self._runner.launch(launched.chunks)
            self._sample(launched)
            return self._runner.collect(launched.handle)[0]
        except EngineDeadError:
            raise
        except Exception as error:
            return ChunkResult(failure=f"computing this request failed with {type(error).__name__}: {error}")

    def _finished(
        self, chunks: SequenceOf[Chunk], results: SequenceOf[ChunkResult], late: frozenset[Sequence]
    ) -> FinishedStep:
        """Return a step that is over: its constraints have taken its tokens, and found out what is forced after them.

        Meanwhile the device computes the next step.
        """
        if not any(_constraints(chunks)):
            return FinishedStep(chunks, results)
        results = [
            _taken(chunk, result, is_late=chunk.sequence in late) for chunk, result in zip(chunks, results, strict=True)
        ]
        self._prepare(chunks)
        return FinishedStep(chunks, list(map(_with_forced, chunks, results)))

    def _prepare(self, chunks: SequenceOf[Chunk]) -> None:
        is_alone = len(chunks) == 1 and all(len(launched.chunks) == 1 for launched in self._in_flight)
        self._masks.prepare(_constraints(chunks), is_alone=is_alone)

    def _probe(self) -> None:
        """Tell failing requests from a failing device."""
        try:
            self._runner.probe()
        except Exception as error:
            raise EngineDeadError(
                f"the model cannot compute any more ({type(error).__name__}: {error}); restart the server"
            ) from error


def _constraints(chunks: SequenceOf[Chunk]) -> Iterator[ConstraintState]:
    """Yield the constraints of the sequences that are sampled."""
    for chunk in chunks:
        if chunk.is_sampled and chunk.sequence.constraint is not None:
            yield chunk.sequence.constraint


def _taken(chunk: Chunk, result: ChunkResult, *, is_late: bool) -> ChunkResult:
    """Let a constraint take what was sampled; return the result without it where it is known already, or wrong."""
    state = chunk.sequence.constraint
    if state is None or result.failure is not None or not result.token_ids:
        return result
    if is_late or not state.is_ready or chunk.output_position < state.num_tokens:
        return result._replace(token_ids=(), logprobs=())
    state.take(result.token_ids)
    return result


def _with_forced(chunk: Chunk, result: ChunkResult) -> ChunkResult:
    """Return the result with the tokens that the constraint forces next, or with what went wrong with it."""
    state = chunk.sequence.constraint
    if state is None or not chunk.is_sampled or result.failure is not None or not state.is_ready:
        return result
    if state.failure is not None:
        return ChunkResult(failure=state.failure, spares_cache=True, is_requests_fault=state.is_requests_fault)
    return result._replace(token_ids=result.token_ids + state.hand_out_forced(), is_over=state.is_over)
