"""The same request gives the same tokens, whatever else the engine does meanwhile: bit for bit, on a CPU in fp32.

The reference is a plain loop over the model, one sequence, its blocks in order. The model has random weights, so its
best token is often ahead by very little: a small error anywhere changes the text.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_runs import chunks_of, tokens_of

from lmdserve.engine.api import Request, SamplingParams
from lmdserve.engine.loop import AsyncEngine

Greedy = Callable[..., list[int]]
MAX_TOKENS = 20
each_quant_policy = pytest.mark.parametrize("quant_policy", [0, 8, 4])


def _prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 70 tokens; a third begin alike."""
    rng = random.Random(77)
    stem = [rng.randrange(3, 199) for _ in range(40)]
    prompts = []
    for index in range(count):
        tail = [rng.randrange(3, 199) for _ in range(rng.randint(1, 70))]
        prompts.append(stem[: rng.randint(8, 40)] + tail[:30] if index % 3 == 0 else tail)
    return prompts


PROMPTS = _prompts(33)


async def _generate(engine: AsyncEngine, uid: str, prompt: Sequence[int], **sampling: Any) -> list[int]:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | sampling))
    request = Request(uid=uid, prompt_token_ids=prompt, sampling=params)
    return await tokens_of(engine, request)


async def _generate_all(
    engine: AsyncEngine, prompts: Sequence[Sequence[int]], samplings: Sequence[dict[str, Any]] | None = None
) -> list[list[int]]:
    """Generate all at once, arriving over some steps, so that prefills mix with decoding."""

    async def one(index: int) -> list[int]:
        await asyncio.sleep(0.002 * (index % 10))
        return await _generate(engine, f"r{index}", prompts[index], **(samplings[index] if samplings else {}))

    return await asyncio.gather(*(one(index) for index in range(len(prompts))))


@pytest.fixture(scope="module")
def expected(bare_greedy: Greedy) -> dict[int, list[list[int]]]:
    """What each prompt gives under each KV policy, by the reference."""
    return {policy: [bare_greedy(prompt, MAX_TOKENS, policy) for prompt in PROMPTS] for policy in (0, 8, 4)}


def test_the_reference_is_worth_comparing_with(expected: dict[int, list[list[int]]]) -> None:
    """Texts are varied, differ from prompt to prompt, and quantizing the cache changes some of them."""
    for outputs in expected.values():
        assert len({tuple(output) for output in outputs}) == len(PROMPTS)
        assert sum(len(set(output)) for output in outputs) / len(outputs) > MAX_TOKENS / 2
    assert expected[0] != expected[8] != expected[4] != expected[0]


@each_quant_policy
async def test_alone(run_tiny_engine: Any, expected: dict[int, list[list[int]]], quant_policy: int) -> None:
    async with run_tiny_engine(quant_policy=quant_policy, enable_prefix_caching=False) as engine:
        for index, prompt in enumerate(PROMPTS[:12]):
            assert await _generate(engine, f"r{index}", prompt) == expected[quant_policy][index]


@each_quant_policy
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
async def test_among_32_others(
    run_tiny_engine: Any, expected: dict[int, list[list[int]]], quant_policy: int, enable_prefix_caching: bool
) -> None:
    async with run_tiny_engine(quant_policy=quant_policy, enable_prefix_caching=enable_prefix_caching) as engine:
        assert await _generate_all(engine, PROMPTS) == expected[quant_policy]
        assert engine.stats().preemptions_total == 0
        assert engine.stats().steps_total < 32 * MAX_TOKENS  # they did run together


@each_quant_policy
@pytest.mark.parametrize("max_prefill_token_num", [1, 7, 64])
async def test_with_the_prompt_cut_into_chunks(
    run_tiny_engine: Any, expected: dict[int, list[list[int]]], quant_policy: int, max_prefill_token_num: int
) -> None:
    prompts = PROMPTS[:8]
    async with run_tiny_engine(quant_policy=quant_policy, max_prefill_token_num=max_prefill_token_num) as engine:
        assert await _generate_all(engine, prompts) == expected[quant_policy][:8]


@each_quant_policy
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
async def test_after_preemption(
    run_tiny_engine: Any, expected: dict[int, list[list[int]]], quant_policy: int, enable_prefix_caching: bool
) -> None:
    """A pool of 25 blocks of 8 holds one or two of these sequences; they push each other out again and again."""
    options = {"quant_policy": quant_policy, "enable_prefix_caching": enable_prefix_caching, "session_len": 160}
    async with run_tiny_engine(num_blocks=25, **options) as engine:
        assert await _generate_all(engine, PROMPTS) == expected[quant_policy]
        assert engine.stats().preemptions_total > 3


async def test_beyond_the_context_with_a_rope_base_of_its_own(run_tiny_engine: Any, bare_greedy: Greedy) -> None:
    """Dynamic NTK: a prompt of 600 tokens on a model of 512 turns with another base than the short ones beside it."""
    rng = random.Random(3)
    long = [rng.randrange(3, 199) for _ in range(600)]
    prompts = [long, long[:100], long[:560], long[:30]]
    async with run_tiny_engine(session_len=700) as engine:
        for _ in range(2):  # the second time from the prefix cache
            assert await _generate_all(engine, prompts) == [bare_greedy(prompt, MAX_TOKENS) for prompt in prompts]
        assert engine.stats().cached_tokens_total > 600


def _samplings() -> list[dict[str, Any]]:
    rng = random.Random(12)
    return [
        {
            "seed": index,
            "temperature": rng.choice([0.7, 1.0, 1.5]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 20]),
            "min_p": rng.choice([0.0, 0.02]),
            "repetition_penalty": rng.choice([1.0, 1.1]),
            "frequency_penalty": rng.choice([0.0, 0.2]),
            "min_tokens": rng.choice([0, 5]),
        }
        for index in range(len(PROMPTS))
    ]


async def test_sampled_with_a_seed_alone_in_a_batch_and_after_preemption(run_tiny_engine: Any) -> None:
    samplings = _samplings()
    async with run_tiny_engine(enable_prefix_caching=False) as engine:
        alone = [
            await _generate(engine, f"r{index}", prompt, **sampling)
            for index, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))
        ]
        other_seeds = await _generate_all(engine, PROMPTS, [s | {"seed": s["seed"] + 1000} for s in samplings])
    async with run_tiny_engine() as engine:
        assert await _generate_all(engine, PROMPTS, samplings) == alone
        assert await _generate_all(engine, PROMPTS, samplings) == alone, "from the prefix cache"
    async with run_tiny_engine(num_blocks=25, session_len=160) as engine:
        assert await _generate_all(engine, PROMPTS, samplings) == alone
        assert engine.stats().preemptions_total > 3
    assert all(mine != other for mine, other in zip(alone, other_seeds, strict=True))


async def test_the_output_does_not_depend_on_what_is_asked_to_be_reported(
    run_tiny_engine: Any, expected: dict[int, list[list[int]]]
) -> None:
    async with run_tiny_engine() as engine:
        request = Request(
            uid="a",
            prompt_token_ids=PROMPTS[0],
            sampling=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, num_logprobs=5),
            num_prompt_logprobs=3,
        )
        chunks = await chunks_of(engine, request)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == expected[0][0]
    records = [record for chunk in chunks for record in chunk.logprobs or ()]
    assert [record.top[0][0] for record in records] == expected[0][0]
    assert all(record.logprob == record.top[0][1] for record in records)
