"""Prefixes that are computed once: which blocks a sequence finds in the cache, and which of its own others find there.

Owns the hashes of a sequence's blocks. Who holds a block, and how long it is kept, is `blocks.py`'s business.
"""

from collections.abc import Iterable

from .blocks import BlockPool, PrefixHit, chain_hash, root_hash
from .sequence import Sequence


class PrefixCache:
    """The cache as the scheduler uses it; finds and keeps nothing where it is off."""

    def __init__(self, pool: BlockPool, *, is_enabled: bool) -> None:
        self._pool = pool
        self._is_enabled = is_enabled

    def find(self, sequence: Sequence, running: Iterable[Sequence]) -> PrefixHit | None:
        """Return the cached blocks that a sequence can begin with: full ones, short of its last token.

        None where one of the running sequences is about to publish the next block: waiting for it is cheaper than
        computing it twice.
        """
        if not self._is_enabled or sequence.wants_prompt_logprobs:
            return PrefixHit([], 0)
        num_blocks = (sequence.num_tokens - 1) // self._pool.block_size
        self._extend_hashes(sequence, num_blocks)
        hashes = sequence.block_hashes[:num_blocks]
        hit = self._pool.match(hashes)
        if len(hit.block_ids) < num_blocks and _is_being_computed(hashes[len(hit.block_ids)], running):
            return None
        return hit

    def publish(self, sequence: Sequence) -> None:
        """Let others find the blocks of a sequence that are full and computed."""
        num_full = sequence.num_computed_tokens // self._pool.block_size
        if num_full <= sequence.num_published_blocks or not self._is_enabled:
            return
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_published_blocks, num_full):
            self._pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published_blocks = num_full

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        block_size = self._pool.block_size
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            parent_hash = hashes[-1] if hashes else _root_hash(sequence)
            hashes.append(chain_hash(parent_hash, sequence.token_ids[index * block_size : (index + 1) * block_size]))


def _is_being_computed(block_hash: bytes, running: Iterable[Sequence]) -> bool:
    return any(
        block_hash in sequence.block_hashes[sequence.num_published_blocks :]
        for sequence in running
        if len(sequence.block_hashes) > sequence.num_published_blocks
    )


def _root_hash(sequence: Sequence) -> bytes:
    return root_hash(sequence.rope_base, is_deterministic=sequence.is_deterministic)
