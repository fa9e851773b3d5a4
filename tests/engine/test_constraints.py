"""Constrained sequences in a whole engine: every token obeys, others are not disturbed, and a failure stays alone.

The reference decodes greedily by hand, from the fake model's logits with what is not allowed taken out.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine_runs import running

from lmdserve.engine.api import EngineError, FinishReason, FormatFailedError, Request, SamplingParams
from lmdserve.engine.constraints import LATE_S, ConstraintState, MaskThreads
from lmdserve.engine.loop import AsyncEngine

VOCAB_SIZE = 64  # the fake model's, and its last token ends any sequence
EOS = VOCAB_SIZE - 1
BuildEngine = Callable[..., AsyncEngine]


class Climbing:
    """Allows tokens above the last one, modulo 7, and nothing but `end` once there are `length`."""

    def __init__(
        self, length: int = 5, end: int = 0, *, fails_at: int | None = None, error: BaseException | None = None
    ) -> None:
        self.length, self.end, self.fails_at = length, end, fails_at
        self.error = error or BaseException("as native code panics")
        self.token_ids: list[int] = []
        self.lock = threading.Lock()
        self.num_masks = 0
        self.is_over = False

    @property
    def must_end(self) -> bool:
        return len(self.token_ids) >= self.length

    def allowed(self) -> list[int]:
        if self.must_end:
            return [self.end]
        last = self.token_ids[-1] if self.token_ids else 0
        return [token_id for token_id in range(EOS) if (token_id + last) % 7 < 2 and token_id != self.end]

    def mask(self) -> bytes:
        self.num_masks += 1
        if len(self.token_ids) == self.fails_at:
            raise self.error
        return sum(1 << token_id for token_id in self.allowed()).to_bytes(8, "little")

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed()
        self.token_ids.append(token_id)
        self.is_over = token_id == self.end

    def take_forced(self) -> list[int]:
        return []


def _request(uid: str, prompt: Sequence[int], constraint: Climbing | None, **sampling: Any) -> Request:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 20} | sampling))
    return Request(uid=uid, prompt_token_ids=prompt, sampling=params, constraint=constraint)


def _expected(model: Any, prompt: Sequence[int], constraint: Climbing) -> list[int]:
    token_ids = list(prompt)
    while not constraint.is_over:
        logits = model.logits(token_ids)
        banned = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        banned[constraint.allowed()] = False
        token_ids.append(int(logits.masked_fill(banned, -torch.inf).argmax()))
        constraint.accept(token_ids[-1])
    return token_ids[len(prompt) :]


async def _tokens(engine: AsyncEngine, request: Request) -> tuple[list[int], FinishReason | None]:
    chunks = [chunk async for chunk in engine.generate(request)]
    return [token_id for chunk in chunks for token_id in chunk.token_ids], chunks[-1].finish_reason


async def test_constrained_and_free_sequences_share_steps_and_each_gets_its_own_tokens(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    prompts = [[1 + index, 2, 3] for index in range(6)]
    async with running(build_fake_engine()) as engine:
        requests = [
            _request(f"r{i}", prompt, Climbing(3 + i) if i % 2 else None, max_tokens=9)
            for i, prompt in enumerate(prompts)
        ]
        results = await asyncio.gather(*(_tokens(engine, request) for request in requests))
    for i, (prompt, (token_ids, reason)) in enumerate(zip(prompts, results, strict=True)):
        if i % 2:
            assert (token_ids, reason) == (_expected(fake_model, prompt, Climbing(3 + i)), FinishReason.STOP)
        else:
            assert token_ids == fake_model.greedy(prompt, 9)


async def test_it_obeys_with_penalties_bias_and_any_temperature(build_fake_engine: BuildEngine) -> None:
    async with running(build_fake_engine()) as engine:
        for index, sampling in enumerate(
            [{"temperature": 1.0}, {"repetition_penalty": 1.3}, {"logit_bias": {3: 50.0}}, {"top_k": 1}]
        ):
            constraint = Climbing(8)
            token_ids, reason = await _tokens(engine, _request(f"r{index}", [1, 2], constraint, **sampling))
            assert (token_ids, reason) == (constraint.token_ids, FinishReason.STOP)
            assert len(token_ids) == 9


async def test_min_tokens_gives_way_to_a_constraint_that_lets_nothing_follow(build_fake_engine: BuildEngine) -> None:
    async with running(build_fake_engine()) as engine:
        request = _request("r", [1], Climbing(2), min_tokens=10, stop_token_ids=frozenset({0}))
        assert len((await _tokens(engine, request))[0]) == 3


async def test_it_survives_preemption(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    prompts = [[1 + index] * 6 for index in range(4)]
    async with running(build_fake_engine(num_blocks=12, enable_prefix_caching=False)) as engine:
        results = await asyncio.gather(
            *(_tokens(engine, _request(f"r{i}", prompt, Climbing(17))) for i, prompt in enumerate(prompts))
        )
        assert engine.stats().preemptions_total > 0
    for prompt, (token_ids, _) in zip(prompts, results, strict=True):
        assert token_ids == _expected(fake_model, prompt, Climbing(17))


@pytest.mark.parametrize("fails_at", [0, 3])
async def test_a_constraint_that_fails_hurts_its_own_request_only(
    build_fake_engine: BuildEngine, fake_model: Any, fails_at: int
) -> None:
    async with running(build_fake_engine()) as engine:
        free = asyncio.create_task(_tokens(engine, _request("free", [4, 5], None)))
        good = asyncio.create_task(_tokens(engine, _request("good", [6, 7], Climbing())))
        with pytest.raises(EngineError, match="output format failed: as native code panics"):
            await _tokens(engine, _request("bad", [8, 9], Climbing(fails_at=fails_at)))
        assert (await free)[0] == fake_model.greedy([4, 5], 20)
        assert (await good)[0] == _expected(fake_model, [6, 7], Climbing())


async def test_what_asks_for_too_much_is_told_from_what_is_broken(build_fake_engine: BuildEngine) -> None:
    async with running(build_fake_engine()) as engine:
        for error, expected in ((ValueError("too costly"), FormatFailedError), (RuntimeError("broke"), EngineError)):
            with pytest.raises(EngineError) as caught:
                await _tokens(engine, _request(f"{error}", [8, 9], Climbing(fails_at=2, error=error)))
            assert type(caught.value) is expected


async def test_length_and_leaving_end_it_like_any_other(build_fake_engine: BuildEngine) -> None:
    async with running(build_fake_engine()) as engine:
        assert (await _tokens(engine, _request("short", [1], Climbing(9), max_tokens=4)))[1] is FinishReason.LENGTH
        chunks = engine.generate(_request("left", [1], Climbing(50), max_tokens=40))
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]


class Forcing(Climbing):
    """Leaves one token only at most places, and says so in advance unless it is told to be silent."""

    def __init__(self, length: int, *, is_silent: bool = False, end: int = 0) -> None:
        super().__init__(length, end)
        self.is_silent = is_silent
        self.num_forced = 0

    def allowed(self) -> list[int]:
        place = len(self.token_ids)
        if place >= self.length or sum(self.token_ids) % 5 < 2:
            return super().allowed()
        return [1 + (7 * place + sum(self.token_ids)) % (EOS - 1)]

    def take_forced(self) -> list[int]:
        forced: list[int] = []
        while not self.is_silent and not self.must_end and len(allowed := self.allowed()) == 1:
            self.accept(allowed[0])
            forced += allowed
        self.num_forced += len(forced)
        return forced


async def test_forced_tokens_come_without_a_step_each_and_change_no_other(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    async with running(build_fake_engine()) as engine:
        constraint = Forcing(40)
        request = _request("r", [1, 2, 3], constraint, max_tokens=50)
        token_ids, reason = await _tokens(engine, request)
    assert (token_ids, reason) == (_expected(fake_model, [1, 2, 3], Forcing(40)), FinishReason.STOP)
    assert constraint.num_forced >= 15
    assert fake_model.num_steps <= 41 - constraint.num_forced // 3


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "logit_bias": {5: 3.0}},
        {"repetition_penalty": 1.2},
        {"num_logprobs": 1},
        {"min_tokens": 12, "stop_token_ids": frozenset({6, 17, 30})},
        {"stop_token_ids": frozenset(range(8, 60, 4))},
        {"max_tokens": 13},
    ],
    ids=lambda sampling: ",".join(sampling) or "greedy",
)
@pytest.mark.parametrize("num_blocks", [64, 20], ids=["roomy", "preempting"])
async def test_an_answer_is_the_same_with_and_without_fast_forward(
    build_fake_engine: BuildEngine, sampling: Any, num_blocks: int
) -> None:
    """Requests share steps with free ones; where blocks are few, they give way to each other and come back."""
    results = []
    for is_silent in (True, False):
        async with running(build_fake_engine(num_blocks=num_blocks, max_batch_size=12)) as engine:
            requests = [
                _request(f"r{i}", [1 + i, 2], Forcing(20 + i, is_silent=is_silent) if i % 3 else None, **sampling)
                for i in range(6)
            ]
            results.append(await asyncio.gather(*(_answer(engine, request) for request in requests)))
    assert results[0] == results[1]


async def _answer(engine: AsyncEngine, request: Request) -> Any:
    """Return everything that comes of a request: tokens, logprobs, and how it ended, which may be badly."""
    token_ids: list[int] = []
    logprobs = []
    try:
        async for chunk in engine.generate(request):
            token_ids += chunk.token_ids
            logprobs += chunk.logprobs or ()
    except EngineError as error:
        return token_ids, logprobs, str(error)
    return token_ids, logprobs, chunk.finish_reason


class Holding(Climbing):
    """Holds back the mask behind its token number `place` until it is released."""

    def __init__(self, length: int, place: int) -> None:
        super().__init__(length)
        self.place = place
        self.is_held, self.released = threading.Event(), threading.Event()

    def mask(self) -> bytes:
        if len(self.token_ids) == self.place:
            self.is_held.set()
            assert self.released.wait(20.0), "others waited for this mask"
        return super().mask()


@pytest.mark.parametrize("place", [0, 1, 4])
async def test_a_mask_that_takes_long_keeps_its_own_sequence_back_and_no_other(
    build_fake_engine: BuildEngine, fake_model: Any, place: int
) -> None:
    slow = Holding(8, place)
    async with running(build_fake_engine()) as engine:
        held = asyncio.create_task(_tokens(engine, _request("slow", [1, 2, 3], slow)))
        others = [
            asyncio.create_task(_tokens(engine, _request(f"r{i}", [4 + i], Climbing(9) if i else None, max_tokens=15)))
            for i in range(3)
        ]
        results = await asyncio.gather(*others)
        assert slow.is_held.is_set()
        assert not held.done()
        slow.released.set()
        assert (await held)[0] == _expected(fake_model, [1, 2, 3], Climbing(8))
    assert results[0][0] == fake_model.greedy([4], 15)
    for i in (1, 2):
        assert results[i][0] == _expected(fake_model, [4 + i], Climbing(9))


async def test_one_that_leaves_while_its_mask_is_late_is_forgotten(build_fake_engine: BuildEngine) -> None:
    slow = Holding(8, 2)
    async with running(build_fake_engine()) as engine:
        chunks = engine.generate(_request("slow", [1], slow))
        await anext(chunks)
        await asyncio.to_thread(slow.is_held.wait, 20.0)
        await chunks.aclose()  # type: ignore[attr-defined]
        slow.released.set()
        assert len((await _tokens(engine, _request("next", [2], Climbing(3))))[0]) == 4


class Dawdling(Forcing):
    """As Forcing, but some masks take longer than steps wait for."""

    def mask(self) -> bytes:
        if sum(self.token_ids) % 4 == 1:
            time.sleep(1.5 * LATE_S)
        return super().mask()


@pytest.mark.parametrize("num_blocks", [64, 14], ids=["roomy", "preempting"])
async def test_late_masks_change_no_token(build_fake_engine: BuildEngine, fake_model: Any, num_blocks: int) -> None:
    prompts = [[1 + i, 2] for i in range(5)]
    async with running(build_fake_engine(num_blocks=num_blocks)) as engine:
        results = await asyncio.gather(
            *(
                _tokens(engine, _request(f"r{i}", prompt, Dawdling(18) if i else None))
                for i, prompt in enumerate(prompts)
            )
        )
    assert results[0][0] == fake_model.greedy(prompts[0], 20)
    for prompt, (token_ids, _) in list(zip(prompts, results, strict=True))[1:]:
        assert token_ids == _expected(fake_model, prompt, Forcing(18))


def test_a_mask_is_computed_once_a_token() -> None:
    constraint = Climbing()
    state = ConstraintState(constraint)
    threads = MaskThreads()
    for _ in range(3):
        threads.prepare([state])
        threads.wait_for_late()
    state.take([7])
    threads.prepare([state])
    threads.wait_for_late()
    threads.close()
    assert constraint.num_masks == 2
    assert state.mask_at(1) is not None
    assert state.mask_at(0) is None


class Noting(Climbing):
    """Notes the threads that compute its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def mask(self) -> bytes:
        self.threads.append(threading.get_ident())
        return super().mask()


