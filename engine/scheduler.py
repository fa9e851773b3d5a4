"""Who runs next: continuous batching, chunked prefill beside decoding, preemption by recompute.

Owns every live sequence, and alone decides its status, progress, blocks and slot. First come, first served: the running
sequences are always older than the waiting ones, and when blocks run out the newest running one goes back to the head
of the queue. The oldest can therefore always grow, and as `add` refuses what could not fit into the whole pool, every
sequence finishes. Tensors, streams and time are somebody else's.

`schedule` fixes what a step computes, the runner computes it, `complete` books the results, steps in order. Several
steps may be in flight: the next one is scheduled as if each sampled token were known, with a place for its K and V.
Blocks and slot of a sequence stay its own until the last step with a chunk of it is over, also when it ends before; a
step that was launched for a sequence that had ended by then is computed for nothing, and its result is dropped.
"""

from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from .api import FinishReason, InvalidRequestError
from .blocks import BlockPool
from .decode_chunks import MAX_ROWS_WITH_RUNS, decode_chunk, is_run, with_guesses
from .prefix_cache import PrefixCache
from .sequence import Sequence, SequenceStatus
from .speculation import Proposer
from .step import Chunk, ChunkResult, StepBudget


class Progress(NamedTuple):
    """What one step brought a sequence that is still wanted; with a failure or a finish_reason it is the last."""

    sequence: Sequence
    result: ChunkResult


