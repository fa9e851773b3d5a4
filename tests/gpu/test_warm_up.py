"""No request waits for a compiler: whatever mix of prompts comes, its kernels were compiled before the first."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import DEMO, benchmark_script

from lmdserve.engine.api import Request, SamplingParams
from lmdserve.engine.config import EngineConfig, QuantPolicy
from lmdserve.engine.load_engine import load_engine
from lmdserve.engine.loop import AsyncEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("quant_policy", [0, 4])
def test_serving_compiles_nothing(quant_policy: QuantPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    benchmark_script("demo_quality").write_awq(DEMO, tmp_path / "awq")
    engine = load_engine(
        EngineConfig(
            model=str(tmp_path / "awq"), dtype="float16", quant_policy=quant_policy, cache_max_entry_count=4096
        )
    )
    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    asyncio.run(_serve(engine))
    assert compiled == []


async def _serve(engine: AsyncEngine) -> None:
    rng = random.Random(1)
    await engine.start()
    try:
        for count in (1, 2, 3, 5, 9, 20, 70, 140, 200, 256):
            await asyncio.gather(*(_finish(engine, f"{count}-{index}", rng) for index in range(count)))
        for length in (1, 7, 32, 33, 65, 128, 200, 400, 700, 1000, 3000):
            await _finish(engine, f"alone-{length}", rng, length)
    finally:
        await engine.stop(0.0)


async def _finish(engine: AsyncEngine, uid: str, rng: random.Random, length: int | None = None) -> None:
    prompt = rng.choices(range(3000), k=length or rng.randrange(1, 300))
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 0.8)),
        top_p=rng.choice((1.0, 0.9)),
        max_tokens=rng.randrange(1, 24),
        ignore_eos=True,
    )
    async for _ in engine.generate(Request(uid=uid, prompt_token_ids=prompt, sampling=sampling)):
        pass
