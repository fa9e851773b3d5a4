"""The prefix cache with a real model: warm equals cold, also with quantized KV in a pool that is always full.

Quantized KV, prefix cache and a full pool together are where other servers have returned damaged text: a block that is
evicted, handed out again and found under its old name, or whose scales stay behind, shows only then.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_runs import chunks_of

from lmdserve.engine.api import Chunk, Request, SamplingParams
from lmdserve.engine.loop import AsyncEngine

Greedy = Callable[..., list[int]]
BLOCK_SIZE = 8


async def _chunks(engine: AsyncEngine, uid: str, prompt: Sequence[int], max_tokens: int) -> list[Chunk]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return await chunks_of(engine, Request(uid=uid, prompt_token_ids=prompt, sampling=params))


def _token_ids(chunks: list[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


@pytest.mark.parametrize("quant_policy", [0, 8, 4])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 17, 100])
async def test_warm_equals_cold_at_every_block_boundary(
    run_tiny_engine: Any, bare_greedy: Greedy, quant_policy: int, num_tokens: int
) -> None:
    prompt = [random.Random(num_tokens).randrange(3, 199) for _ in range(num_tokens)]
    expected = bare_greedy(prompt, 10, quant_policy)
    async with run_tiny_engine(quant_policy=quant_policy) as engine:
        cold = await _chunks(engine, "cold", prompt, 10)
        warm = await _chunks(engine, "warm", prompt, 10)
    assert _token_ids(cold) == _token_ids(warm) == expected
    assert cold[-1].num_cached_tokens == 0
    assert warm[-1].num_cached_tokens == (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("quant_policy", [0, 8, 4])
async def test_a_conversation_is_continued_from_its_own_answers(
    run_tiny_engine: Any, bare_greedy: Greedy, quant_policy: int
) -> None:
    """Blocks that decoding filled, token by token, equal those that a prefill would have filled."""
    rng = random.Random(4)
    history = [rng.randrange(3, 199) for _ in range(20)]
    async with run_tiny_engine(quant_policy=quant_policy) as engine:
        for turn in range(5):
            chunks = await _chunks(engine, f"turn {turn}", history, 15)
            assert _token_ids(chunks) == bare_greedy(history, 15, quant_policy)
            assert (chunks[-1].num_cached_tokens > 0) == (turn > 0)
            history += _token_ids(chunks) + [rng.randrange(3, 199) for _ in range(9)]


@pytest.mark.parametrize("quant_policy", [0, 8, 4])
async def test_in_a_full_pool_nothing_is_damaged(run_tiny_engine: Any, bare_greedy: Greedy, quant_policy: int) -> None:
    """Waves of requests on a few stems keep all 30 blocks occupied: prefixes are found, shared, evicted, recomputed."""
    rng = random.Random(9)
    stems = [[rng.randrange(3, 199) for _ in range(length)] for length in (24, 24, 40, 57)]
    prompts = [
        stems[rng.randrange(4)] + [rng.randrange(3, 199) for _ in range(rng.choice([1, 5, 8, 20]))] for _ in range(60)
    ]
    fills: list[int] = []

    async def one(engine: AsyncEngine, index: int) -> list[int]:
        await asyncio.sleep(0.003 * (index % 12))
        chunks = await _chunks(engine, f"r{index}", prompts[index], 24)
        stats = engine.stats()
        fills.append(stats.num_used_blocks + stats.num_cached_blocks)
        return _token_ids(chunks)

    async with run_tiny_engine(quant_policy=quant_policy, num_blocks=30, session_len=120) as engine:
        for wave in range(0, 60, 20):
            outputs = await asyncio.gather(*(one(engine, index) for index in range(wave, wave + 20)))
            assert outputs == [bare_greedy(prompt, 24, quant_policy) for prompt in prompts[wave : wave + 20]]
        stats = engine.stats()
    assert max(fills) == 30, "the pool was never full"
    assert sum(fill >= 28 for fill in fills) > 40
    assert stats.preemptions_total > 0
    assert stats.cached_tokens_total > 500


async def test_a_request_that_fails_leaves_no_trace_in_the_cache(run_tiny_engine: Any, bare_greedy: Greedy) -> None:
    """Weights that overflow give not-a-number in K and V; the next owner of those blocks must not see it."""
    prompt = [5] * 20
    async with run_tiny_engine(num_blocks=4, session_len=32) as engine:
        model = engine._stepper._runner._model
        healthy = model._embedding.clone()
        model._embedding[7] = float("nan")
        with pytest.raises(Exception, match="not finite"):
            await _chunks(engine, "poisoned", [7] * 20, 5)
        model._embedding.copy_(healthy)
        assert _token_ids(await _chunks(engine, "next", prompt, 10)) == bare_greedy(prompt, 10)
