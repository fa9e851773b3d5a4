"""The scheduler without tensors: who runs, who waits, who gives way, and who is hurt when something fails."""

from array import array

import pytest
from scheduler_bench import (
    EOS,
    VOCAB_SIZE,
    Bench,
    Machine,
    expected_output,
    expected_until_eos,
    next_token,
    sizes_of,
)

from lmdserve.engine.api import EngineInfo, FinishReason, InvalidRequestError, Request, SamplingParams
from lmdserve.engine.blocks import BlockPool
from lmdserve.engine.scheduler import Scheduler
from lmdserve.engine.sequence import Sequence, SequenceStatus, new_sequence
from lmdserve.engine.step import MAX_PROMPT_LOGPROB_ROWS, ChunkResult


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    bench = Bench(max_prefill_tokens=4)
    sequence = bench.add(range(10), max_tokens=2)
    assert [sizes_of(bench.step()) for _ in range(5)] == [{"r1": 4}, {"r1": 4}, {"r1": 2}, {"r1": 1}, {}]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.token_ids[10:].tolist() == expected_output(sequence, range(10))


def test_decoding_goes_on_beside_every_chunk_of_a_long_prompt() -> None:
    bench = Bench(max_prefill_tokens=4)
    bench.add([1, 2], max_tokens=20)
    bench.step()
    bench.add(range(12), max_tokens=1)
    assert [sizes_of(bench.step()) for _ in range(3)] == [{"r1": 1, "r2": 4}] * 3


def test_the_prefill_budget_is_shared_first_come_first_served() -> None:
    bench = Bench(max_prefill_tokens=10, enable_prefix_caching=False)
    for length in (7, 5, 3):
        bench.add(range(length))
    assert sizes_of(bench.step()) == {"r1": 7, "r2": 3}
    assert sizes_of(bench.step()) == {"r1": 1, "r2": 2, "r3": 3}


def test_no_more_sequences_run_than_the_batch_holds() -> None:
    bench = Bench(max_batch_size=2)
    for _ in range(3):
        bench.add([1, 2, 3], max_tokens=2)
    assert set(sizes_of(bench.step())) == {"r1", "r2"}
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.step()
    assert set(sizes_of(bench.step())) == {"r3"}


def test_a_stop_token_ends_a_sequence_unless_it_is_to_be_ignored() -> None:
    bench = Bench()
    prompt = next([n] for n in range(VOCAB_SIZE) if expected_until_eos([n]) is not None)
    stopped = bench.add(prompt, max_tokens=30, ignore_eos=False)
    ignoring = bench.add(prompt, max_tokens=30)
    bench.drain()
    assert (stopped.finish_reason, stopped.token_ids[-1]) == (FinishReason.STOP, EOS)
    assert (ignoring.finish_reason, ignoring.num_output_tokens) == (FinishReason.LENGTH, 30)


def test_without_output_wanted_the_prompt_is_computed_and_that_is_all() -> None:
    bench = Bench(max_prefill_tokens=4)
    sequence = bench.add(range(6), max_tokens=0, num_prompt_logprobs=0)
    assert [sizes_of(bench.step()) for _ in range(3)] == [{"r1": 4}, {"r1": 2}, {}]
    assert (sequence.finish_reason, sequence.num_output_tokens) == (FinishReason.LENGTH, 0)
    assert [logprob.token_id for logprob in sequence.prompt_logprobs] == [1, 2, 3, 4, 5]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    bench = Bench(num_blocks=4, block_size=4)
    bench.add(range(10), max_tokens=7)  # 16 places: the last token is never computed on
    with pytest.raises(InvalidRequestError, match=r"17 tokens and the KV cache holds 16"):
        bench.add(range(10), max_tokens=8)
    bench.drain()


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    sequence = bench.add([1])
    with pytest.raises(InvalidRequestError, match="r1 is running already"):
        bench.scheduler.add(sequence)


