"""Run the engine without HTTP and print one Markdown row for each kind of work.

    python benchmarks/random_model.py --shape internlm2.5-7b --format awq --out internlm2.5-7b-awq
    python benchmarks/engine.py --model internlm2.5-7b-awq --compare benchmarks/lmdeploy_h200.json

`--model` and `--quant-policy` take lists; each pair is a process of its own. `--work` is a list of
    decode:C     one request with a prompt of C tokens: tokens a second from its first to its last (256 of them)
    prefill:N    one request: milliseconds from its submission to its first token
    SxI+O        S requests of I random tokens, all submitted at once, O tokens out of each: all output tokens over the
                 time from the first submission to the last token, prompts and queueing included
Prompts are random, no two alike; decoding is greedy and no answer ends early. A shorter run of the same shape goes
before each row and is not counted. decode and prefill rows are the median of `--repeats` runs, the others one run.

floor: `floor.py`'s, for the devices it knows. GPU idle: the share of time between a step's end and the begin of the
next one, as far as the engine measures it. `--profile` adds what a decode step at batch 1 launches, from torch's
profiler. All options of the server's engine are understood, such as --dtype or --deterministic; only --max-batch-size
has another default, 256.
"""

import argparse
import asyncio
import datetime
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lmdserve.engine.torch_setup import prepare_torch

prepare_torch()

import torch  # noqa: E402
import uvloop  # noqa: E402
from floor import KNOWN_DEVICES, Floor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import lmdserve  # noqa: E402
from lmdserve.engine.api import EngineStats, Request, SamplingParams  # noqa: E402
from lmdserve.engine.config import EngineConfig  # noqa: E402
from lmdserve.engine.load_engine import load_engine  # noqa: E402
from lmdserve.engine.loop import AsyncEngine  # noqa: E402
from lmdserve.engine.model_config import ModelConfig  # noqa: E402
from lmdserve.engine.model_folder import resolve_model_folder  # noqa: E402
from lmdserve.server.options import OptionParser, add_options, read_options  # noqa: E402

TABLE_WORK = (
    "decode:8,decode:1024,decode:4096,prefill:4096,16x512+256,64x512+256,256x512+256,64x4096+256"  # of the 7B models
)
HEADER = (
    "| model | KV bits | work | result | floor | share | GPU idle | steps | {label} |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
DECODE_OUTPUT_LEN = 256
WARM_UP_TOKENS = 65536  # of prompts, at most
WARM_UP_OUTPUT_LEN = 8
PROFILED_CONTEXT_LEN = 1024
NUM_PROFILED_KERNELS = 12


@dataclass(frozen=True, slots=True)
class Work:
    """One row: what is asked of the engine, and what is reported of it."""

    kind: str  # decode, prefill or batch
    num_sequences: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> "Work":
        if match := re.fullmatch(r"decode:(\d+)", text):
            return cls("decode", 1, int(match[1]), DECODE_OUTPUT_LEN)
        if match := re.fullmatch(r"prefill:(\d+)", text):
            return cls("prefill", 1, int(match[1]), 1)
        if match := re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text):
            return cls("batch", int(match[1]), int(match[2]), int(match[3]))
        raise argparse.ArgumentTypeError(f"{text!r} is no work; write decode:1024, prefill:4096 or 16x512+256")

    @property
    def name(self) -> str:
        if self.kind == "batch":
            return f"{self.num_sequences}x{self.input_len}+{self.output_len}"
        return f"{self.kind}:{self.input_len}"

    @property
    def unit(self) -> str:
        return {"decode": "tok/s", "prefill": "ms", "batch": "out tok/s"}[self.kind]

    def value(self, run: "Run") -> float:
        """Return what the row reports of a run."""
        if self.kind == "decode":
            return (self.output_len - 1) / (run.end_s - run.first_token_s)
        if self.kind == "prefill":
            return run.first_token_s * 1000
        return self.num_sequences * self.output_len / run.end_s

    def floor_value(self, floor: Floor) -> float:
        """Return the same for a device that loses no time."""
        if self.kind == "decode":
            return 1 / floor.decode_step_s(1, self.input_len + self.output_len / 2)
        if self.kind == "prefill":
            return floor.prefill_s(self.input_len) * 1000
        total_s = floor.batch_s(self.num_sequences, self.input_len, self.output_len)
        return self.num_sequences * self.output_len / total_s

    def share_of_floor(self, value: float, floor_value: float) -> float:
        return floor_value / value if self.kind == "prefill" else value / floor_value


class Run(NamedTuple):
    """What one run brought; times count from the first submission."""

    first_token_s: float  # when the last of the sequences had its first token
    end_s: float
    before: EngineStats
    after: EngineStats

    @property
    def num_steps(self) -> int:
        return self.after.steps_total - self.before.steps_total

    @property
    def idle_share(self) -> float | None:
        """Return None where the engine does not measure it."""
        idle_s = self.after.device_idle_s_total - self.before.device_idle_s_total
        busy_s = self.after.device_busy_s_total - self.before.device_busy_s_total
        return idle_s / (idle_s + busy_s) if busy_s else None


