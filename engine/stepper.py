"""The engine thread's side of a step: launch and collect in order, and find out whose fault a failing step is.

Owns the runner's steps in flight. It knows no scheduler and no streams: chunks come in, steps with their results go
out, oldest first, each step once.
"""

import logging
from collections import deque
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

from .api import EngineDeadError
from .step import Chunk, ChunkResult, StepRunner

logger = logging.getLogger(__name__)


class FinishedStep(NamedTuple):
    """A step that is over, with one result a chunk."""

    chunks: SequenceOf[Chunk]
    results: SequenceOf[ChunkResult]


class _Launched(NamedTuple):
    chunks: SequenceOf[Chunk]
    handle: Any


class Stepper:
    """Drives a runner. All methods are called on the engine thread."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._in_flight: deque[_Launched] = deque()

    def advance(self, chunks: SequenceOf[Chunk]) -> list[FinishedStep]:
        """Launch a step, unless `chunks` is empty, then wait for the oldest one unless the device can take one more.

        Returns the steps that are over now. Raises EngineDeadError when nothing works any more.
        """
        if not chunks:
            return self._collect_oldest()
        _prepare_masks(chunks)
        try:
            handle = self._runner.launch(chunks)
        except Exception as error:
            return [*self._drain(), self._compute_one_by_one(chunks, error)]
        self._in_flight.append(_Launched(chunks, handle))
        if len(self._in_flight) < self._runner.max_in_flight and not any(chunk.draft_token_ids for chunk in chunks):
            return []
        return self._collect_oldest()

    def _collect_oldest(self) -> list[FinishedStep]:
        """Wait for the oldest step; when it fails, those launched on top of it are computed again with it."""
        oldest = self._in_flight.popleft()
        try:
            return [_finished(oldest.chunks, self._runner.collect(oldest.handle))]
        except Exception as error:
            steps = [oldest.chunks, *(self._abandon(launched) for launched in self._in_flight)]
            self._in_flight.clear()
            return [self._compute_one_by_one(chunks, error) for chunks in steps]

    def _drain(self) -> list[FinishedStep]:
        finished = []
        while self._in_flight:
            finished += self._collect_oldest()
        return finished

    def _abandon(self, launched: _Launched) -> SequenceOf[Chunk]:
        """Wait for a step whose results are worth nothing; return its chunks."""
        try:
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
        results = [self._compute_alone(chunk) for chunk in chunks]
        if all(result.failure is not None for result in results):
            self._probe()
        return _finished(chunks, results)

    def _compute_alone(self, chunk: Chunk) -> ChunkResult:
        try:
            return self._runner.collect(self._runner.launch([chunk]))[0]
        except EngineDeadError:
            raise
        except Exception as error:
            return ChunkResult(failure=f"computing this request failed with {type(error).__name__}: {error}")

    def _probe(self) -> None:
        """Tell failing requests from a failing device."""
        try:
            self._runner.probe()
        except Exception as error:
            raise EngineDeadError(
                f"the model cannot compute any more ({type(error).__name__}: {error}); restart the server"
            ) from error


def _prepare_masks(chunks: SequenceOf[Chunk]) -> None:
    for chunk in chunks:
        if chunk.is_sampled and chunk.sequence.constraint is not None:
            chunk.sequence.constraint.prepare()


def _finished(chunks: SequenceOf[Chunk], results: SequenceOf[ChunkResult]) -> FinishedStep:
    """Return a step that is over, its tokens accepted by the constraints, and their next masks computed.

    A step launched ahead runs meanwhile.
    """
    if all(chunk.sequence.constraint is None for chunk in chunks):
        return FinishedStep(chunks, results)
    checked = [_checked(chunk, result) for chunk, result in zip(chunks, results, strict=True)]
    _prepare_masks(chunks)
    return FinishedStep(chunks, checked)


def _checked(chunk: Chunk, result: ChunkResult) -> ChunkResult:
    state = chunk.sequence.constraint
    if state is None or result.failure is not None:
        return result
    state.accept(result.token_ids)
    return result if state.failure is None else ChunkResult(failure=state.failure)
