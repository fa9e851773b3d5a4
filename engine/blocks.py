"""Who holds which KV block, and which blocks hold a prefix worth keeping: free list, reference counts, prefix cache.

Ids only: the bytes of a block are in `kv_cache.py`, the order of allocation is the scheduler's business. A block is in
exactly one of three states: free (nothing in it), cached (nobody holds it, but it is published under the hash of the
prefix it completes, until it is evicted, least recently used first), or held (by one sequence; by more when published).
Block 0 is the pad block: it is never handed out, and block tables are padded with it.
"""

import hashlib
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PAD_BLOCK_ID = 0
HASH_BYTES = 32  # nobody can construct two prefixes with one hash, so a hit needs no comparison of tokens


class PrefixHit(NamedTuple):
    """The cached blocks that begin a sequence, and how many of them no sequence holds at the moment."""

    block_ids: list[int]
    num_unheld: int


def root_hash(rope_base: float, *, is_deterministic: bool = False) -> bytes:
    """Return the parent of a first block; prefixes of two roots never meet.

    K depends on the RoPE base, and the last bits of K and V on whether they were computed deterministically.
    """
    return hashlib.blake2b(struct.pack("<d?", rope_base, is_deterministic), digest_size=HASH_BYTES).digest()


def chain_hash(parent_hash: bytes, token_ids: "array[int]") -> bytes:
    """Return the hash of a full block: it stands for these tokens and, through the parent, for all tokens before."""
    return hashlib.blake2b(parent_hash + token_ids.tobytes(), digest_size=HASH_BYTES).digest()


class BlockPool:
    """The blocks 1..num_blocks. Not thread-safe: it lives on the event loop, with the scheduler."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and a block needs tokens, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks, 0, -1))  # a stack: the block freed last is used first and still warm
        self._unheld: OrderedDict[int, None] = OrderedDict()  # cached blocks, least recently used first
        self._num_holders = [0] * (num_blocks + 1)
        self._hash_by_block: list[bytes | None] = [None] * (num_blocks + 1)
        self._block_by_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._unheld)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds that keep a reusable prefix."""
        return len(self._unheld)

    @property
    def num_held(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> PrefixHit:
        """Return the published blocks of the longest prefix of `hashes`. Nothing is acquired yet."""
        block_ids = []
        num_unheld = 0
        for block_hash in hashes:
            block_id = self._block_by_hash.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
            num_unheld += self._num_holders[block_id] == 0
        return PrefixHit(block_ids, num_unheld)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Hold published blocks once more; each is released on its own."""
        for block_id in block_ids:
            assert self._hash_by_block[block_id] is not None, f"block {block_id} is private"
            if self._num_holders[block_id] == 0:
                del self._unheld[block_id]
            self._num_holders[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out blocks with nothing in them, evicting cached prefixes when the free ones are used up."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        return [self._take_one() for _ in range(count)]

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one hold on each block of a sequence; a prefix outlives its continuations in the cache."""
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] > 0:
                continue
            if self._hash_by_block[block_id] is None:
                self._free.append(block_id)
            else:
                self._unheld[block_id] = None

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let others find a held, fully computed block. The first block of a hash stays; a twin remains private."""
        if block_hash not in self._block_by_hash and self._hash_by_block[block_id] is None:
            self._block_by_hash[block_hash] = block_id
            self._hash_by_block[block_id] = block_hash

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Take blocks out of the prefix cache, so that nobody finds them any more; who holds one goes on with it."""
        for block_id in block_ids:
            block_hash = self._hash_by_block[block_id]
            if block_hash is not None:
                del self._block_by_hash[block_hash]
                self._hash_by_block[block_id] = None

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Verify every invariant against the block tables of all owners; raise AssertionError at the first breach."""
        holders = Counter(block_id for owner in owners for block_id in owner)
        free, unheld = set(self._free), set(self._unheld)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert PAD_BLOCK_ID not in holders.keys() | free | unheld, "the pad block was handed out"
        for block_id in range(1, self.num_blocks + 1):
            states = (block_id in free) + (block_id in unheld) + (block_id in holders)
            assert states == 1, f"block {block_id} is in {states} states"
            assert holders[block_id] == self._num_holders[block_id], f"block {block_id} has a wrong count of holders"
            is_published = self._hash_by_block[block_id] is not None
            assert not (block_id in free and is_published), f"free block {block_id} is published"
            assert not (block_id in unheld and not is_published), f"block {block_id} is kept for nothing"
        for block_hash, block_id in self._block_by_hash.items():
            assert self._hash_by_block[block_id] == block_hash, f"block {block_id} is published under another hash"
        num_published = sum(block_hash is not None for block_hash in self._hash_by_block)
        assert num_published == len(self._block_by_hash), "a block believes it is published and cannot be found"

    def _take_one(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._unheld.popitem(last=False)
            self.unpublish((block_id,))
        self._num_holders[block_id] = 1
        return block_id
