"""The scheduler without tensors: who runs, who waits, who gives way, and that no token ever reads a wrong block.

`Machine` stands for runner, model and KV cache, with up to two steps in flight: its memory remembers for which prefix
each place was computed, so that a block shared, evicted or reused wrongly shows at once; its next token is a hash of
the whole prefix, and the last one of each sequence is found by slot, as on a device.
"""

import hashlib
import random
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmdserve.engine.api import EngineInfo, FinishReason, InvalidRequestError, Request, SamplingParams, TokenLogprob
from lmdserve.engine.blocks import BlockPool
from lmdserve.engine.scheduler import Progress, Scheduler
from lmdserve.engine.sequence import Sequence, SequenceStatus, new_sequence
from lmdserve.engine.step import MAX_PROMPT_LOGPROB_ROWS, Chunk, ChunkResult

VOCAB_SIZE = 50
EOS = 49
INFO = EngineInfo(vocab_size=VOCAB_SIZE, session_len=64, eos_token_ids=frozenset({EOS}))


def _digest(rope_base: float, token_ids: SequenceOf[int]) -> bytes:
    return hashlib.sha256(repr((rope_base, list(token_ids))).encode()).digest()


def _next_token(rope_base: float, token_ids: SequenceOf[int]) -> int:
    return _digest(rope_base, token_ids)[0] % VOCAB_SIZE


def _expected_output(sequence: Sequence, prompt: SequenceOf[int]) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < sequence.max_new_tokens:
        token_ids.append(_next_token(sequence.rope_base, token_ids))
        if token_ids[-1] in sequence.stop_token_ids:
            break
    return token_ids[len(prompt) :]


class Launched(NamedTuple):
    """A chunk as it was when it was launched, and what comes of it."""

    chunk: Chunk
    slot: int
    block_ids: "array[int]"
    result: ChunkResult


