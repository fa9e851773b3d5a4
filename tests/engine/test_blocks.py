"""The block pool: states, holders, the prefix cache and its eviction."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdserve.engine.blocks import PAD_BLOCK_ID, BlockPool, chain_hash, root_hash


def _hashes(count: int, *, salt: float = 1e4) -> list[bytes]:
    hashes = [root_hash(salt)]
    for index in range(count):
        hashes.append(chain_hash(hashes[-1], array("q", [index, index + 1])))
    return hashes[1:]


def _publish_chain(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    block_ids = pool.allocate(len(hashes))
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.publish(block_id, block_hash)
    return block_ids


def test_every_block_but_the_pad_block_is_handed_out_once() -> None:
    pool = BlockPool(num_blocks=5, block_size=2)
    block_ids = pool.allocate(5)
    assert sorted(block_ids) == [1, 2, 3, 4, 5]
    assert PAD_BLOCK_ID not in block_ids
    assert pool.num_available == 0
    pool.check([block_ids])
    with pytest.raises(ValueError, match="1 blocks asked for, 0 available"):
        pool.allocate(1)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="0 blocks of 4"):
        BlockPool(num_blocks=0, block_size=4)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(num_blocks=1, block_size=4).blocks_for(num_tokens) == num_blocks


def test_a_hash_covers_tokens_their_order_all_that_came_before_and_the_rope_base() -> None:
    root = root_hash(1e6)
    tokens = array("q", [5, 6])
    variants = {
        chain_hash(root, tokens),
        chain_hash(root, array("q", [6, 5])),
        chain_hash(root, array("q", [5, 6, 0])),
        chain_hash(root_hash(1_000_062.004), tokens),
        chain_hash(chain_hash(root, tokens), tokens),
    }
    assert len(variants) == 5
    assert chain_hash(root_hash(1e6), array("q", [5, 6])) in variants


def test_a_released_prefix_is_found_and_survives_until_blocks_are_needed() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    hashes = _hashes(3)
    block_ids = _publish_chain(pool, hashes[:2])
    pool.release(block_ids)
    assert (pool.num_held, pool.num_cached, pool.num_available) == (0, 2, 4)
    assert pool.match(hashes) == (block_ids, 2)
    pool.allocate(3)  # two free ones and the end of the chain: the beginning is worth more
    assert pool.match(hashes) == (block_ids[:1], 1)


def test_a_match_ends_at_the_first_gap() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    hashes = _hashes(3)
    first, second, third = pool.allocate(3)
    pool.publish(first, hashes[0])
    pool.publish(third, hashes[2])
    assert pool.match(hashes) == ([first], 0)
    pool.check([[first, second, third]])


def test_shared_blocks_stay_until_the_last_holder_is_gone() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    block_ids = _publish_chain(pool, _hashes(2))
    pool.acquire(block_ids)
    pool.check([block_ids, block_ids])
    pool.release(block_ids)
    assert pool.num_available == 0
    pool.check([block_ids])
    pool.release(block_ids)
    assert pool.num_available == 2
    pool.check([])


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    old, young = _hashes(1, salt=1.0), _hashes(1, salt=2.0)
    for hashes in (old, young):
        pool.release(_publish_chain(pool, hashes))
    hit = pool.match(old)
    pool.acquire(hit.block_ids)  # now `old` was used last
    pool.release(hit.block_ids)
    pool.allocate(1)
    assert pool.match(young).block_ids == []
    assert pool.match(old) == hit


def test_of_twins_computed_at_the_same_time_one_is_published() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    (block_hash,) = _hashes(1)
    first, twin = pool.allocate(2)
    pool.publish(first, block_hash)
    pool.publish(twin, block_hash)
    assert pool.match([block_hash]).block_ids == [first]
    pool.release([twin])
    assert pool.num_cached == 0
    pool.check([[first]])


def test_an_unpublished_block_is_not_found_again() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    hashes = _hashes(2)
    block_ids = _publish_chain(pool, hashes)
    pool.unpublish(block_ids)
    assert pool.match(hashes).block_ids == []
    pool.release(block_ids)
    assert pool.num_cached == 0
    pool.check([])


def test_whoever_holds_an_unpublished_block_goes_on_with_it_and_nobody_else_joins() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    block_ids = _publish_chain(pool, _hashes(2))
    pool.acquire(block_ids)
    pool.unpublish(block_ids)
    pool.check([block_ids, block_ids])
    with pytest.raises(AssertionError, match="is private"):
        pool.acquire(block_ids)
    pool.release(block_ids)
    pool.release(block_ids)
    assert (pool.num_cached, pool.num_available) == (0, 2)
    pool.check([])


def test_check_notices_a_leak_and_a_wrong_owner() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    (block_id,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="is in 0 states"):
        pool.check([])
    with pytest.raises(AssertionError, match="wrong count of holders"):
        pool.check([[block_id], [block_id]])
    with pytest.raises(AssertionError, match="is in 2 states"):
        pool.check([[block_id], [3 - block_id]])


@given(st.data())
def test_random_use_keeps_every_invariant(data: st.DataObject) -> None:
    """Owners take chains of a small alphabet, so that hits, twins, evictions and re-use all happen."""
    pool = BlockPool(num_blocks=6, block_size=1)
    owners: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if owners and data.draw(st.booleans()):
            pool.release(owners.pop(data.draw(st.integers(0, len(owners) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
            hashes = [root_hash(1.0)]
            for token in tokens:
                hashes.append(chain_hash(hashes[-1], array("q", [token])))
            hit = pool.match(hashes[1:])
            num_new = len(tokens) - len(hit.block_ids)
            if num_new + hit.num_unheld > pool.num_available:
                continue
            pool.acquire(hit.block_ids)
            owner = hit.block_ids + pool.allocate(num_new)
            owners.append(owner)
            for block_id, block_hash in list(zip(owner, hashes[1:], strict=True))[len(hit.block_ids) :]:
                pool.publish(block_id, block_hash)
        pool.check(owners)
    for owner in owners:
        pool.release(owner)
    pool.check([])
    assert pool.num_available == 6
