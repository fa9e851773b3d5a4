"""Measure guessing ahead (`--speculate ngram`): how many guesses are right, and what it gains or costs.

    python benchmarks/speculation.py --model demo --batch 1,4
    python benchmarks/widened_model.py --out /tmp/demo-7b-awq       # the same text at a 7B model's cost, on a GPU
    python benchmarks/speculation.py --model /tmp/demo-7b-awq --batch 1,4,8 --quant-policy 8

Three kinds of text, each decoded without guesses and with them, in turns. The outputs are compared, which says
something where steps are deterministic: in float32 on a CPU, and on a GPU with --deterministic.
    repetitive   greedy, after the request to repeat a sentence (the demo model copies it and gets into a loop)
    free         sampled at temperature 1 from the beginnings of stories, so that little repeats itself
    nonsense     as free, with a proposer that always guesses and is never right: the price of a step with guesses
`tokens a step` is the mean over the steps of each sequence. `tok/s of a stream` is the mean of all streams' own speeds:
one that repeats itself ends early, and what it costs the others is theirs. `speed` is the median of the runs with
guesses over the median of those without; `until all end` is the same for all tokens over the time until the last
stream ends, which the one that repeats itself least decides. All options of the server's engine are understood, such as
--num-draft-tokens.
"""

import asyncio
import dataclasses
import datetime
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lmdserve.engine.torch_setup import prepare_torch

prepare_torch()

import torch  # noqa: E402
import uvloop  # noqa: E402

import lmdserve  # noqa: E402
from lmdserve.engine.api import Request, SamplingParams  # noqa: E402
from lmdserve.engine.config import EngineConfig  # noqa: E402
from lmdserve.engine.load_engine import load_engine  # noqa: E402
from lmdserve.engine.loop import AsyncEngine  # noqa: E402
from lmdserve.engine.model_folder import resolve_model_folder  # noqa: E402
from lmdserve.engine.sequence import Sequence as LiveSequence  # noqa: E402
from lmdserve.server.model import ServedModel, load_served_model  # noqa: E402
from lmdserve.server.options import OptionParser, add_options, read_options  # noqa: E402

HEADER = (
    "| text | batch | guessed | right | tokens a step | tok/s of a stream without | with | speed | until all end "
    "| same output |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
SENTENCES = (
    "the quick brown fox jumps over the lazy dog.",
    "a small boat crossed the wide river at night.",
    "the cat sat on the mat and looked at the door.",
    "seven birds sang in the old tree by the road.",
)
BEGINNINGS = ("Once upon a time", "The old man", "In the morning", "A little dog", "My sister said", "One day the king",
              "Nobody knew", "It was raining")  # fmt: skip
KINDS = ("repetitive", "free", "nonsense")


class Run(NamedTuple):
    """One batch of answers."""

    outputs: Sequence[tuple[int, ...]]
    stream_tokens_per_s: float  # mean of the streams
    tokens_per_s: float  # of all streams, until the last one ends
    num_drafted: int
    num_accepted: int


class Nonsense:
    """A proposer that always guesses one token id, which text hardly ever has."""

    def __init__(self, token_id: int, count: int) -> None:
        self._guess = (token_id,) * count

    def wants_to_draft(self, sequences: Sequence[LiveSequence]) -> bool:
        return True

    def propose(self, sequence: LiveSequence) -> tuple[int, ...]:
        return self._guess

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        pass


def main() -> int:
    parser = OptionParser(prog="speculation.py", description=__doc__)
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, EngineConfig, title="engine")
    arguments = parser.parse_known(sys.argv[1:])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {device}\n\n{HEADER}")
    config = dataclasses.replace(read_options(EngineConfig, arguments), enable_prefix_caching=False)
    batches = [int(size) for size in arguments.batch.split(",")]
    uvloop.run(measure(config, batches, arguments.output_len, arguments.repeats))
    return 0


async def measure(config: EngineConfig, batches: Sequence[int], output_len: int, repeats: int) -> None:
    """Print a row for each kind of text and batch size."""
    folder = Path(resolve_model_folder(config.model, config.revision))
    model = load_served_model(folder, name=config.model, chat_template=None)
    engine = load_engine(dataclasses.replace(config, speculate="ngram"))
    ngram = engine._scheduler._proposer
    nonsense = Nonsense(max(model.tokenizer.control_tokens.values()), config.num_draft_tokens)
    await engine.start()
    for kind in KINDS:
        proposer = nonsense if kind == "nonsense" else ngram
        for size in batches:
            runs: dict[bool, list[Run]] = {False: [], True: []}
            for index in range(2 * (repeats + 1)):
                is_guessing = index % 2 == 1
                engine._scheduler._proposer = proposer if is_guessing else None
                run = await run_batch(engine, model, kind, size, output_len)
                if index >= 2:  # the first of each is a warm-up
                    runs[is_guessing].append(run)
            print(row(kind, size, output_len, runs), flush=True)
    await engine.stop(0.0)


async def run_batch(engine: AsyncEngine, model: ServedModel, kind: str, size: int, output_len: int) -> Run:
    """Generate `size` answers at once."""

    async def one(index: int) -> tuple[tuple[int, ...], float]:
        beginning = BEGINNINGS[index % len(BEGINNINGS)]
        sentence = SENTENCES[index % len(SENTENCES)]
        is_repetitive = kind == "repetitive"
        if is_repetitive:
            prompt = model.renderer.render([{"role": "user", "content": f"Please repeat: {sentence} {sentence}"}])
        else:
            prompt = model.tokenizer.encode(beginning, add_bos=True)
        temperature = 0.0 if is_repetitive else 1.0
        sampling = SamplingParams(temperature=temperature, seed=index, max_tokens=output_len, ignore_eos=True)
        request = Request(uid=f"{kind} {index}", prompt_token_ids=prompt, sampling=sampling)
        output = tuple([token_id async for chunk in engine.generate(request) for token_id in chunk.token_ids])
        return output, time.perf_counter() - begun_s

    before, begun_s = engine.stats(), time.perf_counter()
    outputs, took_s = zip(*await asyncio.gather(*(one(index) for index in range(size))), strict=True)
    after = engine.stats()
    return Run(
        outputs=outputs,
        stream_tokens_per_s=statistics.mean(output_len / seconds for seconds in took_s),
        tokens_per_s=size * output_len / max(took_s),
        num_drafted=after.drafted_tokens_total - before.drafted_tokens_total,
        num_accepted=after.accepted_tokens_total - before.accepted_tokens_total,
    )


def row(kind: str, size: int, output_len: int, runs: dict[bool, list[Run]]) -> str:
    """Return what the runs without guesses (False) and with them (True) amount to."""
    of_stream = {key: statistics.median(run.stream_tokens_per_s for run in runs[key]) for key in runs}
    of_all = {key: statistics.median(run.tokens_per_s for run in runs[key]) for key in runs}
    last = runs[True][-1]
    share = f"{last.num_accepted / last.num_drafted:.0%}" if last.num_drafted else "-"
    same = sum(a == b for a, b in zip(runs[False][-1].outputs, last.outputs, strict=True))
    num_tokens = size * output_len
    tokens_a_step = num_tokens / (num_tokens - last.num_accepted)
    return (
        f"| {kind} | {size} | {last.num_drafted} | {share} | {tokens_a_step:.2f} "
        f"| {of_stream[False]:.0f} | {of_stream[True]:.0f} | {of_stream[True] / of_stream[False]:.2f} x "
        f"| {of_all[True] / of_all[False]:.2f} x | {same} of {size} |"
    )


if __name__ == "__main__":
    sys.exit(main())