def main() -> int:
    arguments = parse_arguments()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"
    options = " ".join(sys.argv[1:])
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {device}, {options}\n")
    compared = json.loads(arguments.compare.read_text("utf-8")) if arguments.compare else {"label": "-", "models": {}}
    print(HEADER.format(label=compared["label"]), flush=True)
    num_failed = 0
    for model in arguments.models:
        for quant_policy in arguments.quant_policies:
            config = replace(read_options(EngineConfig, arguments), model=model, quant_policy=quant_policy)
            known = compared["models"].get(Path(model).name, {}).get(str(quant_policy or 16), {})
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(config, arguments, known))
            process.start()
            process.join()
            num_failed += process.exitcode != 0
    return 1 if num_failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", dest="models", type=lambda text: text.split(","), default=["demo"])
    parser.add_argument("--quant-policy", dest="quant_policies", type=listed(int), default=[0, 8, 4])
    parser.add_argument("--work", type=listed(Work.parse), default=TABLE_WORK, metavar="WORK[,WORK...]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a decode or prefill row (%(default)s)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="numbers for the last column")
    parser.add_argument("--profile", action="store_true", help="list what a decode step launches on a GPU")
    names = EngineConfig.__dataclass_fields__.keys() - {"model", "quant_policy"}
    add_options(parser, EngineConfig, title="engine", only=names)
    parser.set_defaults(max_batch_size=256)
    return parser.parse_known(sys.argv[1:])


def listed(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [read(item) for item in text.split(",")]


def measure(config: EngineConfig, arguments: argparse.Namespace, known: dict[str, float]) -> None:
    """Print the rows of one engine; runs in a process of its own."""
    uvloop.run(measure_all(load_engine(config), config, arguments, known))


async def measure_all(
    engine: AsyncEngine, config: EngineConfig, arguments: argparse.Namespace, known: dict[str, float]
) -> None:
    model = ModelConfig.from_folder(resolve_model_folder(config.model, config.revision))
    device = KNOWN_DEVICES.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    floor = None if device is None else Floor(model, config.quant_policy or 16, device, config.lm_head_bits)
    rng = random.Random(0)
    await engine.start()
    for work in arguments.work:
        if work.input_len + work.output_len > engine.info.session_len:
            continue
        await run(engine, shortened(work), rng)
        runs = [await run(engine, work, rng) for _ in range(1 if work.kind == "batch" else arguments.repeats)]
        print(row(config, work, runs, floor, known), flush=True)
    if arguments.profile and torch.cuda.is_available():
        print(await profiled_step(engine, model, rng), flush=True)
    await engine.stop(0.0)


def shortened(work: Work) -> Work:
    """Return the run that goes before a row: its shapes, as far as that is quick."""
    most = max(1, WARM_UP_TOKENS // work.input_len)
    return replace(
        work, num_sequences=min(work.num_sequences, most), output_len=min(work.output_len, WARM_UP_OUTPUT_LEN)
    )


async def run(engine: AsyncEngine, work: Work, rng: random.Random) -> Run:
    """Submit all requests of the work at once and wait for their last token."""
    vocabulary = range(engine.info.vocab_size)
    prompts = [rng.choices(vocabulary, k=work.input_len) for _ in range(work.num_sequences)]
    first_token_s: list[float] = []
    before = engine.stats()
    start_s = time.perf_counter()

    async def one(index: int) -> None:
        num_tokens = 0
        async for chunk in engine.generate(request(f"{start_s}/{index}", prompts[index], work.output_len)):
            if not num_tokens:
                first_token_s.append(time.perf_counter() - start_s)
            num_tokens += len(chunk.token_ids)
        assert num_tokens == work.output_len

    await asyncio.gather(*(one(index) for index in range(work.num_sequences)))
    return Run(max(first_token_s), time.perf_counter() - start_s, before, engine.stats())


def request(uid: str, prompt: Sequence[int], max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(uid=uid, prompt_token_ids=prompt, sampling=sampling)


def row(config: EngineConfig, work: Work, runs: list[Run], floor: Floor | None, known: dict[str, float]) -> str:
    value = statistics.median(work.value(run) for run in runs)
    idle_shares = [run.idle_share for run in runs if run.idle_share is not None]
    floor_value = None if floor is None else work.floor_value(floor)
    cells = [
        Path(config.model).name,
        str(config.quant_policy or "as dtype"),
        work.name,
        f"{number(value)} {work.unit}",
        "-" if floor_value is None else number(floor_value),
        "-" if floor_value is None else f"{work.share_of_floor(value, floor_value):.0%}",
        f"{statistics.median(idle_shares):.1%}" if idle_shares else "-",
        str(runs[-1].num_steps),
        f"{known[work.name]:g}" if work.name in known else "-",
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


async def profiled_step(engine: AsyncEngine, model: ModelConfig, rng: random.Random) -> str:
    """Return the kernels of a decode step at batch 1, most time first; copies and fills of memory are not kernels."""
    prompt = rng.choices(range(engine.info.vocab_size), k=PROFILED_CONTEXT_LEN)
    profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
    first_step = None
    async for _ in engine.generate(request("profiled", prompt, DECODE_OUTPUT_LEN)):
        if first_step is None:
            profiler.start()
            first_step = engine.stats().steps_total
    num_steps = engine.stats().steps_total - (first_step or 0)
    profiler.stop()
    kernels = [
        event
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith(("Memcpy", "Memset"))
    ]
    launches = sum(event.count for event in kernels) / num_steps
    in_layers = sum(event.count for event in kernels if event.count > 0.9 * num_steps * model.num_layers) / num_steps
    kernels.sort(key=lambda event: -event.self_device_time_total)
    lines = [
        f"\nA decode step: {launches:.1f} launches, {in_layers / model.num_layers:.2f} a layer of kernels that every "
        f"layer runs; {sum(event.self_device_time_total for event in kernels) / num_steps:.0f} us in kernels.\n",
        "| kernel | launches a step | us a step |\n|---|---|---|",
    ]
    for event in kernels[:NUM_PROFILED_KERNELS]:
        time_us = event.self_device_time_total / num_steps
        lines.append(f"| {event.key[:70]} | {event.count / num_steps:.1f} | {time_us:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