class Scheduler:
    """All live sequences. Not thread-safe: it lives on the event loop; only `Sequence` reads happen elsewhere."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
        max_decode_rows: int,
        enable_prefix_caching: bool,
        proposer: Proposer | None = None,
    ) -> None:
        self._pool = pool
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._max_decode_rows = max_decode_rows
        self._prefix_cache = PrefixCache(pool, is_enabled=enable_prefix_caching)
        self._proposer = proposer
        self._live: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._free_slots = list(range(max_batch_size - 1, -1, -1))  # a stack: few sequences use the lowest slots
        self._in_flight: deque[list[Chunk]] = deque()  # oldest first
        self.newly_admitted: list[Sequence] = []  # by the last `schedule`, for the first time
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.cached_tokens_total = 0
        self.preemptions_total = 0
        self.drafted_tokens_total = 0
        self.accepted_tokens_total = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks and take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks: not yet admitted, or preempted."""
        return len(self._waiting)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were scheduled and not completed."""
        return len(self._in_flight)

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
        """End a sequence now; one that is being computed gives up its blocks when its last step completes."""
        sequence = self._live.get(uid)
        if sequence is not None:
            sequence.finish_reason = FinishReason.ABORT
            self._retire(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose what the next step computes: every decoding sequence, then prompts as far as the budget goes.

        Empty while steps are in flight: what they bring has to be known first. Empty otherwise: nothing can run.
        """
        self.newly_admitted.clear()
        budget = StepBudget(self._max_prefill_tokens, num_extra_rows=self._max_decode_rows - len(self._live))
        decoding, prefilling = self._divide_running()
        proposer = self._proposer_for(decoding)
        if proposer is not None and self._in_flight:
            return []  # a guess continues the last token, which is not read back yet
        chunks = self._decode(decoding, budget)
        if chunks is None:
            return []
        if proposer is not None:
            chunks = with_guesses(chunks, proposer, self._pool, budget)
        chunks += self._continue_prefill(prefilling, budget)
        chunks += self._admit(budget)
        if chunks:
            self._launch(chunks)
        return chunks

    def complete(self, chunks: SequenceOf[Chunk], results: SequenceOf[ChunkResult]) -> list[Progress]:
        """Book the results of the oldest step in flight and return what is news to a reader.

        Nothing is news of a sequence that was aborted meanwhile, or that an earlier step ended.
        """
        if not self._in_flight or self._in_flight.popleft() is not chunks:
            raise ValueError("steps complete in the order they were scheduled in, each of them once")
        progress = []
        for chunk, result in zip(chunks, results, strict=True):
            sequence = chunk.sequence
            sequence.num_steps_in_flight -= 1
            if sequence.status is SequenceStatus.FINISHED:
                if sequence.num_steps_in_flight == 0:
                    self._give_up_blocks(sequence)
                continue
            if result.failure is None:
                progress.append(Progress(sequence, self._advance(chunk, result)))
            else:
                if not result.spares_cache:
                    self._pool.unpublish(sequence.block_ids)
                self._retire(sequence)
                progress.append(Progress(sequence, result))
        return progress

    def note_step_time(self, chunks: SequenceOf[Chunk], seconds: float) -> None:
        """Tell the proposer how long a step took, if it did nothing but decode."""
        if self._proposer is not None:
            num_drafts = sum(len(chunk.draft_token_ids) for chunk in chunks)
            if sum(chunk.num_new_tokens for chunk in chunks) == len(chunks) + num_drafts:
                self._proposer.note_step(len(chunks), num_drafts, seconds)

    @property
    def awaits_masks(self) -> bool:
        """Whether a sequence sits out because its mask is late."""
        return any(sequence.awaits_constraint for sequence in self._running)

    def check(self) -> None:
        """Verify that blocks, slots, queues and sequences agree; raise AssertionError when not. For tests."""
        chunks_in_flight = [chunk for chunks in self._in_flight for chunk in chunks]
        ended = {c.sequence for c in chunks_in_flight if c.sequence.status is SequenceStatus.FINISHED}
        holders = [*self._running, *ended]
        self._pool.check(sequence.block_ids for sequence in holders)
        slots = sorted([*self._free_slots, *(sequence.slot for sequence in holders)])
        assert slots == list(range(self._max_batch_size)), "a slot is free and held, held twice, or lost"
        assert {*self._waiting, *self._running} == set(self._live.values()), "a live sequence is in no queue"
        assert len(self._waiting) + len(self._running) == len(self._live), "a sequence is in two queues"
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING, f"{sequence.uid} waits and says otherwise"
            assert not sequence.block_ids, f"{sequence.uid} holds blocks while it waits"
            assert sequence.num_steps_in_flight == 0, f"{sequence.uid} waits while a step computes it"
        for sequence in self._running:
            own = [chunk for chunk in chunks_in_flight if chunk.sequence is sequence]
            assert sequence.status is SequenceStatus.RUNNING, f"{sequence.uid} runs and says otherwise"
            assert sequence.num_computed_tokens < sequence.num_tokens, f"{sequence.uid} has nothing left to compute"
            assert sequence.num_steps_in_flight == len(own), f"{sequence.uid} miscounts its steps"
            num_launched = sequence.num_computed_tokens + sum(chunk.num_new_tokens for chunk in own)
            assert sequence.num_launched_tokens == num_launched, f"{sequence.uid} miscounts what is being computed"
            assert len(sequence.block_ids) >= self._pool.blocks_for(num_launched), "tokens lie nowhere"
            num_published = sequence.num_published_blocks * self._pool.block_size
            assert num_published <= sequence.num_computed_tokens, f"{sequence.uid} shares what is not computed"

    def _divide_running(self) -> tuple[list[Sequence], list[Sequence]]:
        """Return the running sequences that want one more token, and those whose prompt (or past) is not computed."""
        decoding, prefilling = [], []
        for sequence in self._running:
            num_samples = sequence.num_samples_in_flight
            num_pending = len(sequence.token_ids) + num_samples - sequence.num_launched_tokens
            if sequence.awaits_constraint or num_pending == 0:
                continue
            if num_pending > 1 and not is_run(sequence, self._pool):
                prefilling.append(sequence)
            elif not (num_samples and sequence.num_output_tokens + num_samples >= sequence.max_new_tokens):
                decoding.append(sequence)
        return decoding, prefilling

    def _proposer_for(self, decoding: list[Sequence]) -> Proposer | None:
        """Return who guesses in a step with these sequences; None where guesses do not pay."""
        if self._proposer is not None and decoding and self._proposer.wants_to_draft(decoding):
            return self._proposer
        return None

    def _decode(self, decoding: list[Sequence], budget: StepBudget) -> list[Chunk] | None:
        """Return a chunk of one token, or of a run of known ones, for each; None when one must give way and steps are
        in flight.
        """
        chunks = []
        block_size = self._pool.block_size
        num_spare_rows = min(budget.num_extra_rows, MAX_ROWS_WITH_RUNS - len(decoding))
        for sequence in decoding:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # it gave way to an older one just now
            start = sequence.num_launched_tokens
            if start >= len(sequence.block_ids) * block_size:
                if self._pool.num_available == 0 and self._in_flight:
                    return None
                if not self._make_room(sequence):
                    continue
            chunk = decode_chunk(sequence, self._pool, 1 + max(0, num_spare_rows))
            num_spare_rows -= chunk.num_new_tokens - 1
            budget.num_extra_rows -= chunk.num_new_tokens - 1
            chunks.append(chunk)
        return chunks

    def _continue_prefill(self, prefilling: list[Sequence], budget: StepBudget) -> list[Chunk]:
        return [
            self._next_chunk(sequence, budget)
            for sequence in prefilling
            if sequence.status is SequenceStatus.RUNNING and budget.allowed_for(sequence) > 0
        ]

    def _admit(self, budget: StepBudget) -> list[Chunk]:
        chunks: list[Chunk] = []
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            if budget.allowed_for(sequence) == 0 or not self._claim_blocks(sequence):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
            sequence.slot = self._free_slots.pop()
            chunks.append(self._next_chunk(sequence, budget))
        return chunks

    def _next_chunk(self, sequence: Sequence, budget: StepBudget) -> Chunk:
        num_pending = sequence.num_pending_tokens
        num_new = min(num_pending, budget.allowed_for(sequence))
        is_sampled = num_new == num_pending and sequence.max_new_tokens > 0
        chunk = Chunk(sequence, sequence.num_launched_tokens, num_new, is_sampled)
        budget.spend(chunk)
        return chunk

    def _launch(self, chunks: list[Chunk]) -> None:
        self._in_flight.append(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_launched_tokens += chunk.num_new_tokens
            sequence.num_steps_in_flight += 1

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its next token needs; False when it had to give way itself."""
        while self._pool.num_available == 0:
            newest = self._running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.block_ids.extend(self._pool.allocate(1))
        return True

    def _claim_blocks(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, cached ones first; False when it has to wait longer.

        One block for each running sequence is left over, so that a newcomer is not preempted right away.
        """
        hit = self._prefix_cache.find(sequence, self._running)
        if hit is None:
            return False
        num_new = self._pool.blocks_for(sequence.num_tokens) - len(hit.block_ids)
        if num_new + hit.num_unheld + len(self._running) > self._pool.num_available:
            return False
        self._pool.acquire(hit.block_ids)
        sequence.block_ids = array("q", hit.block_ids + self._pool.allocate(num_new))
        sequence.num_published_blocks = len(hit.block_ids)
        sequence.num_computed_tokens = sequence.num_launched_tokens = len(hit.block_ids) * self._pool.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.prompt_tokens_total += sequence.num_prompt_tokens
            self.cached_tokens_total += sequence.num_cached_tokens
            self.newly_admitted.append(sequence)
        return True

    def _advance(self, chunk: Chunk, result: ChunkResult) -> ChunkResult:
        """Book what a chunk brought a running sequence, and return as much of it as belongs to the answer."""
        sequence = chunk.sequence
        if result.prompt_logprobs:
            sequence.prompt_logprobs.extend(result.prompt_logprobs)
        if chunk.is_sampled:
            result = self._append(sequence, result)
        num_drafts = len(chunk.draft_token_ids)
        sequence.num_computed_tokens = chunk.end
        if num_drafts:
            num_accepted = len(result.token_ids) - 1
            sequence.num_computed_tokens -= num_drafts - num_accepted
            sequence.num_launched_tokens = sequence.num_computed_tokens
            self.drafted_tokens_total += num_drafts
            self.accepted_tokens_total += num_accepted
        elif chunk.is_sampled and chunk.end == sequence.num_tokens:  # its mask was late: its token is computed again
            sequence.num_computed_tokens = sequence.num_launched_tokens = chunk.end - 1
        self._prefix_cache.publish(sequence)
        if sequence.finish_reason is None and not chunk.is_sampled and chunk.end == sequence.num_tokens:
            sequence.finish_reason = FinishReason.LENGTH  # no output was wanted
        if sequence.finish_reason is not None:
            self._retire(sequence)
        return result

    def _append(self, sequence: Sequence, result: ChunkResult) -> ChunkResult:
        """Add sampled tokens up to one that ends the sequence; return the result without those behind it."""
        num_kept = 0
        for token_id in result.token_ids:
            sequence.token_ids.append(token_id)
            num_kept += 1
            if token_id in sequence.stop_token_ids:
                sequence.finish_reason = FinishReason.STOP
                break
            if result.is_over and num_kept == len(result.token_ids):
                sequence.finish_reason = FinishReason.STOP
                break
            if sequence.num_output_tokens >= sequence.max_new_tokens:
                sequence.finish_reason = FinishReason.LENGTH
                break
        self.generation_tokens_total += num_kept
        if num_kept == len(result.token_ids):
            return result
        return result._replace(token_ids=result.token_ids[:num_kept], logprobs=result.logprobs[:num_kept])

    def _preempt(self, sequence: Sequence) -> None:
        """Send the newest running sequence back to the head of the queue; what it computed may survive as cache.

        No step is in flight.
        """
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self._give_up_blocks(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = sequence.num_launched_tokens = 0
        if sequence.wants_prompt_logprobs:
            sequence.prompt_logprobs.clear()
        self.preemptions_total += 1

    def _retire(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue; its blocks and slot go now, or with the last step that computes it."""
        del self._live[sequence.uid]
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            if sequence.num_steps_in_flight == 0:
                self._give_up_blocks(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        self._free_slots.append(sequence.slot)
        sequence.block_ids = array("q")
        sequence.num_published_blocks = 0
