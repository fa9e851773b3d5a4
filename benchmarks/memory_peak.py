"""Load a model, drive it through every kind of step, and compare the GPU memory it took with the plan.

    python benchmarks/memory_peak.py --model /tmp/internlm2.5-7b-awq --quant-policy 8 --max-gpu-memory 20GiB

Prints one JSON object a phase: what the plan said, the peak up to then (the most that torch reserved, and what the
driver says this process has beside it), the plan's error, and the parts. Engine options are those of `lmdserve`.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from typing import NamedTuple

from lmdserve.engine.api import Request, SamplingParams
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.memory_device import find_gpu
from lmdserve.engine.torch_setup import prepare_torch
from lmdserve.server.options import OptionParser, add_options, read_options

PROMPT_TOKENS = 1000
OUTPUT_TOKENS = 16
NUM_PROMPT_LOGPROB_REQUESTS = 4


class Phase(NamedTuple):
    """Requests that run together."""

    name: str
    requests: list[Request]


def main() -> int:
    parser = OptionParser(description=__doc__)
    add_options(parser, EngineConfig, title="model and engine")
    config = read_options(EngineConfig, parser.parse_known(sys.argv[1:]))
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    prepare_torch()
    gpu = find_gpu()
    if gpu is None:
        print("no GPU found", file=sys.stderr)
        return 2
    asyncio.run(measure(config, num_bytes_of_others=gpu.total_bytes - gpu.free_bytes))
    return 0


async def measure(config: EngineConfig, *, num_bytes_of_others: int) -> None:
    """Load, run every phase, print a line after each."""
    import torch

    from lmdserve.engine.load_engine import load_engine
    from lmdserve.engine.memory import plan_memory
    from lmdserve.engine.memory_device import find_device
    from lmdserve.engine.model_config import ModelConfig
    from lmdserve.engine.model_folder import resolve_model_folder

    model_config = ModelConfig.from_folder(resolve_model_folder(config.model, config.revision))
    plan = plan_memory(config, model_config, find_device("cuda"))
    engine = load_engine(config)

    def report(phase: str) -> None:
        gpu = find_gpu()
        assert gpu is not None
        outside_torch = gpu.total_bytes - gpu.free_bytes - num_bytes_of_others - torch.cuda.memory_reserved()
        peak = torch.cuda.max_memory_reserved() + outside_torch
        numbers = {
            "phase": phase,
            "planned_mib": mib(plan.peak_bytes),
            "peak_mib": mib(peak),
            "error_percent": round(100 * (plan.peak_bytes / peak - 1), 2),
            "torch_reserved_mib": mib(torch.cuda.memory_reserved()),
            "torch_allocated_mib": mib(torch.cuda.memory_allocated()),
            "outside_torch_mib": mib(outside_torch),
            "kv_mib": mib(plan.kv_bytes),
        } | ({part.name: mib(part.num_bytes) for part in plan.parts} if phase == "loaded" else {})
        print(json.dumps(numbers), flush=True)

    report("loaded")
    await engine.start()
    for phase in phases(plan.max_batch_size, model_config.vocab_size):
        await asyncio.gather(*(finish(engine, request) for request in phase.requests))
        report(phase.name)
    await engine.stop(0.0)


def phases(batch_size: int, vocab_size: int) -> Iterator[Phase]:
    """Yield the kinds of work in turn; each fills the largest prefill steps and a full batch of decode rows."""
    greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    edited = SamplingParams(
        top_p=0.9, repetition_penalty=1.1, num_logprobs=5, max_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=1
    )
    for name, sampling, num_prompt_logprobs, count in (
        ("greedy", greedy, None, batch_size),
        ("penalties, top-p and logprobs", edited, None, batch_size),
        ("prompt logprobs", greedy, 1, NUM_PROMPT_LOGPROB_REQUESTS),
    ):
        prompts = ([1 + (i * 7919 + k * 31) % (vocab_size - 1) for k in range(PROMPT_TOKENS)] for i in range(count))
        yield Phase(
            name,
            [
                Request(
                    uid=f"{name} {index}",
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    num_prompt_logprobs=num_prompt_logprobs,
                )
                for index, prompt in enumerate(prompts)
            ],
        )


async def finish(engine: object, request: Request) -> None:
    async for _ in engine.generate(request):  # type: ignore[attr-defined]
        pass


def mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
