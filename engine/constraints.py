"""Sequences' constraints between steps: each one's next mask and forced tokens, and the threads that compute them.

Owns when masks are computed: as soon as the token before them is known, beside the engine thread, while the device runs
the forward pass that they are for. A mask that takes long keeps its own sequence back and no other: the step is sampled
without it, the sequence's token of that step is worth nothing, and it sits out until the mask is there. What may follow
what is decided by whoever made the request; nothing a constraint raises gets beyond its own sequence.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from .api import TokenConstraint

LATE_S = 0.006  # how long a step waits for sequences whose last masks were quick, and _QUICK_S for each of them
UNPROVEN_S = 0.002  # and for all others: those that are new, and those whose last mask was long
_QUICK_S = 0.0001  # three times what a usual mask takes, as cores may be busy
_LONG_S = 0.0003  # of a thread's own time; in a short string, for which all the vocabulary is looked through, 0.0007
_SLOW_S = 0.003  # a mask that takes so long has more like it to follow
_MASKS_AS_SLOW = 64
_STUCK_S = 0.001  # when a thread has been at one mask for so long, another one goes on with those behind it
_FOREVER_S = -1.0  # as `Lock.acquire` has it
_MOST_THREADS = 8
_FIRST_THREADS = 2  # for those that are new


@dataclass(slots=True, eq=False)
class ConstraintState:
    """One sequence's constraint. `prepare` is called on any thread, everything else on the engine thread.

    Between a `take` and the end of the `prepare` that follows (`is_ready`), nothing but `is_late` may be looked at.
    """

    constraint: TokenConstraint
    fast_forward_from: int | None = None  # the place in the output that forced tokens are taken from on; None: never
    may_be_late: bool = True
    num_tokens: int = 0  # of the output that it has taken, forced ones included
    mask: bytes | bytearray | None = None  # of the token behind those; None: every token may come
    must_end: bool = False  # the mask allows tokens that end the sequence only
    is_over: bool = False
    failure: str | None = None
    is_requests_fault: bool = False  # the failure
    is_ready: bool = False
    is_late: bool = False  # a step goes on without its mask; the scheduler leaves the sequence out until it is there
    is_new: bool = True  # no mask of it has been computed yet
    last_mask_s: float = 0.0  # of a thread's own time
    _num_masks_as_slow: int = 0  # that it is taken to be slow for
    _forced_token_ids: tuple[int, ...] = ()
    _untaken_token_ids: tuple[int, ...] = ()

    @property
    def is_slow(self) -> bool:
        """Whether one of its last masks was costly."""
        return self._num_masks_as_slow > 0

    @property
    def is_quick(self) -> bool:
        """Whether its last masks were quick, so that the next one probably is."""
        return not self.is_new and not self.is_slow and self.last_mask_s <= _LONG_S

    @property
    def has_forced(self) -> bool:
        """Whether it knows tokens that it has not handed out, as its mask was late: what a step samples is not them."""
        return self.is_ready and bool(self._forced_token_ids)

    def mask_at(self, output_position: int) -> bytes | bytearray | None:
        """Return the mask of a place in the output; None where every token may come, or what comes is not taken."""
        return self.mask if self.is_ready and output_position == self.num_tokens else None

    def take(self, token_ids: Iterable[int]) -> None:
        """Go on by the tokens of a step, which was sampled with its mask; it may have been late before.

        Where its lock is held, because another one's mask is being computed, `prepare` goes on by them.
        """
        self.is_late = False
        if self.failure is None:
            self._untaken_token_ids += tuple(token_ids)
            self._run(self._accept, 0.0)
        self.is_ready = self.is_over or self.failure is not None

    def prepare(self, *, patience_s: float = _FOREVER_S) -> bool:
        """Find out which tokens are forced now, go on by them, and compute the mask behind them.

        Returns False, with nothing computed, where its lock is held for longer than it is to wait for that.
        """
        begun_s = time.thread_time()
        if not (self._run(self._accept, patience_s) and self._run(self._compute, patience_s)):
            return False
        self.last_mask_s = time.thread_time() - begun_s
        is_slow = self.last_mask_s > _SLOW_S
        self._num_masks_as_slow = _MASKS_AS_SLOW if is_slow else max(0, self._num_masks_as_slow - 1)
        self.is_new = False
        self.is_ready = True
        return True

    def hand_out_forced(self) -> tuple[int, ...]:
        """Return the tokens that it went on by since the last one it was given; once."""
        forced, self._forced_token_ids = self._forced_token_ids, ()
        return forced

    def _accept(self) -> None:
        token_ids, self._untaken_token_ids = self._untaken_token_ids, ()
        for token_id in token_ids:
            if self.is_over:
                return
            self.constraint.accept(token_id)
            self.num_tokens += 1
            self.is_over = self.constraint.is_over

    def _compute(self) -> None:
        if self.is_over or self.failure is not None:
            return
        if self.fast_forward_from is not None and self.num_tokens >= self.fast_forward_from:
            forced = tuple(self.constraint.take_forced())
            self.num_tokens += len(forced)
            self._forced_token_ids += forced
            self.is_over = self.constraint.is_over
            if self.is_over:
                return
        self.must_end = self.constraint.must_end
        self.mask = self.constraint.mask()

    def _run(self, work: Callable[[], None], patience_s: float) -> bool:
        """Work with the constraint, whose lock may be another one after it took a token; False where that is held."""
        lock = self.constraint.lock
        if not lock.acquire(timeout=patience_s):
            return False
        try:
            work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of native code is no Exception
            self.mask = None
            self.failure = f"this request's output format failed: {error}"
            self.is_requests_fault = isinstance(error, ValueError)
        finally:
            lock.release()
        return True


class MaskThreads:
    """Prepares constraints beside the engine thread, which alone calls it.

    One thread does so for all that are quick: what native code does without Python's lock is too short for a second one
    to gain much (with 256 sequences 27 us each in place of 34, with 32 nothing), and it makes the event loop late.
    Another one takes over while it is stuck. What is new, long or slow is done beside it.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="lmdserve-masks")
        self._first_threads = ThreadPoolExecutor(_FIRST_THREADS, thread_name_prefix="lmdserve-first-masks")
        self._slow_thread = ThreadPoolExecutor(1, thread_name_prefix="lmdserve-slow-masks")
        self._late: set[ConstraintState] = set()
        self._queues: list[_Queue] = []  # of states that no thread may have come to yet
        self._blocked: deque[ConstraintState] = deque()  # found with their locks held
        self._running: set[Future[None]] = set()  # what computes the late ones

    def prepare(self, states: Iterable[ConstraintState], *, is_alone: bool = False) -> None:
        """Prepare those that are not; return when all are ready, or marked as late.

        `is_alone` says that a single sequence is computed at present, so that nobody else waits. Where its masks have
        been quick, the next one is then computed on the engine thread itself: handing over takes 50 to 100 us.
        """
        unready = [state for state in states if not state.is_ready and not state.is_late]
        if is_alone and len(unready) == 1 and unready[0].is_quick and unready[0].prepare(patience_s=0.0):
            return
        if unready:
            self._running |= self._prepare_beside(unready)
            for state in unready:
                if not state.is_ready:
                    state.is_late = True
                    self._late.add(state)

    def note_ready(self) -> None:
        """Let those go on whose masks have come."""
        self._running = {future for future in self._running if not future.done()} | self._relieve()
        for state in [state for state in self._late if state.is_ready]:
            state.is_late = False
            self._late.remove(state)

    def wait_for_late(self) -> None:
        """Wait until one of the late masks may have come, if there are any, but no longer than a newcomer should."""
        self.note_ready()
        if self._late and self._running:
            wait(self._running, timeout=LATE_S, return_when=FIRST_COMPLETED)
        self.note_ready()

    def close(self) -> None:
        """End the threads; what they compute is not waited for."""
        for threads in (self._threads, self._first_threads, self._slow_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    def _prepare_beside(self, unready: list[ConstraintState]) -> set[Future[None]]:
        """Have threads prepare these; return what still runs when all are ready, or have been waited for."""
        begun_s = time.monotonic()
        new, slow = [state for state in unready if state.is_new], [state for state in unready if state.is_slow]
        quick = [state for state in unready if state.is_quick]
        long = [state for state in unready if not (state.is_new or state.is_slow or state.is_quick)]
        patience_s = LATE_S + _QUICK_S * len(quick)
        queues = [_Queue(quick, self._blocked), _Queue(long, self._blocked)]
        pending = queues[0].hand_to(self._threads, 1) | queues[1].hand_to(self._threads, 1)
        self._queues += queues
        pending |= _Queue(new, self._blocked).hand_to(self._first_threads, _FIRST_THREADS)
        pending |= _Queue(slow, self._blocked).hand_to(self._slow_thread, 1)
        while True:
            _, pending = wait(pending, timeout=_STUCK_S)
            pending |= self._relieve()
            waited_s = time.monotonic() - begun_s
            is_over = waited_s > patience_s or (waited_s > UNPROVEN_S and all(state.is_ready for state in quick))
            if not pending or (is_over and all(state.is_ready or state.may_be_late for state in unready)):
                return pending

    def _relieve(self) -> set[Future[None]]:
        """Have another thread go on where one is stuck, and the slow one wait for the locks that were held."""
        futures: set[Future[None]] = set()
        while self._blocked:
            futures.add(self._slow_thread.submit(_prepare, self._blocked.popleft()))
        self._queues = [queue for queue in self._queues if queue]
        for queue in self._queues:
            if time.monotonic() - queue.last_begun_s > _STUCK_S:
                futures |= queue.hand_to(self._threads, 1)
        return futures


class _Queue:
    """Constraints that threads prepare one after another; those whose locks are held are put into `blocked`."""

    def __init__(self, states: Iterable[ConstraintState], blocked: deque[ConstraintState]) -> None:
        self._states = deque(states)
        self._blocked = blocked
        self.last_begun_s = time.monotonic()

    def __len__(self) -> int:
        return len(self._states)

    def hand_to(self, threads: ThreadPoolExecutor, most: int) -> set[Future[None]]:
        """Have up to so many threads more work on what is left."""
        return {threads.submit(self._work) for _ in range(min(most, len(self._states)))}

    def _work(self) -> None:
        held: set[threading.Lock] = set()
        while self._states:
            try:
                state = self._states.popleft()
            except IndexError:  # another thread took it
                return
            self.last_begun_s = time.monotonic()
            lock = state.constraint.lock
            if not state.prepare(patience_s=0.0 if lock in held else _STUCK_S):
                held.add(lock)
                self._blocked.append(state)


def _prepare(state: ConstraintState) -> None:
    state.prepare()
