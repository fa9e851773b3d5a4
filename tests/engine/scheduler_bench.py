"""Drives a scheduler without tensors, and sees that no token ever reads a wrong block.

`Machine` stands for runner, model and KV cache, with up to two steps in flight: its memory remembers for which prefix
each place was computed, so that a block shared, evicted or reused wrongly shows at once; its next token is a hash of
the whole prefix, and the last one of each sequence is found by slot, as on a device.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

from lmdserve.engine.api import EngineInfo, Request, SamplingParams, TokenLogprob
from lmdserve.engine.blocks import BlockPool
from lmdserve.engine.scheduler import Progress, Scheduler
from lmdserve.engine.sequence import Sequence, new_sequence
from lmdserve.engine.step import Chunk, ChunkResult

VOCAB_SIZE = 50
EOS = 49
INFO = EngineInfo(vocab_size=VOCAB_SIZE, session_len=64, eos_token_ids=frozenset({EOS}))


def _digest(rope_base: float, token_ids: SequenceOf[int]) -> bytes:
    return hashlib.sha256(repr((rope_base, list(token_ids))).encode()).digest()


def next_token(rope_base: float, token_ids: SequenceOf[int]) -> int:
    return _digest(rope_base, token_ids)[0] % VOCAB_SIZE


def expected_output(sequence: Sequence, prompt: SequenceOf[int]) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < sequence.max_new_tokens:
        token_ids.append(next_token(sequence.rope_base, token_ids))
        if token_ids[-1] in sequence.stop_token_ids:
            break
    return token_ids[len(prompt) :]


def expected_until_eos(prompt: list[int]) -> list[int] | None:
    token_ids = list(prompt)
    for _ in range(29):
        token_ids.append(next_token(1e4, token_ids))
        if token_ids[-1] == EOS:
            return token_ids
    return None


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
            token_ids.append(next_token(sequence.rope_base, history[: num_known + len(token_ids)]))
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


def sizes_of(chunks: list[Chunk]) -> dict[str, int]:
    return {chunk.sequence.uid: chunk.num_new_tokens for chunk in chunks}


def sizes_until_idle(bench: Bench) -> list[dict[str, int]]:
    """Step until nothing is left; return the sizes of each step's chunks, empty where the scheduler had to wait."""
    sizes = []
    while bench.is_busy:
        sizes.append(sizes_of(bench.step()))
    return sizes


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
            right = next_token(sequence.rope_base, history)
            history.append(right if place < num_right else (right + 1) % VOCAB_SIZE)
        return tuple(history[sequence.num_tokens :])

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        raise AssertionError("nobody measures time here")
