"""Sequences' constraints between steps: each one's next mask and forced tokens, and the threads that compute them.

Owns when masks are computed: as soon as the token before them is known, on threads beside the engine thread, while the
device runs the forward pass that they are for. A mask that takes long keeps its own sequence back and no other: the
step is sampled without it, the sequence's token of that step is worth nothing, and it sits out until the mask is there.
What may follow what is decided by whoever made the request; nothing a constraint raises gets beyond its own sequence.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from .api import TokenConstraint

# From when on a step goes on without a mask. With two threads and InternLM2's vocabulary 256 masks take 4 ms.
LATE_S = 0.006
_SLOW_S = 0.003  # of a thread's own time; a mask that takes so long has more like it to follow
_MASKS_AS_SLOW = 64
_MASKS_PER_THREAD = 4  # fewer are not worth waking another one; a mask takes 30 us
_FEWEST_THREADS, _MOST_THREADS = 2, 8  # with one, the first costly mask would hold up all others


@dataclass(slots=True, eq=False)
class ConstraintState:
    """One sequence's constraint. `prepare` is called on any thread, everything else on the engine thread.

    Between a `take` and the end of the `prepare` that follows (`is_ready`), nothing but `is_late` may be looked at.
    """

    constraint: TokenConstraint
    fast_forward_from: int | None = None  # the place in the output that forced tokens are taken from on; None: never
    may_be_late: bool = True
    num_tokens: int = 0  # of the output that it has taken, forced ones included
    mask: bytes | None = None  # of the token behind those; None: every token may come
    must_end: bool = False  # the mask allows tokens that end the sequence only
    is_over: bool = False
    failure: str | None = None
    is_ready: bool = False
    is_late: bool = False  # a step goes on without its mask; the scheduler leaves the sequence out until it is there
    _num_masks_as_slow: int = 0  # that it is taken to be slow for
    _forced_token_ids: tuple[int, ...] = ()

    @property
    def is_slow(self) -> bool:
        """Whether one of its last masks was costly."""
        return self._num_masks_as_slow > 0

    @property
    def has_forced(self) -> bool:
        """Whether it knows tokens that it has not handed out, as its mask was late: what a step samples is not them."""
        return self.is_ready and bool(self._forced_token_ids)

    def mask_at(self, output_position: int) -> bytes | None:
        """Return the mask of a place in the output; None where every token may come, or what comes is not taken."""
        return self.mask if self.is_ready and output_position == self.num_tokens else None

    def take(self, token_ids: Iterable[int]) -> None:
        """Go on by the tokens of a step, which was sampled with its mask; it may have been late before."""
        self.is_late = False
        for token_id in token_ids:
            if self.failure is None and not self.is_over:
                self._run(lambda token_id=token_id: self._accept(token_id))  # type: ignore[misc]
        self.is_ready = self.is_over or self.failure is not None

    def prepare(self) -> None:
        """Find out which tokens are forced now, go on by them, and compute the mask behind them."""
        begun_s = time.thread_time()
        self._run(self._compute)
        is_costly = time.thread_time() - begun_s > _SLOW_S
        self._num_masks_as_slow = _MASKS_AS_SLOW if is_costly else max(0, self._num_masks_as_slow - 1)
        self.is_ready = True

    def hand_out_forced(self) -> tuple[int, ...]:
        """Return the tokens that it went on by since the last one it was given; once."""
        forced, self._forced_token_ids = self._forced_token_ids, ()
        return forced

    def _accept(self, token_id: int) -> None:
        self.constraint.accept(token_id)
        self.num_tokens += 1
        self.is_over = self.constraint.is_over

    def _compute(self) -> None:
        if self.fast_forward_from is not None and self.num_tokens >= self.fast_forward_from:
            forced = tuple(self.constraint.take_forced())
            self.num_tokens += len(forced)
            self._forced_token_ids += forced
            self.is_over = self.constraint.is_over
            if self.is_over:
                return
        self.must_end = self.constraint.must_end
        self.mask = self.constraint.mask()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of native code is no Exception
            self.mask = None
            self.failure = f"this request's output format failed: {error}"


class MaskThreads:
    """Prepares constraints side by side; native code computes masks without Python's lock. Used by the engine thread.

    What was slow lately has a thread of its own, so that a few costly constraints never occupy all the others.
    """

    def __init__(self) -> None:
        self._num_threads = max(_FEWEST_THREADS, min(_MOST_THREADS, len(os.sched_getaffinity(0)) - 1))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="lmdserve-masks")
        self._slow_thread = ThreadPoolExecutor(1, thread_name_prefix="lmdserve-slow-masks")
        self._late: dict[ConstraintState, list[Future[None]]] = {}

    def prepare(self, states: Iterable[ConstraintState]) -> None:
        """Prepare those that are not; return when all are ready, or those marked as late that are not in LATE_S."""
        unready = [state for state in states if not state.is_ready and not state.is_late]
        if not unready:
            return
        quick = deque(state for state in unready if not state.is_slow)
        num_threads = min(self._num_threads, -(-len(quick) // _MASKS_PER_THREAD))
        running = [self._threads.submit(_prepare_all, quick) for _ in range(num_threads)]
        running += [self._slow_thread.submit(state.prepare) for state in unready if state.is_slow]
        _, pending = wait(running, timeout=LATE_S)
        if quick:  # held up by what takes long
            pending.add(self._threads.submit(_prepare_all, quick))
        while any(not state.is_ready and not state.may_be_late for state in unready):
            _, pending = wait(pending, return_when=FIRST_COMPLETED)
        for state in unready:
            if not state.is_ready:
                state.is_late = True
                self._late[state] = list(pending)

    def note_ready(self) -> None:
        """Let those go on whose masks have come."""
        for state in [state for state in self._late if state.is_ready]:
            state.is_late = False
            del self._late[state]

    def wait_for_late(self) -> None:
        """Wait until one of the late masks has come, if there are any, but no longer than a newcomer should have to."""
        pending = {future for futures in self._late.values() for future in futures if not future.done()}
        if pending:
            wait(pending, timeout=LATE_S, return_when=FIRST_COMPLETED)
        self.note_ready()

    def close(self) -> None:
        """End the threads; what they compute is not waited for."""
        for threads in (self._threads, self._slow_thread):
            threads.shutdown(wait=False, cancel_futures=True)


def _prepare_all(states: "deque[ConstraintState]") -> None:
    """Prepare one after another, as long as other threads leave any."""
    while states:
        try:
            state = states.popleft()
        except IndexError:
            return
        state.prepare()