class Machine:
    """Computes chunks against a memory of prefixes, place by place, and keeps results until they are collected."""

    def __init__(self, pool: BlockPool) -> None:
        self._block_size = pool.block_size
        self._memory: dict[int, bytes] = {}
        self._last_token: dict[int, tuple[Sequence, int]] = {}  # by slot: whose, and the token sampled last
        self._in_flight: deque[list[Launched]] = deque()

    def launch(self, chunks: SequenceOf[Chunk]) -> None:
        slots = [chunk.sequence.slot for chunk in chunks]
        assert len(set(slots)) == len(slots), "two sequences of a step have the same slot"
        histories = [self._history(chunk) for chunk in chunks]
        for chunk, history in zip(chunks, histories, strict=True):  # all writes of a step come before its reads
            for position in range(chunk.start, chunk.end):
                self._memory[self._place(chunk.sequence, position)] = self._prefix(chunk.sequence, history, position)
        self._in_flight.append(
            [
                Launched(chunk, chunk.sequence.slot, chunk.sequence.block_ids[:], self._result(chunk, history))
                for chunk, history in zip(chunks, histories, strict=True)
            ]
        )

    def collect(self) -> list[ChunkResult]:
        """Return the oldest step's results; until now nobody may have taken anything from its sequences."""
        step = self._in_flight.popleft()
        for chunk, slot, block_ids, _ in step:
            assert chunk.sequence.slot == slot, "a sequence changed its slot in flight"
            assert chunk.sequence.block_ids[: len(block_ids)] == block_ids, "a sequence lost a block in flight"
        return [launched.result for launched in step]

    def run(self, chunks: SequenceOf[Chunk]) -> list[ChunkResult]:
        self.launch(chunks)
        return self.collect()

    def _history(self, chunk: Chunk) -> list[int]:
        """Return the tokens up to the chunk's end: the host's, the one that only the machine knows, the drafts."""
        sequence = chunk.sequence
        history = sequence.token_ids.tolist()
        if chunk.start == len(history):
            owner, token_id = self._last_token[sequence.slot]
            assert owner is sequence, "the slot's last token is another sequence's"
            history.append(token_id)
        history += chunk.draft_token_ids
        assert chunk.end <= len(history), "a chunk goes beyond what is known"
        assert not chunk.is_sampled or chunk.end == len(history), "sampling before the end of what is known"
        return history

    def _result(self, chunk: Chunk, history: list[int]) -> ChunkResult:
        sequence = chunk.sequence
        for position in range(chunk.end):
            known = self._memory[self._place(sequence, position)]
            assert known == self._prefix(sequence, history, position), "wrong KV was read"
        targets = range(chunk.start + 1, chunk.start + 1 + chunk.num_prompt_logprobs)
        logprobs = tuple(TokenLogprob(history[target], -1.0, ()) for target in targets)
        if not chunk.is_sampled:
            return ChunkResult(prompt_logprobs=logprobs)
        token_ids: list[int] = []
        num_known = chunk.end - len(chunk.draft_token_ids)
        assert chunk.output_position == num_known - sequence.num_prompt_tokens
        for draft in (*chunk.draft_token_ids, None):
            token_ids.append(_next_token(sequence.rope_base, history[: num_known + len(token_ids)]))
            if token_ids[-1] != draft:
                break
        self._last_token[sequence.slot] = (sequence, token_ids[-1])
        return ChunkResult(tuple(token_ids), prompt_logprobs=logprobs)

    def _place(self, sequence: Sequence, position: int) -> int:
        return sequence.block_ids[position // self._block_size] * self._block_size + position % self._block_size

    def _prefix(self, sequence: Sequence, history: list[int], position: int) -> bytes:
        digest = _digest(sequence.rope_base, history[: position + 1])
        return digest + bytes([sequence.is_deterministic])


class Bench:
    """A scheduler, its pool and its machine, driven step by step with every invariant checked."""

    def __init__(self, *, num_blocks: int = 32, block_size: int = 4, depth: int = 1, **options: Any) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
        limits = {"max_batch_size": 8, "max_prefill_tokens": 16, "enable_prefix_caching": True} | options
        self.scheduler = Scheduler(self.pool, **({"max_decode_rows": limits["max_batch_size"]} | limits))
        self.machine = Machine(self.pool)
        self.depth = depth
        self.in_flight: deque[list[Chunk]] = deque()
        self._num_added = 0

    def add(self, prompt: SequenceOf[int], *, max_tokens: int = 5, rope_base: float = 1e4, **fields: Any) -> Sequence:
        self._num_added += 1
        sequence = new_sequence(
            Request(
                uid=f"r{self._num_added}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=fields.pop("ignore_eos", True)),
                **fields,
            ),
            info=INFO,
            rope_base_for=lambda num_tokens: rope_base,
        )
        self.scheduler.add(sequence)
        return sequence

    def schedule(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self.scheduler.check()
        return chunks

    def complete(self, chunks: list[Chunk]) -> list[Progress]:
        progress = self.scheduler.complete(chunks, self.machine.run(chunks))
        self.scheduler.check()
        return progress

    def launch(self) -> list[Chunk]:
        """Schedule a step and launch it; nothing where the scheduler has to wait for what is in flight."""
        chunks = self.schedule()
        if chunks:
            self.machine.launch(chunks)
            self.in_flight.append(chunks)
        return chunks

    def land(self) -> list[Progress]:
        """Complete the oldest step in flight."""
        progress = self.scheduler.complete(self.in_flight.popleft(), self.machine.collect())
        self.scheduler.check()
        return progress

    def step(self) -> list[Chunk]:
        """Do what the loop does: launch a step if possible, and wait for the oldest when the machine is full."""
        chunks = self.launch() if len(self.in_flight) < self.depth else []
        has_drafts = any(chunk.draft_token_ids for chunk in chunks)
        if self.in_flight and (not chunks or has_drafts or len(self.in_flight) == self.depth):
            self.land()
        return chunks

    @property
    def is_busy(self) -> bool:
        return self.scheduler.num_running + self.scheduler.num_waiting + self.scheduler.num_steps_in_flight > 0

    def drain(self, *, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.is_busy:
                break
            self.step()
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_steps_in_flight == 0
        assert self.pool.num_available == self.pool.num_blocks


def _sizes(chunks: list[Chunk]) -> dict[str, int]:
    return {chunk.sequence.uid: chunk.num_new_tokens for chunk in chunks}


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    bench = Bench(max_prefill_tokens=4)
    sequence = bench.add(range(10), max_tokens=2)
    assert [_sizes(bench.step()) for _ in range(5)] == [{"r1": 4}, {"r1": 4}, {"r1": 2}, {"r1": 1}, {}]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.token_ids[10:].tolist() == _expected_output(sequence, range(10))


def test_decoding_goes_on_beside_every_chunk_of_a_long_prompt() -> None:
    bench = Bench(max_prefill_tokens=4)
    bench.add([1, 2], max_tokens=20)
    bench.step()
    bench.add(range(12), max_tokens=1)
    assert [_sizes(bench.step()) for _ in range(3)] == [{"r1": 1, "r2": 4}] * 3


def test_the_prefill_budget_is_shared_first_come_first_served() -> None:
    bench = Bench(max_prefill_tokens=10, enable_prefix_caching=False)
    for length in (7, 5, 3):
        bench.add(range(length))
    assert _sizes(bench.step()) == {"r1": 7, "r2": 3}
    assert _sizes(bench.step()) == {"r1": 1, "r2": 2, "r3": 3}


def test_no_more_sequences_run_than_the_batch_holds() -> None:
    bench = Bench(max_batch_size=2)
    for _ in range(3):
        bench.add([1, 2, 3], max_tokens=2)
    assert set(_sizes(bench.step())) == {"r1", "r2"}
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.step()
    assert set(_sizes(bench.step())) == {"r3"}


def test_a_stop_token_ends_a_sequence_unless_it_is_to_be_ignored() -> None:
    bench = Bench()
    prompt = next([n] for n in range(VOCAB_SIZE) if _expected_until_eos([n]) is not None)
    stopped = bench.add(prompt, max_tokens=30, ignore_eos=False)
    ignoring = bench.add(prompt, max_tokens=30)
    bench.drain()
    assert (stopped.finish_reason, stopped.token_ids[-1]) == (FinishReason.STOP, EOS)
    assert (ignoring.finish_reason, ignoring.num_output_tokens) == (FinishReason.LENGTH, 30)


def _expected_until_eos(prompt: list[int]) -> list[int] | None:
    token_ids = list(prompt)
    for _ in range(29):
        token_ids.append(_next_token(1e4, token_ids))
        if token_ids[-1] == EOS:
            return token_ids
    return None


def test_without_output_wanted_the_prompt_is_computed_and_that_is_all() -> None:
    bench = Bench(max_prefill_tokens=4)
    sequence = bench.add(range(6), max_tokens=0, num_prompt_logprobs=0)
    assert [_sizes(bench.step()) for _ in range(3)] == [{"r1": 4}, {"r1": 2}, {}]
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
    assert _sizes(bench.step()) == {"r1": 10}
    assert _sizes(bench.step()) == {"r1": 1, "r2": 2, "r3": 2, "r4": 2}
    bench.drain()
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 8, 8, 8]


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    bench = Bench(enable_prefix_caching=False)
    for _ in range(2):
        sequence = bench.add(range(12))
        bench.drain()
        assert sequence.num_cached_tokens == 0
    assert bench.pool.num_cached == 0


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
        seen.append(_sizes(chunks))
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
        assert sequence.token_ids[7:].tolist() == _expected_output(sequence, [n] * 7)
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
    assert good.token_ids[4:].tolist() == _expected_output(good, range(20, 24))
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
    assert good.token_ids[9:].tolist() == _expected_output(good, range(9))
    assert late.num_cached_tokens == num_cached


def _until_idle(bench: Bench) -> list[dict[str, int]]:
    """Step until nothing is left; return the sizes of each step's chunks, empty where the scheduler had to wait."""
    sizes = []
    while bench.is_busy:
        sizes.append(_sizes(bench.step()))
    return sizes


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_known() -> None:
    bench = Bench(depth=2, max_prefill_tokens=4)
    sequence = bench.add(range(6), max_tokens=3)
    assert [_sizes(bench.launch()), _sizes(bench.launch())] == [{"r1": 4}, {"r1": 2}]
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
    assert sequence.token_ids[6:].tolist() == _expected_output(sequence, range(6))
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_sequence_that_ends_in_flight_keeps_blocks_and_slot_until_its_last_step_is_over() -> None:
    bench = Bench(depth=2, max_batch_size=1)
    prompt = next([n] for n in range(VOCAB_SIZE) if _next_token(1e4, [n]) == EOS)
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
    assert waiting.token_ids[2:].tolist() == _expected_output(waiting, [1, 2])


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
    assert good.token_ids[6:].tolist() == _expected_output(good, range(20, 26))


def test_before_a_sequence_gives_way_the_steps_in_flight_come_back() -> None:
    bench = Bench(depth=2, num_blocks=6, block_size=4)
    sequences = [bench.add([n] * 7, max_tokens=9) for n in range(3)]
    while bench.is_busy:
        num_preemptions, num_in_flight = bench.scheduler.preemptions_total, len(bench.in_flight)
        bench.step()
        assert num_in_flight == 0 or bench.scheduler.preemptions_total == num_preemptions
    assert bench.scheduler.preemptions_total > 0
    for n, sequence in enumerate(sequences):
        assert sequence.token_ids[7:].tolist() == _expected_output(sequence, [n] * 7)


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


class Guesser:
    """A proposer that knows what comes, and guesses wrong from the place on that `num_right` gives it."""

    def __init__(self, num_right: Callable[[], int], num_drafts: int = 4) -> None:
        self._num_right = num_right
        self._num_drafts = num_drafts
        self.is_on = True

    def wants_to_draft(self, sequences: SequenceOf[Sequence]) -> bool:
        return self.is_on

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        assert sequence.num_samples_in_flight == 0, "a guess continues a token that is known"
        history = sequence.token_ids.tolist()
        num_right = self._num_right()
        for place in range(self._num_drafts):
            right = _next_token(sequence.rope_base, history)
            history.append(right if place < num_right else (right + 1) % VOCAB_SIZE)
        return tuple(history[sequence.num_tokens :])

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        raise AssertionError("nobody measures time here")


def test_right_guesses_bring_several_tokens_a_step() -> None:
    bench = Bench(depth=2, proposer=Guesser(lambda: 2))
    sequence = bench.add(range(3), max_tokens=10)
    assert _until_idle(bench) == [{"r1": 3}, {}, {"r1": 5}, {"r1": 5}, {"r1": 3}]
    assert sequence.token_ids[3:].tolist() == _expected_output(sequence, range(3))
    assert sequence.finish_reason is FinishReason.LENGTH
    assert bench.scheduler.drafted_tokens_total == 4 + 4 + 2
    assert bench.scheduler.accepted_tokens_total == 2 + 2 + 2
    assert bench.scheduler.generation_tokens_total == 10


def test_a_stop_token_among_right_guesses_ends_the_sequence_there() -> None:
    bench = Bench(proposer=Guesser(lambda: 4), block_size=1)
    prompt = next([n] for n in range(VOCAB_SIZE) if 3 < len(_expected_until_eos([n]) or ()) < 7)
    sequence = bench.add(prompt, max_tokens=30, ignore_eos=False)
    bench.drain()
    assert sequence.token_ids.tolist() == _expected_until_eos(prompt)
    assert sequence.finish_reason is FinishReason.STOP
    again = bench.add([*sequence.token_ids, 1], max_tokens=1)
    bench.drain()
    assert again.num_cached_tokens == sequence.num_tokens - 1, "what came after the stop token is not in the cache"


def test_without_room_for_guesses_there_are_none_and_nobody_gives_way() -> None:
    bench = Bench(num_blocks=4, block_size=2, proposer=Guesser(lambda: 0))
    first, second = bench.add([1], max_tokens=4), bench.add([2], max_tokens=4)
    bench.drain()
    assert bench.scheduler.preemptions_total == 0
    for sequence in (first, second):
        assert sequence.token_ids[1:].tolist() == _expected_output(sequence, sequence.token_ids[:1])


@pytest.mark.parametrize("max_batch_size", [4, 6])
def test_a_step_has_no_more_decode_rows_than_it_may(max_batch_size: int) -> None:
    bench = Bench(max_batch_size=max_batch_size, max_decode_rows=6, proposer=Guesser(lambda: 0))
    for n in range(4):
        bench.add([n], max_tokens=6)
    bench.step()
    for _ in range(3):
        assert sum(chunk.num_sampled_rows for chunk in bench.step()) == 6
    bench.drain()


class RandomUse(RuleBasedStateMachine):
    """Requests come, go and are aborted at any moment; each that is not aborted ends with the very tokens it should."""

    @initialize(
        num_blocks=st.integers(16, 24),
        block_size=st.integers(1, 4),
        max_batch_size=st.integers(1, 5),
        max_prefill_tokens=st.integers(1, 12),
        enable_prefix_caching=st.booleans(),
        depth=st.integers(1, 2),
        guesses=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def build(self, guesses: bool, seed: int, **options: Any) -> None:
        rng = random.Random(seed)
        self.guesser = Guesser(lambda: rng.randrange(5)) if guesses else None
        self.bench = Bench(proposer=self.guesser, **options)
        self.sequences: dict[str, tuple[Sequence, list[int]]] = {}

    @rule(
        stem=st.sampled_from([[], [1, 1, 1, 1], [1, 1, 2, 2, 3, 3], [4] * 9]),
        rest=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        max_tokens=st.integers(0, 9),
        rope_base=st.sampled_from([1e4, 2e4]),
        num_prompt_logprobs=st.sampled_from([None, None, 0]),
        ignore_eos=st.booleans(),
        deterministic=st.booleans(),
    )
    def add(self, stem: list[int], rest: list[int], **fields: Any) -> None:
        prompt = stem + rest
        try:
            sequence = self.bench.add(prompt, **fields)
        except InvalidRequestError:
            pool = self.bench.pool
            assert len(prompt) + fields["max_tokens"] - 1 > pool.num_blocks * pool.block_size
            return
        self.sequences[sequence.uid] = (sequence, prompt)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.bench.scheduler.abort(data.draw(st.sampled_from(sorted(self.sequences))))

    @precondition(lambda self: self.guesser is not None)
    @rule(is_on=st.booleans())
    def guess(self, is_on: bool) -> None:
        assert self.guesser is not None
        self.guesser.is_on = is_on

    @precondition(lambda self: len(self.bench.in_flight) < self.bench.depth and not self.drafts_are_in_flight())
    @rule()
    def launch(self) -> None:
        self.bench.launch()

    @precondition(lambda self: self.bench.in_flight)
    @rule()
    def land(self) -> None:
        self.bench.land()

    @precondition(lambda self: self.bench.in_flight)
    @rule(data=st.data(), spares_cache=st.booleans())
    def land_with_a_failure(self, data: st.DataObject, spares_cache: bool) -> None:
        results = self.bench.machine.collect()
        index = data.draw(st.integers(0, len(results) - 1))
        results[index] = ChunkResult(failure="told to", spares_cache=spares_cache)
        for progress in self.bench.scheduler.complete(self.bench.in_flight.popleft(), results):
            if progress.result.failure:
                del self.sequences[progress.sequence.uid]

    @precondition(lambda self: len(self.bench.in_flight) < self.bench.depth and not self.drafts_are_in_flight())
    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    def drafts_are_in_flight(self) -> bool:
        return any(chunk.draft_token_ids for chunks in self.bench.in_flight for chunk in chunks)

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "bench"):
            self.bench.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        if self.drafts_are_in_flight():
            self.bench.land()
        self.bench.drain()
        for sequence, prompt in self.sequences.values():
            output = sequence.token_ids[len(prompt) :].tolist()
            expected = _expected_output(sequence, prompt)
            if sequence.finish_reason is FinishReason.ABORT:
                assert output == expected[: len(output)]
                continue
            assert output == expected
            is_stopped = bool(output) and output[-1] in sequence.stop_token_ids
            assert sequence.finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
            if sequence.num_prompt_logprobs is not None:
                assert [logprob.token_id for logprob in sequence.prompt_logprobs] == prompt[1:]


RandomUse.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestRandomUse = RandomUse.TestCase


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12),
    block_size=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 30),
    depth=st.integers(1, 2),
)
@settings(max_examples=100, deadline=None)
def test_in_a_pool_just_large_enough_for_one_everything_still_completes(
    lengths: list[tuple[int, int]], block_size: int, max_prefill_tokens: int, depth: int
) -> None:
    num_blocks = -(-max(prompt + max(0, output - 1) for prompt, output in lengths) // block_size)
    bench = Bench(num_blocks=num_blocks, block_size=block_size, max_prefill_tokens=max_prefill_tokens, depth=depth)
    sequences = [bench.add([index] * prompt, max_tokens=output) for index, (prompt, output) in enumerate(lengths)]
    bench.drain(max_steps=5000)
    for index, (sequence, (prompt, _)) in enumerate(zip(sequences, lengths, strict=True)):
        assert sequence.token_ids[prompt:].tolist() == _expected_output(sequence, [index] * prompt)


def test_token_ids_are_one_array_of_64_bit_numbers() -> None:
    """Hashes and tensors are made of its bytes."""
    assert Bench().add([1, 2, 3]).token_ids == array("q", [1, 2, 3])