def test_prompt_logprobs_are_computed_for_every_token_also_of_a_cached_prompt() -> None:
    bench = Bench(block_size=4, max_prefill_tokens=5)
    bench.add(range(12))
    bench.drain()
    sequence = bench.add(range(12), num_prompt_logprobs=0)
    bench.drain()
    assert sequence.num_cached_tokens == 0
    assert [logprob.token_id for logprob in sequence.prompt_logprobs] == list(range(1, 12))


def test_rows_for_prompt_logprobs_are_rationed_and_others_are_not_held_up() -> None:
    info = EngineInfo(vocab_size=VOCAB_SIZE, session_len=2000, eos_token_ids=frozenset())
    pool = BlockPool(num_blocks=200, block_size=16)
    scheduler = Scheduler(
        pool, max_batch_size=4, max_prefill_tokens=1000, max_decode_rows=4, enable_prefix_caching=True
    )
    prompt = [n % VOCAB_SIZE for n in range(600)]
    for uid, num_prompt_logprobs in (("asks", 0), ("asks too", 0), ("plain", None)):
        request = Request(
            uid=uid,
            prompt_token_ids=prompt[: 400 if uid == "plain" else None],
            sampling=SamplingParams(max_tokens=1),
            num_prompt_logprobs=num_prompt_logprobs,
        )
        scheduler.add(new_sequence(request, info=info, rope_base_for=lambda n: 1e4))
    machine = Machine(pool)
    seen = []
    while chunks := scheduler.schedule():
        seen.append(sizes_of(chunks))
        scheduler.complete(chunks, machine.run(chunks))
    assert seen[0] == {"asks": MAX_PROMPT_LOGPROB_ROWS}
    assert sum(sizes.get("asks", 0) for sizes in seen) == 600
    assert all(sum(sizes.get(uid, 0) for uid in ("asks", "asks too")) <= MAX_PROMPT_LOGPROB_ROWS for sizes in seen)


def test_when_blocks_run_out_the_newest_gives_way_and_loses_nothing() -> None:
    bench = Bench(num_blocks=6, block_size=4)
    sequences = [bench.add([n] * 7, max_tokens=9) for n in range(3)]
    statuses = []
    while bench.step():
        statuses.append(tuple(sequence.status for sequence in sequences))
    assert bench.scheduler.preemptions_total > 0
    assert any(s[0] is SequenceStatus.RUNNING and s[2] is SequenceStatus.WAITING for s in statuses)
    for n, sequence in enumerate(sequences):
        assert sequence.token_ids[7:].tolist() == expected_output(sequence, [n] * 7)
    assert bench.pool.num_available == 6


def test_the_oldest_always_advances_and_finishes_first() -> None:
    bench = Bench(num_blocks=4, block_size=2)
    sequences = [bench.add([n, n + 1], max_tokens=6) for n in range(5)]
    finished = []
    while chunks := bench.schedule():
        oldest = min((s for s in sequences if s.finish_reason is None), key=lambda s: int(s.uid[1:]))
        assert any(chunk.sequence is oldest for chunk in chunks)
        finished += [p.sequence.uid for p in bench.complete(chunks) if p.sequence.finish_reason]
    assert finished == ["r1", "r2", "r3", "r4", "r5"]


def test_a_preempted_sequence_goes_before_those_that_never_ran() -> None:
    bench = Bench(num_blocks=5, block_size=2, max_batch_size=2)
    for n in range(3):
        bench.add([n, n + 1, n + 2], max_tokens=5)
    order: list[str] = []
    while chunks := bench.step():
        order += [chunk.sequence.uid for chunk in chunks if chunk.sequence.uid not in order]
    assert order == ["r1", "r2", "r3"]
    assert bench.scheduler.preemptions_total > 0


def test_a_preempted_sequence_finds_its_blocks_in_the_cache() -> None:
    bench = Bench(num_blocks=7, block_size=2, max_prefill_tokens=100)
    bench.add([1, 2, 3, 4], max_tokens=7)
    second = bench.add([5, 6, 7, 8], max_tokens=9)
    while not bench.scheduler.preemptions_total:
        bench.step()
    num_tokens = second.num_tokens
    resumed = next(c for _ in range(100) for c in bench.step() if c.sequence is second)
    assert (num_tokens, resumed.num_new_tokens) == (7, 3)  # of its three full blocks one was needed meanwhile
    bench.drain()
    assert second.num_cached_tokens == 0  # what the reader is told is about the prompt's first time


