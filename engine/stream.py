"""What one request's reader has not fetched yet, and when readers are told that there is something to fetch.

Filled by the loop and emptied by the reader, both on the event loop. Nothing here pushes back: a stream's size is
bounded by the request's own output, so that a slow reader holds up nobody.
"""

import asyncio
import time
from collections import deque

from .api import Chunk, EngineError, FinishReason, FormatFailedError, TokenLogprob
from .scheduler import Progress
from .sequence import Sequence

# A reader that detokenizes and writes to a socket takes 20 to 40 us; a step that comes back waits for two turns.
READERS_PER_TURN = 16


class OutputStream:
    """What one reader has not fetched yet: tokens that come while it is busy are handed over together."""

    def __init__(self, sequence: Sequence) -> None:
        self.is_due = False  # its reader is going to be woken
        self._sequence = sequence
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason | None = None
        self._error: EngineError | None = None
        self._is_first = True
        self._submitted_s = time.monotonic()
        self._queued_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._finish_reason is not None or self._error is not None

    @property
    def has_news(self) -> bool:
        """Whether the reader has something to fetch."""
        return bool(self._token_ids) or self._finish_reason is not None or self._error is not None

    def note_admission(self) -> None:
        """Stop the clock of the time in the queue."""
        self._queued_s = time.monotonic() - self._submitted_s

    def put(self, progress: Progress) -> None:
        """Add what a step brought."""
        result = progress.result
        if result.failure is not None:
            self._error = (FormatFailedError if result.is_requests_fault else EngineError)(result.failure)
            return
        self._token_ids += result.token_ids
        if result.logprobs:
            self._logprobs += result.logprobs
        self._finish_reason = progress.sequence.finish_reason

    def abort(self) -> None:
        """End the stream as the engine was told to, and tell the reader now."""
        self._finish_reason = FinishReason.ABORT
        self.wake()

    def fail(self, error: EngineError) -> None:
        """End the stream with an error, after the tokens that came before it, and tell the reader now."""
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Let the reader go on, if it waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_chunk(self) -> Chunk:
        """Wait for news and return all of it."""
        while not self.has_news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None and not self._token_ids:
            raise self._error
        sequence = self._sequence
        chunk = Chunk(
            tuple(self._token_ids),
            tuple(self._logprobs) if sequence.sampling.num_logprobs is not None else None,
            self._prompt_logprobs() if self._is_first else None,
            sequence.num_cached_tokens or 0,
            self._finish_reason,
            self._queued_s if self._is_first else None,
        )
        self._is_first = False
        self._token_ids.clear()
        self._logprobs.clear()
        return chunk

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        if self._sequence.num_prompt_logprobs is None or self._sequence.wants_prompt_logprobs:
            return None
        return (None, *self._sequence.prompt_logprobs)


class Wakeups:
    """Wakes readers a few at a time, so that the event loop gets back to the engine between them.

    Where the readers of all streams take longer than a step, each is woken as often as there is time for, and finds the
    tokens of several steps: the engine is never held up by what becomes of its tokens.
    """

    def __init__(self) -> None:
        self._due: deque[OutputStream] = deque()
        self._is_running = False

    def add(self, stream: OutputStream) -> None:
        """Have the stream's reader woken when its turn comes."""
        if stream.is_due:
            return
        stream.is_due = True
        self._due.append(stream)
        if not self._is_running:
            self._is_running = True
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _wake_some(self) -> None:
        for _ in range(min(len(self._due), READERS_PER_TURN)):
            stream = self._due.popleft()
            stream.is_due = False
            stream.wake()
        if self._due:
            asyncio.get_running_loop().call_soon(self._wake_some)
        else:
            self._is_running = False
