"""What constrained answers cost an engine: tokens a second of free and of constrained replies, alone and side by side.

    python benchmarks/grammar_engine.py --model demo --batch 1,8

Each of the batch's clients asks for one reply after the other; each row is a window of some seconds. Kinds of work:
    free         text of 256 tokens
    step by step calls of a tool with many arguments, every token sampled in a step
    forwarded    the same, where tokens that the grammar forces need no step of their own
    half free    every other client free, the others as forwarded
    one costly   all clients free but one, of whose masks every fifth takes 50 ms, as the costliest of real schemas do
Sampling is at temperature 1 with a seed a client. `tokens a step` is a mean over the steps of each sequence, `gap` the
time between the chunks of free clients, `held` how late the event loop came to a timer. All options of the server's
engine are understood.
"""

import asyncio
import datetime
import gc
import hashlib
import itertools
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from lmdserve.engine.torch_setup import prepare_torch

prepare_torch()

import torch  # noqa: E402
import uvloop  # noqa: E402
from grammar import SYNTAX, share_of, vocabulary_of  # noqa: E402

import lmdserve  # noqa: E402
from lmdserve.engine.api import Request, SamplingParams  # noqa: E402
from lmdserve.engine.config import EngineConfig  # noqa: E402
from lmdserve.engine.load_engine import load_engine  # noqa: E402
from lmdserve.engine.loop import AsyncEngine  # noqa: E402
from lmdserve.engine.model_folder import resolve_model_folder  # noqa: E402
from lmdserve.server.options import OptionParser, add_options, read_options  # noqa: E402
from lmdserve.server.text import Tokenizer  # noqa: E402
from lmdserve.tools.call_grammar import CallGrammar  # noqa: E402
from lmdserve.tools.constraint import ReplyConstraint, ReplyRules, TokenSets  # noqa: E402
from lmdserve.tools.grammar import GrammarCompiler  # noqa: E402
from lmdserve.tools.schema import normalize_tools  # noqa: E402

KINDS = ("free", "step by step", "forwarded", "half free", "one costly")
MASKS_PER_COSTLY_ONE, COSTLY_MASK_S = 5, 0.05
WORK = bytes(2**20)
FREE_TOKENS = 256  # of a free reply
WARM_UP_S = 0.7
PROMPT_LEN = 64
TICK_S = 0.001
HEADER = (
    "| batch | replies | tokens | tok/s | tokens a step | gap p50, ms | gap p99, ms | held p99, ms | held max, ms |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
ORDER = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 16},
        "customer_email": {"type": "string", "pattern": "^[a-z]{3,8}@[a-z]{3,8}\\.(com|org)$"},
        "delivery_address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 20},
                "house_number": {"type": "integer", "minimum": 1, "maximum": 999},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country": {"enum": ["Germany", "France", "Netherlands", "United Kingdom"]},
            },
            "required": ["street", "house_number", "postal_code", "country"],
            "additionalProperties": False,
        },
        "items": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "article_number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                    "quantity": {"type": "integer", "minimum": 1, "maximum": 20},
                    "gift_wrapping": {"type": "boolean"},
                },
                "required": ["article_number", "quantity", "gift_wrapping"],
                "additionalProperties": False,
            },
        },
        "payment_method": {"enum": ["credit_card", "bank_transfer", "invoice"]},
        "delivery_date": {"type": "string", "format": "date"},
    },
    "required": ["customer_name", "customer_email", "delivery_address", "items", "payment_method", "delivery_date"],
    "additionalProperties": False,
}


class StepByStep(ReplyConstraint):
    """A constraint that keeps its forced tokens to itself."""

    def take_forced(self) -> list[int]:
        return []


class Costly(ReplyConstraint):
    """A constraint some of whose masks take long."""

    _num_masks = 0

    def mask(self) -> bytes | None:
        self._num_masks += 1
        if self._num_masks % MASKS_PER_COSTLY_ONE == 0:
            end_s = time.thread_time() + COSTLY_MASK_S
            while time.thread_time() < end_s:
                hashlib.sha256(WORK)  # without Python's lock, as masks are computed
        return super().mask()


CONSTRAINT_OF = {"step by step": StepByStep, "one costly": Costly}


@dataclass(slots=True)
class Run:
    """What the clients of one run saw."""

    num_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)  # of free clients
    held_s: list[float] = field(default_factory=list)
    is_counting: bool = False
    took_s: float = 0.0
    num_sequence_steps: int = 0