@pytest.mark.parametrize("when", ["waiting", "between steps", "in flight"])
def test_an_abort_frees_everything_within_the_step(when: str) -> None:
    bench = Bench(max_batch_size=1)
    first = bench.add(range(6))
    second = bench.add(range(10, 16))
    if when == "waiting":
        bench.scheduler.abort(second.uid)
        bench.scheduler.check()
        assert bench.scheduler.num_waiting == 1
        return
    chunks = bench.schedule()
    if when == "in flight":
        bench.scheduler.abort(first.uid)
        bench.scheduler.check()
        assert bench.pool.num_held == 2, "a step in flight still writes into these blocks"
        assert bench.complete(chunks) == []
    else:
        bench.complete(chunks)
        bench.scheduler.abort(first.uid)
        bench.scheduler.check()
    assert first.finish_reason is FinishReason.ABORT
    assert bench.pool.num_held == 0
    bench.scheduler.abort(first.uid)  # late and repeated aborts are harmless
    bench.drain()
    assert second.finish_reason is FinishReason.LENGTH


def test_a_failure_ends_that_sequence_alone_and_its_blocks_are_not_reused_as_cache() -> None:
    bench = Bench(block_size=4, max_prefill_tokens=8)
    bad, good = bench.add(range(12)), bench.add(range(20, 24))
    bench.step()
    chunks = bench.schedule()
    results = bench.machine.run(chunks)
    results[[chunk.sequence for chunk in chunks].index(bad)] = ChunkResult(failure="not a number")
    progress = bench.scheduler.complete(chunks, results)
    bench.scheduler.check()
    assert [p.result.failure for p in progress if p.sequence is bad] == ["not a number"]
    assert (bad.status, bad.finish_reason) == (SequenceStatus.FINISHED, None)
    bench.drain()
    assert good.token_ids[4:].tolist() == expected_output(good, range(20, 24))
    again = bench.add(range(12))
    bench.drain()
    assert again.num_cached_tokens == 0


def _fail(bench: Bench, sequence: Sequence, failure: ChunkResult) -> None:
    """Complete a step with every sequence in which one fails."""
    chunks = bench.schedule()
    results = bench.machine.run(chunks)
    results[[chunk.sequence for chunk in chunks].index(sequence)] = failure
    bench.scheduler.complete(chunks, results)
    bench.scheduler.check()


@pytest.mark.parametrize(("spares_cache", "num_cached"), [(False, 0), (True, 8)])
def test_a_failure_beside_others_of_the_same_prefix(spares_cache: bool, num_cached: int) -> None:
    """Blocks that a failing request shared were private and held twice; and a constraint's failure says nothing
    about what was computed, so that a client whose grammars fail must not cost others their common prefix."""
    bench = Bench(block_size=4, max_prefill_tokens=100)
    good = bench.add(range(9), max_tokens=20)
    bench.step()
    bad = bench.add([*range(8), 30], max_tokens=20)
    bench.step()
    assert bad.num_cached_tokens == 8
    _fail(bench, bad, ChunkResult(failure="of its own", spares_cache=spares_cache))
    late = bench.add([*range(8), 31])
    bench.drain()
    assert good.token_ids[9:].tolist() == expected_output(good, range(9))
    assert late.num_cached_tokens == num_cached


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_known() -> None:
    bench = Bench(depth=2, max_prefill_tokens=4)
    sequence = bench.add(range(6), max_tokens=3)
    assert [sizes_of(bench.launch()), sizes_of(bench.launch())] == [{"r1": 4}, {"r1": 2}]
    bench.land()
    (chunk,) = bench.launch()
    assert (chunk.start, chunk.end, sequence.num_tokens) == (6, 7, 6)
    assert (chunk.is_sampled, chunk.output_position) == (True, 1)
    bench.land()
    (chunk,) = bench.launch()
    assert (chunk.start, sequence.num_tokens) == (7, 7)
    bench.land()
    assert bench.launch() == [], "the step in flight brings the last token that is wanted"
    bench.land()
    assert sequence.token_ids[6:].tolist() == expected_output(sequence, range(6))
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_sequence_that_ends_in_flight_keeps_blocks_and_slot_until_its_last_step_is_over() -> None:
    bench = Bench(depth=2, max_batch_size=1)
    prompt = next([n] for n in range(VOCAB_SIZE) if next_token(1e4, [n]) == EOS)
    stopped = bench.add(prompt, max_tokens=9, ignore_eos=False)
    waiting = bench.add([1, 2], max_tokens=2)
    bench.launch()
    (wasted,) = bench.launch()
    assert wasted.sequence is stopped
    (progress,) = bench.land()
    assert (progress.sequence, stopped.finish_reason) == (stopped, FinishReason.STOP)
    assert (bench.scheduler.num_running, bench.pool.num_held) == (0, 1)
    assert bench.launch() == [], "the only slot is still taken"
    assert bench.land() == [], "what came after the stop token is nobody's"
    assert stopped.token_ids.tolist() == [*prompt, EOS]
    assert bench.pool.num_held == 0
    bench.drain()
    assert waiting.token_ids[2:].tolist() == expected_output(waiting, [1, 2])