@pytest.mark.parametrize("is_alone", [True, False])
def test_the_engine_thread_computes_masks_of_one_that_is_alone_and_was_quick_before(is_alone: bool) -> None:
    state = ConstraintState(constraint := Noting())
    threads = MaskThreads()
    for _ in range(3):
        threads.prepare([state], is_alone=is_alone)
        while not state.is_ready:
            threads.wait_for_late()
        state.take([7 - sum(constraint.token_ids) % 7])
    threads.close()
    is_own = [thread == threading.get_ident() for thread in constraint.threads]
    assert is_own == [False, is_alone, is_alone]


def test_one_that_is_stuck_keeps_none_of_those_behind_it() -> None:
    stuck = [Holding(8, 1), Holding(8, 1)]
    states = [ConstraintState(constraint) for constraint in (*stuck, *(Climbing() for _ in range(6)))]
    threads = MaskThreads()
    threads.prepare(states)
    while not all(state.is_ready for state in states):
        threads.wait_for_late()
    threads.note_ready()
    for state in states:
        state.take([7])
    threads.prepare(states)
    while not all(state.is_ready for state in states[2:]):
        threads.wait_for_late()
    assert [state.is_ready for state in states] == [False] * 2 + [True] * 6
    for constraint in stuck:
        constraint.released.set()
    while not all(state.is_ready for state in states):
        threads.wait_for_late()
    threads.close()


