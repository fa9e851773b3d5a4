"""Run the engine without HTTP at several batch sizes and print one Markdown row for each.

    python benchmarks/engine.py --model demo --batch 1,8,32 --quant-policy 0,8,4

Prompts are random tokens, no two alike, and every answer has full length. Decoding speed counts from the moment when
all sequences of the batch have their first token.
"""

import argparse
import asyncio
import datetime
import os
import random
import sys
import time

import torch

import lmdserve
from lmdserve.engine.api import Request, SamplingParams
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.loop import AsyncEngine, load_engine

HEADER = (
    "| model | device, dtype | KV bits | batch | in / out tokens | prefill tok/s | decode tok/s | ms a step |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--quant-policy", default="0,8,4")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {gpu}\n\n{HEADER}")
    for quant_policy in map(int, arguments.quant_policy.split(",")):
        config = EngineConfig(
            model=arguments.model, device=arguments.device, dtype=arguments.dtype, quant_policy=quant_policy,
            cache_max_entry_count=4096,
        )  # fmt: skip
        batches = [int(size) for size in arguments.batch.split(",")]
        asyncio.run(measure(load_engine(config), batches, arguments, quant_policy))
    return 0


async def measure(engine: AsyncEngine, batches: list[int], arguments: argparse.Namespace, quant_policy: int) -> None:
    """Print a row for each batch size, after a warm-up that is not counted."""
    rng = random.Random(0)
    await engine.start()
    await run_batch(engine, 2, arguments, rng)
    for size in batches:
        prefill_s, decode_s = await run_batch(engine, size, arguments, rng)
        steps = arguments.output_len - 1
        device = f"{arguments.device}, {arguments.dtype}"
        print(
            f"| {arguments.model} | {device} | {quant_policy or 'as dtype'} | {size} "
            f"| {arguments.input_len} / {arguments.output_len} | {size * arguments.input_len / prefill_s:.0f} "
            f"| {size * steps / decode_s:.0f} | {decode_s / steps * 1000:.2f} |",
            flush=True,
        )
    await engine.stop(0.0)


async def run_batch(
    engine: AsyncEngine, size: int, arguments: argparse.Namespace, rng: random.Random
) -> tuple[float, float]:
    """Generate `size` answers at once; return the seconds until all have begun, and from there to the end."""
    first_token_s: list[float] = []

    async def one(index: int) -> None:
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(arguments.input_len)]
        sampling = SamplingParams(temperature=0.0, max_tokens=arguments.output_len, ignore_eos=True)
        request = Request(uid=f"{rng.random()}-{index}", prompt_token_ids=prompt, sampling=sampling)
        is_first = True
        async for _ in engine.generate(request):
            if is_first:
                first_token_s.append(time.perf_counter())
                is_first = False

    start_s = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(size)))
    end_s = time.perf_counter()
    return max(first_token_s) - start_s, end_s - max(first_token_s)


if __name__ == "__main__":
    sys.exit(main())
