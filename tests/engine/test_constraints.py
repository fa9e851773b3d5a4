"""Constrained sequences in a whole engine: every token obeys, others are not disturbed, and a failure stays alone.

The reference decodes greedily by hand, from the fake model's logits with what is not allowed taken out.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from lmdserve.engine.api import EngineError, FinishReason, Request, SamplingParams
from lmdserve.engine.constraints import ConstraintState
from lmdserve.engine.loop import AsyncEngine

VOCAB_SIZE = 64  # the fake model's, and its last token ends any sequence
EOS = VOCAB_SIZE - 1
BuildEngine = Callable[..., AsyncEngine]


class Climbing:
    """Allows tokens above the last one, modulo 7, and nothing but `end` once there are `length`."""

    def __init__(self, length: int = 5, end: int = 0, *, fails_at: int | None = None) -> None:
        self.length, self.end, self.fails_at = length, end, fails_at
        self.token_ids: list[int] = []
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
            raise BaseException("as native code panics")
        return sum(1 << token_id for token_id in self.allowed()).to_bytes(8, "little")

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed()
        self.token_ids.append(token_id)
        self.is_over = token_id == self.end


@asynccontextmanager
async def _running(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(5.0)
        engine._scheduler.check()
        assert engine.stats().num_used_blocks == 0


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
    async with _running(build_fake_engine()) as engine:
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
    async with _running(build_fake_engine()) as engine:
        for index, sampling in enumerate(
            [{"temperature": 1.0}, {"repetition_penalty": 1.3}, {"logit_bias": {3: 50.0}}, {"top_k": 1}]
        ):
            constraint = Climbing(8)
            token_ids, reason = await _tokens(engine, _request(f"r{index}", [1, 2], constraint, **sampling))
            assert (token_ids, reason) == (constraint.token_ids, FinishReason.STOP)
            assert len(token_ids) == 9


async def test_min_tokens_gives_way_to_a_constraint_that_lets_nothing_follow(build_fake_engine: BuildEngine) -> None:
    async with _running(build_fake_engine()) as engine:
        request = _request("r", [1], Climbing(2), min_tokens=10, stop_token_ids=frozenset({0}))
        assert len((await _tokens(engine, request))[0]) == 3


async def test_it_survives_preemption(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    prompts = [[1 + index] * 6 for index in range(4)]
    async with _running(build_fake_engine(num_blocks=12, enable_prefix_caching=False)) as engine:
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
    async with _running(build_fake_engine()) as engine:
        free = asyncio.create_task(_tokens(engine, _request("free", [4, 5], None)))
        good = asyncio.create_task(_tokens(engine, _request("good", [6, 7], Climbing())))
        with pytest.raises(EngineError, match="output format failed: as native code panics"):
            await _tokens(engine, _request("bad", [8, 9], Climbing(fails_at=fails_at)))
        assert (await free)[0] == fake_model.greedy([4, 5], 20)
        assert (await good)[0] == _expected(fake_model, [6, 7], Climbing())


async def test_length_and_leaving_end_it_like_any_other(build_fake_engine: BuildEngine) -> None:
    async with _running(build_fake_engine()) as engine:
        assert (await _tokens(engine, _request("short", [1], Climbing(9), max_tokens=4)))[1] is FinishReason.LENGTH
        chunks = engine.generate(_request("left", [1], Climbing(50), max_tokens=40))
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]


def test_a_mask_is_computed_once_a_token() -> None:
    constraint = Climbing()
    state = ConstraintState(constraint)
    for _ in range(3):
        state.prepare()
    state.accept([7])
    state.prepare()
    assert constraint.num_masks == 2
    assert state.mask is not None
