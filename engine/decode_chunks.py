"""Chunks of sequences that decode, where a step computes more than one token of them: runs and guesses.

A run are tokens of the output that are known without a model, because a constraint leaves no other; guesses are a
proposer's. Both become further decode rows of the step. Blocks are taken for them as far as there are any to spare;
that a sequence has one for its next token at all, and who gives way for it, is `scheduler.py`'s business.
"""

from collections.abc import Iterable

from .blocks import BlockPool
from .sequence import Sequence
from .speculation import Proposer
from .step import Chunk, StepBudget

MAX_RUN_TOKENS = 24  # that are known, of an output, and computed as decode rows; more are computed like a prompt
MAX_ROWS_WITH_RUNS = 64  # of a step; with more, its products take longer for every further row


def is_run(sequence: Sequence, pool: BlockPool) -> bool:
    """Whether several forced tokens follow what was computed of an output; else a past is computed again."""
    if sequence.constraint is None or not sequence.is_prompt_launched:
        return False
    has_blocks = len(sequence.block_ids) * pool.block_size >= sequence.num_tokens
    return sequence.num_pending_tokens <= MAX_RUN_TOKENS or not has_blocks


def decode_chunk(sequence: Sequence, pool: BlockPool, max_tokens: int) -> Chunk:
    """Return the next `max_tokens` known tokens, or less, of a sequence that has a block for one at least."""
    num_pending = sequence.num_pending_tokens
    num_new = min(num_pending, max_tokens, MAX_RUN_TOKENS)
    if num_new > 1 and not _extend_blocks(sequence, pool, sequence.num_launched_tokens + num_new):
        num_new = 1
    is_sampled = num_new == num_pending and sequence.max_new_tokens > 0
    return Chunk(sequence, sequence.num_launched_tokens, num_new, is_sampled, is_run=num_new > 1)


def with_guesses(chunks: Iterable[Chunk], proposer: Proposer, pool: BlockPool, budget: StepBudget) -> list[Chunk]:
    """Return decoding sequences' chunks, with guesses as far as budget, blocks and max_tokens allow."""
    return [_with_guess(chunk, proposer, pool, budget) for chunk in chunks]


def _with_guess(chunk: Chunk, proposer: Proposer, pool: BlockPool, budget: StepBudget) -> Chunk:
    sequence = chunk.sequence
    num_wanted = sequence.max_new_tokens - sequence.num_output_tokens - 1
    most = max(0, min(budget.num_extra_rows, budget.num_prefill_tokens, num_wanted))
    drafts = proposer.propose(sequence)[:most] if chunk.is_sampled else ()
    if not drafts or not _extend_blocks(sequence, pool, chunk.end + len(drafts)):
        return chunk
    budget.num_extra_rows -= len(drafts)
    budget.num_prefill_tokens -= len(drafts)
    return Chunk(sequence, chunk.start, 1 + len(drafts), True, drafts)


def _extend_blocks(sequence: Sequence, pool: BlockPool, num_tokens: int) -> bool:
    """Give a sequence the blocks for so many tokens; False when there are not enough."""
    num_needed = pool.blocks_for(num_tokens) - len(sequence.block_ids)
    if num_needed > pool.num_available:
        return False
    sequence.block_ids.extend(pool.allocate(max(0, num_needed)))
    return True
