"""Who runs next: continuous batching, chunked prefill beside decoding, preemption by recompute.

Owns every live sequence and is the only one to change a sequence's status, progress, block table and slot. First come,
first served: the running sequences are always older than the waiting ones, and when blocks run out the newest running
one goes back to the head of the queue. The oldest can therefore always grow, and as `add` refuses what could not fit
into the whole pool, every sequence finishes. Tensors, streams and time are somebody else's.

`schedule` fixes what a step computes, the runner computes it, `complete` books the results, steps in order. Several
steps may be in flight: the next one is scheduled as if each sampled token were known, with a place for its K and V.
Blocks and slot of a sequence stay its own until the last step with a chunk of it is over, also when it ends before; a
step that was launched for a sequence that had ended by then is computed for nothing, and its result is dropped.
"""

from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from .api import FinishReason, InvalidRequestError
from .blocks import BlockPool, chain_hash, root_hash
from .sequence import Sequence, SequenceStatus
from .speculation import Proposer
from .step import Chunk, ChunkResult

MAX_RUN_TOKENS = 24  # that are known, of an output, and computed as decode rows; more are computed like a prompt
MAX_ROWS_WITH_RUNS = 64  # of a step; with more, its products take longer for every further row
MAX_PROMPT_LOGPROB_ROWS = 256  # per step; a row is vocab_size floats, 256 of InternLM2's are 95 MB


class Progress(NamedTuple):
    """What one step brought a sequence that is still wanted; with a failure or a finish_reason it is the last."""

    sequence: Sequence
    result: ChunkResult


@dataclass(slots=True)
class StepBudget:
    """What a step may still compute beside the decoding sequences."""

    num_prefill_tokens: int
    num_prompt_logprob_rows: int = MAX_PROMPT_LOGPROB_ROWS
    # Decode rows beyond one for each live sequence, waiting ones included, as they may come with the step: no step has
    # more rows of this kind than the batch may have sequences.
    num_extra_rows: int = 0

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
        self,
        pool: BlockPool,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
        enable_prefix_caching: bool,
        proposer: Proposer | None = None,
    ) -> None:
        self._pool = pool
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._enable_prefix_caching = enable_prefix_caching
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
        budget = StepBudget(self._max_prefill_tokens)
        decoding, prefilling = self._divide_running()
        budget.num_extra_rows = self._max_batch_size - len(self._live)
        is_drafting = bool(decoding) and self._proposer is not None and self._proposer.wants_to_draft(decoding)
        if is_drafting and self._in_flight:
            return []  # a guess continues the last token, which is not read back yet
        chunks = self._decode(decoding, budget)
        if chunks is None:
            return []
        if is_drafting:
            chunks = self._with_drafts(chunks, budget)
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
                self._fail(sequence)
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
            if num_pending > 1 and not self._is_run(sequence):
                prefilling.append(sequence)
            elif not (num_samples and sequence.num_output_tokens + num_samples >= sequence.max_new_tokens):
                decoding.append(sequence)
        return decoding, prefilling

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
            chunk = self._next_run(sequence, 1 + max(0, num_spare_rows))
            num_spare_rows -= chunk.num_new_tokens - 1
            budget.num_extra_rows -= chunk.num_new_tokens - 1
            chunks.append(chunk)
        return chunks

    def _is_run(self, sequence: Sequence) -> bool:
        """Whether several forced tokens follow what was computed of an output; else a past is computed again."""
        if sequence.constraint is None or not sequence.is_prompt_launched:
            return False
        has_blocks = len(sequence.block_ids) * self._pool.block_size >= sequence.num_tokens
        return sequence.num_pending_tokens <= MAX_RUN_TOKENS or not has_blocks

    def _next_run(self, sequence: Sequence, most: int) -> Chunk:
        """Return a chunk of up to `most` tokens of a sequence that has a block for one at least."""
        start = sequence.num_launched_tokens
        num_pending = sequence.num_pending_tokens
        num_new = min(num_pending, most, MAX_RUN_TOKENS)
        num_needed = self._pool.blocks_for(start + num_new) - len(sequence.block_ids)
        if num_needed > 0 and num_needed <= self._pool.num_available:
            sequence.block_ids.extend(self._pool.allocate(num_needed))
        elif num_needed > 0:
            num_new = 1
        is_sampled = num_new == num_pending and sequence.max_new_tokens > 0
        return Chunk(sequence, start, num_new, is_sampled, is_run=num_new > 1)

    def _with_drafts(self, chunks: list[Chunk], budget: StepBudget) -> list[Chunk]:
        """Add guesses to the chunks of decoding sequences as far as budget, blocks and max_tokens allow."""
        assert self._proposer is not None
        drafted = []
        for chunk in chunks:
            sequence = chunk.sequence
            most = min(
                budget.num_extra_rows,
                budget.num_prefill_tokens,
                sequence.max_new_tokens - sequence.num_output_tokens - 1,
            )
            drafts = self._proposer.propose(sequence)[: max(0, most)] if chunk.is_sampled else ()
            num_needed = self._pool.blocks_for(chunk.end + len(drafts)) - len(sequence.block_ids)
            if drafts and num_needed <= self._pool.num_available:
                sequence.block_ids.extend(self._pool.allocate(max(0, num_needed)))
                chunk = Chunk(sequence, chunk.start, 1 + len(drafts), True, drafts)
                budget.num_extra_rows -= len(drafts)
                budget.num_prefill_tokens -= len(drafts)
            drafted.append(chunk)
        return drafted

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
        sequence.num_computed_tokens = sequence.num_launched_tokens = len(hit.block_ids) * self._pool.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.prompt_tokens_total += sequence.num_prompt_tokens
            self.cached_tokens_total += sequence.num_cached_tokens
            self.newly_admitted.append(sequence)
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
            if len(sequence.block_hashes) > sequence.num_published_blocks
        )

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        block_size = self._pool.block_size
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            parent_hash = hashes[-1] if hashes else _root_hash(sequence)
            hashes.append(chain_hash(parent_hash, sequence.token_ids[index * block_size : (index + 1) * block_size]))

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
        if sequence.num_computed_tokens >= (sequence.num_published_blocks + 1) * self._pool.block_size:
            self._publish_full_blocks(sequence)
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

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        if not self._enable_prefix_caching:
            return
        num_full = sequence.num_computed_tokens // self._pool.block_size
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_published_blocks, num_full):
            self._pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published_blocks = num_full

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

    def _fail(self, sequence: Sequence) -> None:
        self._pool.unpublish(sequence.block_ids)
        self._retire(sequence)

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


def _root_hash(sequence: Sequence) -> bytes:
    return root_hash(sequence.rope_base, is_deterministic=sequence.is_deterministic)