def main() -> int:
    parser = OptionParser(prog="grammar_engine.py", description=__doc__)
    parser.add_argument("--batch", default="1,32,256")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    add_options(parser, EngineConfig, title="engine")
    arguments = parser.parse_known(sys.argv[1:])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {device}\n\n{HEADER}")
    batches = [int(size) for size in arguments.batch.split(",")]
    kinds, seconds = arguments.kinds.split(","), arguments.seconds
    uvloop.run(measure(read_options(EngineConfig, arguments), batches, kinds, seconds))
    return 0


async def measure(config: EngineConfig, batches: Sequence[int], kinds: Sequence[str], seconds: float) -> None:
    """Print a row for each batch size and kind of work."""
    rules = order_rules(Path(resolve_model_folder(config.model, config.revision)))
    engine = load_engine(config)
    await engine.start()
    gc.collect()
    gc.freeze()  # as the server does
    for size in batches:
        for kind in kinds:
            if size > 1 or kind not in ("half free", "one costly"):
                print(row(kind, size, await run(engine, rules, kind, size, seconds)), flush=True)
    await engine.stop(0.0)


def order_rules(folder: Path) -> ReplyRules:
    """Return the rules of a reply that is a call of the order tool, with the checkpoint's own tokens."""
    vocabulary = vocabulary_of(Tokenizer.load(folder))
    tools = normalize_tools([{"type": "function", "function": {"name": "create_order", "parameters": ORDER}}])
    source = CallGrammar(syntax=SYNTAX, tools=tools, control_ids={}).source(has_opener=True)
    return ReplyRules(sets=TokenSets(vocabulary), answer=GrammarCompiler(vocabulary).compile(source))


async def run(engine: AsyncEngine, rules: ReplyRules, kind: str, size: int, seconds: float) -> Run:
    """Have `size` clients ask for replies, one after the other, and watch them for a while."""
    result = Run()
    clients = [asyncio.create_task(client(engine, rules, kind, index, result)) for index in range(size)]
    ticker = asyncio.create_task(watch_loop(result))
    await asyncio.sleep(WARM_UP_S)
    before, begun_s = engine.stats(), time.perf_counter()
    result.is_counting = True
    await asyncio.sleep(seconds)
    result.is_counting = False
    result.took_s = time.perf_counter() - begun_s
    result.num_sequence_steps = (engine.stats().steps_total - before.steps_total) * size
    for task in (ticker, *clients):
        task.cancel()
    for outcome in await asyncio.gather(ticker, *clients, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError), outcome
    return result


async def client(engine: AsyncEngine, rules: ReplyRules, kind: str, index: int, result: Run) -> None:
    is_free = kind == "free" or (kind == "half free" and index % 2 == 0) or (kind == "one costly" and index > 0)
    for number in itertools.count():
        request = Request(
            uid=f"{id(result)}/{index}/{number}",
            prompt_token_ids=random.Random(f"{index}/{number}").choices(range(engine.info.vocab_size), k=PROMPT_LEN),
            sampling=SamplingParams(seed=index, max_tokens=FREE_TOKENS if is_free else 1000, ignore_eos=is_free),
            constraint=None if is_free else CONSTRAINT_OF.get(kind, ReplyConstraint)(rules),
        )
        previous_s = None
        async with aclosing(engine.generate(request)) as chunks:
            async for chunk in chunks:
                now_s = time.perf_counter()
                if result.is_counting:
                    result.num_tokens += len(chunk.token_ids)
                    if is_free and previous_s is not None:
                        result.gaps_s.append(now_s - previous_s)
                previous_s = now_s


async def watch_loop(result: Run) -> None:
    """Write down how late each wake-up comes."""
    while True:
        begun_s = time.perf_counter()
        await asyncio.sleep(TICK_S)
        if result.is_counting:
            result.held_s.append(time.perf_counter() - begun_s - TICK_S)


def row(kind: str, size: int, result: Run) -> str:
    gaps = [f"{share_of(result.gaps_s, share) * 1e3:.2f}" if result.gaps_s else "-" for share in (0.5, 0.99)]
    held = [f"{share_of(result.held_s, share) * 1e3:.2f}" for share in (0.99, 1.0)]
    return (
        f"| {size} | {kind} | {result.num_tokens} | {result.num_tokens / result.took_s:.0f} "
        f"| {result.num_tokens / result.num_sequence_steps:.2f} | {' | '.join([*gaps, *held])} |"
    )


if __name__ == "__main__":
    sys.exit(main())
