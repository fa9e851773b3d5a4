"""Who runs next: continuous batching, chunked prefill beside decoding, preemption by recompute.

Owns every live sequence and is the only one to change a sequence's status, progress and block table. First come, first
served: the running sequences are always older than the waiting ones, and when blocks run out the newest running one
goes back to the head of the queue. The oldest can therefore always grow, and as `add` refuses what could not fit into
the whole pool, every sequence finishes. Tensors, streams and time are somebody else's.

One step: `schedule` fixes what is computed, the runner computes it, `complete` books the results. In between, blocks
of the scheduled sequences stay where they are, also those of a sequence aborted meanwhile.
"""

from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from .api import FinishReason, InvalidRequestError, TokenLogprob
from .blocks import BlockPool, chain_hash, root_hash
from .sequence import Sequence, SequenceStatus

MAX_PROMPT_LOGPROB_ROWS = 256  # per step; a row is vocab_size floats, 256 of InternLM2's are 95 MB


class Chunk(NamedTuple):
    """The next tokens of one sequence to compute, from its `num_computed_tokens` on."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Whether a new token follows: the chunk reaches the end of what is known."""
        return self.num_new_tokens == self.sequence.num_pending_tokens and self.sequence.max_new_tokens > 0


class ChunkResult(NamedTuple):
    """What the runner found for one chunk; `failure` says why the sequence cannot go on."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failure: str | None = None


class Progress(NamedTuple):
    """What one step brought a sequence that is still wanted; with a failure or a finish_reason it is the last."""

    sequence: Sequence
    result: ChunkResult


@dataclass(slots=True)
class StepBudget:
    """What a step may still compute beside the decoding sequences."""

    num_prefill_tokens: int
    num_prompt_logprob_rows: int = MAX_PROMPT_LOGPROB_ROWS

    def allowed_for(self, sequence: Sequence) -> int:
        """Return how many tokens of this sequence may be computed at most."""
        if sequence.wants_prompt_logprobs:
            return min(self.num_prefill_tokens, self.num_prompt_logprob_rows)
        return self.num_prefill_tokens

    def spend(self, chunk: Chunk) -> None:
        """Book a chunk that `allowed_for` allowed."""
        self.num_prefill_tokens -= chunk.num_new_tokens
        if chunk.sequence.wants_prompt_logprobs:
            self.num_prompt_logprob_rows -= chunk.num_new_tokens


class Scheduler:
    """All live sequences. Not thread-safe: it lives on the event loop; only `Sequence` reads happen elsewhere."""

    def __init__(
        self, pool: BlockPool, *, max_batch_size: int, max_prefill_tokens: int, enable_prefix_caching: bool
    ) -> None:
        self._pool = pool
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._enable_prefix_caching = enable_prefix_caching
        self._live: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._in_flight: list[Chunk] = []
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.cached_tokens_total = 0
        self.preemptions_total = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks and take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks: not yet admitted, or preempted."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; raise InvalidRequestError when it could never run to its end."""
        if sequence.uid in self._live:
            raise InvalidRequestError(f"a request with the id {sequence.uid} is running already; give it another id")
        most_tokens = sequence.num_prompt_tokens + max(0, sequence.max_new_tokens - 1)  # the last is never computed on
        capacity = self._pool.num_blocks * self._pool.block_size
        if most_tokens > capacity:
            raise InvalidRequestError(
                f"prompt and answer may take {most_tokens} tokens and the KV cache holds {capacity}; "
                "lower max_tokens or shorten the prompt",
                "max_tokens",
            )
        self._live[sequence.uid] = sequence
        self._waiting.append(sequence)

    def abort(self, uid: str) -> None:
        """End a sequence now; one that is being computed gives up its blocks when the step completes."""
        sequence = self._live.get(uid)
        if sequence is None:
            return
        sequence.finish_reason = FinishReason.ABORT
        self._retire(sequence)
        if not any(chunk.sequence is sequence for chunk in self._in_flight):
            self._give_up_blocks(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose what the next step computes: every decoding sequence, then prompts as far as the budget goes."""
        budget = StepBudget(self._max_prefill_tokens)
        chunks = self._decode()
        chunks += self._continue_prefill(budget)
        chunks += self._admit(budget)
        self._in_flight = chunks
        return chunks

    def complete(self, chunks: SequenceOf[Chunk], results: SequenceOf[ChunkResult]) -> list[Progress]:
        """Book a step's results and return what is news to a reader; aborted sequences are not."""
        self._in_flight = []
        progress = []
        for chunk, result in zip(chunks, results, strict=True):
            if chunk.sequence.status is SequenceStatus.FINISHED:
                self._give_up_blocks(chunk.sequence)
                continue
            if result.failure is None:
                self._advance(chunk, result)
            else:
                self._fail(chunk.sequence)
            progress.append(Progress(chunk.sequence, result))
        return progress

    def check(self) -> None:
        """Verify that blocks, queues and sequences agree; raise AssertionError when not. For tests."""
        in_flight = [chunk.sequence for chunk in self._in_flight]
        aborted = [sequence for sequence in in_flight if sequence.status is SequenceStatus.FINISHED]
        self._pool.check(sequence.block_ids for sequence in (*self._running, *aborted))
        assert {*self._waiting, *self._running} == set(self._live.values()), "a live sequence is in no queue"
        assert len(self._waiting) + len(self._running) == len(self._live), "a sequence is in two queues"
        assert len(self._running) <= self._max_batch_size, "more sequences run than may"
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING, f"{sequence.uid} waits and says otherwise"
            assert not sequence.block_ids, f"{sequence.uid} holds blocks while it waits"
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING, f"{sequence.uid} runs and says otherwise"
            assert sequence.num_computed_tokens < sequence.num_tokens, f"{sequence.uid} has nothing left to compute"
            assert len(sequence.block_ids) >= self._pool.blocks_for(sequence.num_computed_tokens), "tokens lie nowhere"

    def _decode(self) -> list[Chunk]:
        chunks = []
        for sequence in tuple(self._running):
            is_decoding = sequence.status is SequenceStatus.RUNNING and sequence.num_pending_tokens == 1
            if is_decoding and self._make_room(sequence):
                chunks.append(Chunk(sequence, 1))
        return chunks

    def _continue_prefill(self, budget: StepBudget) -> list[Chunk]:
        return [
            self._next_chunk(sequence, budget)
            for sequence in self._running
            if sequence.num_pending_tokens > 1 and budget.allowed_for(sequence) > 0
        ]

    def _admit(self, budget: StepBudget) -> list[Chunk]:
        chunks: list[Chunk] = []
        while self._waiting and len(self._running) < self._max_batch_size:
            sequence = self._waiting[0]
            if budget.allowed_for(sequence) == 0 or not self._claim_blocks(sequence):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
            chunks.append(self._next_chunk(sequence, budget))
        return chunks

    def _next_chunk(self, sequence: Sequence, budget: StepBudget) -> Chunk:
        chunk = Chunk(sequence, min(sequence.num_pending_tokens, budget.allowed_for(sequence)))
        budget.spend(chunk)
        return chunk

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its next token needs; False when it had to give way itself."""
        num_needed = self._pool.blocks_for(sequence.num_tokens) - len(sequence.block_ids)
        while num_needed > self._pool.num_available:
            newest = self._running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.block_ids.extend(self._pool.allocate(num_needed))
        return True

    def _claim_blocks(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, cached ones first; False when it has to wait longer.

        One block for each running sequence is left over, so that a newcomer is not preempted right away.
        """
        hashes = self._lookup_hashes(sequence)
        hit = self._pool.match(hashes)
        if len(hit.block_ids) < len(hashes) and self._is_being_computed(hashes[len(hit.block_ids)]):
            return False
        num_new = self._pool.blocks_for(sequence.num_tokens) - len(hit.block_ids)
        if num_new + hit.num_unheld + len(self._running) > self._pool.num_available:
            return False
        self._pool.acquire(hit.block_ids)
        sequence.block_ids = array("q", hit.block_ids + self._pool.allocate(num_new))
        sequence.num_published_blocks = len(hit.block_ids)
        sequence.num_computed_tokens = len(hit.block_ids) * self._pool.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.prompt_tokens_total += sequence.num_prompt_tokens
            self.cached_tokens_total += sequence.num_cached_tokens
        return True

    def _lookup_hashes(self, sequence: Sequence) -> list[bytes]:
        """Return the hashes of the blocks that may come from the cache: full ones, short of the last token."""
        if not self._enable_prefix_caching or sequence.wants_prompt_logprobs:
            return []
        num_blocks = (sequence.num_tokens - 1) // self._pool.block_size
        self._extend_hashes(sequence, num_blocks)
        return sequence.block_hashes[:num_blocks]

    def _is_being_computed(self, block_hash: bytes) -> bool:
        """Whether a running prompt will publish this block: waiting for it is cheaper than computing it twice."""
        return any(
            block_hash in sequence.block_hashes[sequence.num_published_blocks :]
            for sequence in self._running
            if sequence.num_pending_tokens > 1
        )

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        block_size = self._pool.block_size
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            parent_hash = hashes[-1] if hashes else root_hash(sequence.rope_base)
            hashes.append(chain_hash(parent_hash, sequence.token_ids[index * block_size : (index + 1) * block_size]))

    def _advance(self, chunk: Chunk, result: ChunkResult) -> None:
        sequence = chunk.sequence
        sequence.num_computed_tokens += chunk.num_new_tokens
        sequence.prompt_logprobs.extend(result.prompt_logprobs)
        self._publish_full_blocks(sequence)
        if result.token_id is not None:
            sequence.token_ids.append(result.token_id)
            self.generation_tokens_total += 1
        sequence.finish_reason = self._finish_reason(sequence, result.token_id)
        if sequence.finish_reason is not None:
            self._retire(sequence)
            self._give_up_blocks(sequence)

    def _finish_reason(self, sequence: Sequence, token_id: int | None) -> FinishReason | None:
        if token_id in sequence.stop_token_ids:
            return FinishReason.STOP
        is_prompt_done = sequence.num_computed_tokens >= sequence.num_prompt_tokens
        if is_prompt_done and sequence.num_output_tokens >= sequence.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed_tokens // self._pool.block_size
        if not self._enable_prefix_caching or num_full == sequence.num_published_blocks:
            return
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_published_blocks, num_full):
            self._pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published_blocks = num_full

    def _preempt(self, sequence: Sequence) -> None:
        """Send the newest running sequence back to the head of the queue; what it computed may survive as cache."""
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self._give_up_blocks(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        if sequence.wants_prompt_logprobs:
            sequence.prompt_logprobs.clear()
        self.preemptions_total += 1

    def _fail(self, sequence: Sequence) -> None:
        self._pool.unpublish(sequence.block_ids)
        self._retire(sequence)
        self._give_up_blocks(sequence)

    def _retire(self, sequence: Sequence) -> None:
        del self._live[sequence.uid]
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        sequence.block_ids = array("q")
        sequence.num_published_blocks = 0