def test_an_abort_of_a_sequence_in_two_steps_frees_it_with_the_second() -> None:
    bench = Bench(depth=2)
    sequence = bench.add(range(6))
    bench.launch()
    bench.launch()
    bench.scheduler.abort(sequence.uid)
    bench.scheduler.check()
    assert bench.land() == []
    assert bench.pool.num_held == 2
    assert bench.land() == []
    assert bench.pool.num_held == 0


def test_a_failure_drops_what_was_launched_on_top_of_it() -> None:
    bench = Bench(depth=2)
    bad, good = bench.add(range(6)), bench.add(range(20, 26))
    first, _ = bench.launch(), bench.launch()
    results = bench.machine.collect()
    results[[chunk.sequence for chunk in first].index(bad)] = ChunkResult(failure="not a number")
    progress = bench.scheduler.complete(bench.in_flight.popleft(), results)
    assert {p.sequence: p.result.failure for p in progress} == {bad: "not a number", good: None}
    assert [p.sequence for p in bench.land()] == [good]
    bench.drain()
    assert (bad.status, bad.finish_reason, bad.num_output_tokens) == (SequenceStatus.FINISHED, None, 0)
    assert good.token_ids[6:].tolist() == expected_output(good, range(20, 26))


def test_before_a_sequence_gives_way_the_steps_in_flight_come_back() -> None:
    bench = Bench(depth=2, num_blocks=6, block_size=4)
    sequences = [bench.add([n] * 7, max_tokens=9) for n in range(3)]
    while bench.is_busy:
        num_preemptions, num_in_flight = bench.scheduler.preemptions_total, len(bench.in_flight)
        bench.step()
        assert num_in_flight == 0 or bench.scheduler.preemptions_total == num_preemptions
    assert bench.scheduler.preemptions_total > 0
    for n, sequence in enumerate(sequences):
        assert sequence.token_ids[7:].tolist() == expected_output(sequence, [n] * 7)


def test_slots_are_the_lowest_that_are_free() -> None:
    bench = Bench(max_batch_size=4)
    first, second, third = (bench.add([n], max_tokens=count) for n, count in ((1, 9), (2, 1), (3, 9)))
    bench.step()
    assert (first.slot, second.slot, third.slot) == (0, 1, 2)
    fourth = bench.add([4])
    bench.step()
    assert fourth.slot == 1
    bench.drain()


def test_results_are_booked_in_the_order_of_the_steps() -> None:
    bench = Bench(depth=2)
    bench.add(range(3))
    bench.launch()
    second = bench.launch()
    with pytest.raises(ValueError, match="in the order"):
        bench.scheduler.complete(second, bench.machine.collect())


def test_token_ids_are_one_array_of_64_bit_numbers() -> None:
    """Hashes and tensors are made of its bytes."""
    assert Bench().add([1, 2, 3]).token_ids == array("q", [1, 2, 3])
