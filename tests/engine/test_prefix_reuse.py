"""Which of a sequence's blocks come from the prefix cache: full, computed, and of the same kind."""

from scheduler_bench import Bench, sizes_of


def test_a_second_request_reuses_full_blocks_but_computes_the_last_token() -> None:
    bench = Bench(block_size=4)
    for prompt, num_cached in ((range(12), 0), (range(12), 8), (range(13), 12), ([*range(8), 0, 0], 8), ([1], 0)):
        sequence = bench.add(prompt, max_tokens=1)
        bench.drain()
        assert sequence.num_cached_tokens == num_cached
    assert bench.scheduler.cached_tokens_total == 28
    assert bench.scheduler.prompt_tokens_total == 12 + 12 + 13 + 10 + 1


def test_generated_tokens_are_reused_by_the_next_turn() -> None:
    bench = Bench(block_size=4)
    first = bench.add(range(6), max_tokens=7)
    bench.drain()
    second = bench.add([*first.token_ids, 1, 2], max_tokens=3)
    bench.drain()
    assert second.num_cached_tokens == 12  # the 13th token was sampled and never computed on


def test_prefixes_of_two_rope_bases_are_not_shared() -> None:
    bench = Bench()
    for rope_base, num_cached in ((1e4, 0), (2e4, 0), (1e4, 8)):
        sequence = bench.add(range(9), rope_base=rope_base)
        bench.drain()
        assert sequence.num_cached_tokens == num_cached


def test_blocks_are_shared_among_deterministic_requests_and_among_the_others() -> None:
    """A deterministic answer must not read K and V whose last bits depended on what was computed beside them."""
    bench = Bench()
    for deterministic, num_cached in ((False, 0), (True, 0), (True, 8), (False, 8)):
        sequence = bench.add(range(9), deterministic=deterministic)
        bench.drain()
        assert sequence.num_cached_tokens == num_cached


def test_a_block_is_not_shared_before_the_step_that_computes_it_is_over() -> None:
    """A newcomer that came during a step would read K and V nobody has written yet."""
    bench = Bench(block_size=4, max_prefill_tokens=8)
    bench.add(range(8), max_tokens=3)
    chunks = bench.schedule()
    late = bench.add(range(9), max_tokens=3)
    assert late.num_cached_tokens is None
    bench.complete(chunks)
    bench.drain()
    assert late.num_cached_tokens == 8


def test_equal_prompts_that_come_together_compute_their_prefix_once() -> None:
    bench = Bench(block_size=4, max_prefill_tokens=100)
    sequences = [bench.add(range(10), max_tokens=3) for _ in range(4)]
    assert sizes_of(bench.step()) == {"r1": 10}
    assert sizes_of(bench.step()) == {"r1": 1, "r2": 2, "r3": 2, "r4": 2}
    bench.drain()
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 8, 8, 8]


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    bench = Bench(enable_prefix_caching=False)
    for _ in range(2):
        sequence = bench.add(range(12))
        bench.drain()
        assert sequence.num_cached_tokens == 0
    assert bench.pool.num_cached == 0
