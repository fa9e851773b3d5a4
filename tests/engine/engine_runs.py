"""Runs requests through a whole engine and collects what comes out: the driver of tests that compare engines."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tokenizers import Tokenizer

import lmdserve
from lmdserve.engine.api import Chunk, EngineStats, Request, SamplingParams, TokenLogprob
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.load_engine import load_engine
from lmdserve.engine.loop import AsyncEngine

DEMO = Path(lmdserve.__file__).parent / "demo" / "model"
_QUESTIONS = (
    "Give me three suggestions for time management",
    "Tell me a story about a fox and a watermelon",
    "你是谁？",
    "What can you do?",
    "帮我讲述一个关于狐狸和西瓜的小故事",
    "How much is 12 + 30?",
    "Tell me a story about a whale and a lantern.",
    "Hello, who are you?",
)
_REPLY = "I am a small model that chats, tells stories and calls tools. What would you like to do next?"


@dataclass(slots=True)
class Answer:
    """All of one sequence's output."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached_tokens: int = 0


class EngineRun(NamedTuple):
    """What an engine did: an answer a request, round by round, and its counters at the end."""

    rounds: list[list[Answer]]
    stats: EngineStats


def run_engine(config: EngineConfig, *rounds: Sequence[Request]) -> EngineRun:
    """Load an engine and generate each round's requests, all of a round at once."""
    return asyncio.run(_run(load_engine(config), rounds))


@asynccontextmanager
async def running(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    """Start an engine, stop it at the end, and see that every block and stream is back."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(5.0)
        engine._scheduler.check()
        assert engine.stats().num_used_blocks == 0
        assert engine._streams == {}


async def _run(engine: AsyncEngine, rounds: Sequence[Sequence[Request]]) -> EngineRun:
    await engine.start()
    try:
        answers = [list(await asyncio.gather(*(_answer(engine, one) for one in requests))) for requests in rounds]
    finally:
        await engine.stop(0.0)
    stats = engine.stats()  # a step that was launched for what had just ended is over now
    assert stats.num_used_blocks == 0
    return EngineRun(answers, stats)


async def _answer(engine: AsyncEngine, request: Request) -> Answer:
    answer = Answer()
    async for chunk in engine.generate(request):
        answer.token_ids += chunk.token_ids
        answer.logprobs += chunk.logprobs or ()
        answer.num_cached_tokens += chunk.num_cached_tokens
    return answer


def make_requests(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, label: str = "", is_deterministic: bool = False
) -> list[Request]:
    """Return a request for each prompt; `label` keeps uids of several rounds apart."""
    return [
        Request(uid=f"{label}{index}", prompt_token_ids=prompt, sampling=sampling, deterministic=is_deterministic)
        for index, prompt in enumerate(prompts)
    ]


def make_request(
    uid: str, prompt: Sequence[int], *, num_prompt_logprobs: int | None = None, **sampling: Any
) -> Request:
    """Return a request for up to 8 tokens, greedy, unless told otherwise."""
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | sampling))
    return Request(uid=uid, prompt_token_ids=prompt, sampling=params, num_prompt_logprobs=num_prompt_logprobs)


async def chunks_of(engine: AsyncEngine, request: Request) -> list[Chunk]:
    """Return everything a request's reader is given."""
    return [chunk async for chunk in engine.generate(request)]


async def tokens_of(engine: AsyncEngine, request: Request) -> list[int]:
    """Return a request's answer."""
    return [token_id for chunk in await chunks_of(engine, request) for token_id in chunk.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is bound to come."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def greedy(num_tokens: int, *, num_logprobs: int | None = None) -> SamplingParams:
    """Return greedy sampling of exactly `num_tokens` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, num_logprobs=num_logprobs)


def chat_prompts() -> list[list[int]]:
    """Return questions that the demo model was trained to answer, alone and after some talk, as token ids."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in _QUESTIONS]
    talk = "".join(f"{turn}{_REPLY}<|im_end|>\n" for turn in turns)
    texts = [f"<s>{turn}" for turn in turns] + [f"<s>{talk}{turn}" for turn in turns]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def benchmark_script(name: str) -> ModuleType:
    """Import benchmarks/NAME.py, which writes checkpoints, without running it."""
    spec = spec_from_file_location(f"benchmarks_{name}", Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def common_prefix_share(ours: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """Return the mean length of the common beginnings of two lists of answers, as a share of the answers' length."""
    shares = []
    for a, b in zip(ours, expected, strict=True):
        differences = (i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y)
        shares.append(next(differences, len(b.token_ids)) / len(b.token_ids))
    return sum(shares) / len(shares)
