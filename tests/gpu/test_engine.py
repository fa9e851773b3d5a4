"""The whole engine on a CUDA device gives what it gives on the CPU: greedy tokens of the demo model, any KV width."""

import asyncio
from pathlib import Path

import pytest
import torch

import lmdserve
from lmdserve.engine.api import Request, SamplingParams
from lmdserve.engine.config import Device, Dtype, EngineConfig, QuantPolicy
from lmdserve.engine.loop import AsyncEngine, load_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_PROMPTS = 24
NUM_TOKENS = 48
DEMO = Path(lmdserve.__file__).parent / "demo" / "model"


def generate(device: Device, quant_policy: QuantPolicy, dtype: Dtype) -> list[tuple[int, ...]]:
    """Return the greedy continuation of each prompt, all generated at once."""
    config = EngineConfig(
        model=str(DEMO),
        device=device,
        dtype=dtype,
        quant_policy=quant_policy,
        cache_max_entry_count=256,
        session_len=1024,
    )
    engine = load_engine(config)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 300, (NUM_PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(0, engine.info.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return asyncio.run(_generate_all(engine, prompts))


async def _generate_all(engine: AsyncEngine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    async def one(uid: str, prompt: list[int]) -> tuple[int, ...]:
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = Request(uid=uid, prompt_token_ids=prompt, sampling=sampling)
        return tuple([token_id async for chunk in engine.generate(request) for token_id in chunk.token_ids])

    await engine.start()
    try:
        return await asyncio.gather(*(one(str(index), prompt) for index, prompt in enumerate(prompts)))
    finally:
        await engine.stop(0.0)


def agreement(ours: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> float:
    """Return the share of prompts whose whole continuation is the same."""
    assert [len(tokens) for tokens in ours] == [NUM_TOKENS] * NUM_PROMPTS
    return sum(a == b for a, b in zip(ours, expected, strict=True)) / NUM_PROMPTS


def test_greedy_tokens_in_float32_are_the_cpus() -> None:
    assert agreement(generate("cuda", 0, "float32"), generate("cpu", 0, "float32")) == 1.0


@pytest.mark.parametrize("quant_policy", [8, 4])
def test_greedy_tokens_on_a_quantized_cache_are_nearly_always_the_cpus(quant_policy: QuantPolicy) -> None:
    """A sum that differs in its last bit can move a value to the next of 255 or 15 steps, and then a near tie."""
    assert agreement(generate("cuda", quant_policy, "float32"), generate("cpu", quant_policy, "float32")) >= 0.75


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_types_mostly_agree_on_the_first_tokens(dtype: Dtype) -> None:
    """Rounding turns near ties; a wrong layout or mask would leave almost no first token right."""
    ours, expected = generate("cuda", 0, dtype), generate("cpu", 0, "float32")
    assert sum(a[0] == b[0] for a, b in zip(ours, expected, strict=True)) >= 0.9 * NUM_PROMPTS
