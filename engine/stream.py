"""What one request's reader has not fetched yet.

Filled by the loop and emptied by the reader, both on the event loop. It never pushes back: its size is bounded by the
request's own output, so that a slow reader holds up nobody.
"""

import asyncio

from .api import Chunk, EngineError, FinishReason, TokenLogprob
from .scheduler import Progress
from .sequence import Sequence


class OutputStream:
    """What one reader has not fetched yet: tokens that come while it is busy are handed over together."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason | None = None
        self._error: EngineError | None = None
        self._is_first = True
        self._news = asyncio.Event()

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._finish_reason is not None or self._error is not None

    def put(self, progress: Progress) -> None:
        """Add what a step brought."""
        result = progress.result
        if result.failure is not None:
            self.fail(EngineError(result.failure))
            return
        self._token_ids += result.token_ids
        self._logprobs += result.logprobs
        self._finish_reason = progress.sequence.finish_reason
        if result.token_ids or self.is_ended:
            self._news.set()

    def abort(self) -> None:
        """End the stream as the engine was told to."""
        self._finish_reason = FinishReason.ABORT
        self._news.set()

    def fail(self, error: EngineError) -> None:
        """End the stream with an error, after the tokens that came before it."""
        self._error = error
        self._news.set()

    async def next_chunk(self) -> Chunk:
        """Wait for news and return all of it."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None and not self._token_ids:
            raise self._error
        if self._error is not None:
            self._news.set()
        sampling = self._sequence.sampling
        chunk = Chunk(
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if sampling.num_logprobs is not None else None,
            prompt_logprobs=self._prompt_logprobs() if self._is_first else None,
            num_cached_tokens=self._sequence.num_cached_tokens or 0,
            finish_reason=self._finish_reason,
        )
        self._is_first = False
        self._token_ids.clear()
        self._logprobs.clear()
        return chunk

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        if self._sequence.num_prompt_logprobs is None or self._sequence.wants_prompt_logprobs:
            return None
        return (None, *self._sequence.prompt_logprobs)