def test_where_another_one_holds_the_lock_nobody_waits_but_itself() -> None:
    """Native code that shares an automaton waits for another one's mask with Python's lock held; we wait without it."""
    shared = Climbing()
    states = [ConstraintState(shared), *(ConstraintState(Climbing()) for _ in range(3))]
    threads = MaskThreads()
    threads.prepare(states)
    while not all(state.is_ready for state in states):
        threads.wait_for_late()
    threads.note_ready()
    with shared.lock:
        for state in states:
            state.take([7])
        assert shared.token_ids == []
        threads.prepare(states)
        while not all(state.is_ready for state in states[1:]):
            threads.wait_for_late()
        assert states[0].is_late
        assert not states[0].is_ready
    while not states[0].is_ready:
        threads.wait_for_late()
    threads.close()
    assert shared.token_ids == [7]
    assert states[0].mask_at(1) is not None


def test_what_was_late_is_prepared_again_once_it_is_taken() -> None:
    """Between two steps it may be ready before anybody has noted it."""
    state = ConstraintState(slow := Holding(8, 0))
    threads = MaskThreads()
    threads.prepare([state])
    assert state.is_late
    slow.released.set()
    while not state.is_ready:
        time.sleep(0.001)
    state.take([7])
    threads.prepare([state])
    while not state.is_ready:
        threads.wait_for_late()
    threads.close()
    assert state.mask_at(1) is not None
