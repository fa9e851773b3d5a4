"""Constrained sequences on a CUDA device: every token obeys, and free ones beside them are as if alone."""

import json
import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from engine_runs import DEMO, chat_prompts, run_engine

from lmdserve.engine.api import Request, SamplingParams
from lmdserve.engine.config import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
LENGTH = 24
STEP, MODULUS = 7, 31  # coprime, and every residue has tokens in it


class Chain:
    """Allows tokens whose remainder follows from the one before, so that a stale mask shows at once.

    From `forced_from` on, three of four tokens are the only ones that may come; it says so in advance unless silent.
    """

    must_end = False

    def __init__(self, vocab_size: int, *, forced_from: int = LENGTH, is_silent: bool = False) -> None:
        self._vocab_size = vocab_size
        self._forced_from = forced_from
        self._is_silent = is_silent
        self.token_ids: list[int] = []
        self.lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        return len(self.token_ids) == LENGTH

    def mask(self) -> bytes:
        num_bytes = -(-self._vocab_size // 32) * 4
        return sum(1 << token_id for token_id in self._allowed()).to_bytes(num_bytes, "little")

    def accept(self, token_id: int) -> None:
        assert token_id in self._allowed()
        self.token_ids.append(token_id)

    def take_forced(self) -> list[int]:
        forced: list[int] = []
        while not self._is_silent and not self.is_over and len(allowed := self._allowed()) == 1:
            self.accept(allowed[0])
            forced += allowed
        return forced

    def _allowed(self) -> range:
        place = len(self.token_ids)
        first = (self.token_ids[-1] + STEP) % MODULUS if place else 3
        if place >= self._forced_from and place % 4:
            first += MODULUS * (sum(self.token_ids) % (self._vocab_size // MODULUS - 1))
            return range(first, first + 1)
        return range(first, self._vocab_size, MODULUS)


def _obeys(token_ids: Sequence[int]) -> bool:
    follows = [(before + STEP) % MODULUS == after % MODULUS for before, after in pairwise(token_ids)]
    return token_ids[0] % MODULUS == 3 and all(follows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_obeys_and_nobody_else_notices(temperature: float) -> None:
    config = EngineConfig(
        model=str(DEMO), device=DEVICE, cache_max_entry_count=512, session_len=1024, deterministic=True
    )
    prompts = chat_prompts()[:6]
    free = SamplingParams(temperature=temperature, seed=3, max_tokens=LENGTH, ignore_eos=True)
    penalized = SamplingParams(
        temperature=temperature, seed=3, max_tokens=LENGTH + 9, ignore_eos=True, repetition_penalty=1.2
    )
    vocab_size = json.loads((DEMO / "config.json").read_text("utf-8"))["vocab_size"]

    def requests(label: str, *, is_mixed: bool) -> list[Request]:
        kept = [Request(uid=f"{label}f{i}", prompt_token_ids=p, sampling=free) for i, p in enumerate(prompts)]
        held = [
            Request(uid=f"{label}c{i}", prompt_token_ids=p, sampling=penalized, constraint=Chain(vocab_size))
            for i, p in enumerate(prompts)
        ]
        return [*kept, *held] if is_mixed else kept

    alone, mixed = run_engine(config, requests("a", is_mixed=False), requests("b", is_mixed=True)).rounds
    assert [answer.token_ids for answer in mixed[: len(prompts)]] == [answer.token_ids for answer in alone]
    for answer in mixed[len(prompts) :]:
        assert len(answer.token_ids) == LENGTH
        assert _obeys(answer.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("is_deterministic", [True, False])
def test_forced_tokens_change_no_other(temperature: float, *, is_deterministic: bool) -> None:
    """Without deterministic steps the numbers depend on the rows beside, so that answers need only obey."""
    config = EngineConfig(
        model=str(DEMO), device=DEVICE, cache_max_entry_count=512, session_len=1024, deterministic=is_deterministic
    )
    vocab_size = json.loads((DEMO / "config.json").read_text("utf-8"))["vocab_size"]
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=LENGTH + 9, ignore_eos=True)

    def requests(*, is_silent: bool) -> list[Request]:
        return [
            Request(
                uid=f"{is_silent}{i}",
                prompt_token_ids=prompt,
                sampling=sampling,
                constraint=Chain(vocab_size, forced_from=i, is_silent=is_silent) if i % 3 else None,
            )
            for i, prompt in enumerate(chat_prompts()[:9])
        ]

    stepwise, forwarded = run_engine(config, requests(is_silent=True), requests(is_silent=False)).rounds
    if is_deterministic:
        assert [answer.token_ids for answer in forwarded] == [answer.token_ids for answer in stepwise]
    for index, answer in enumerate(forwarded):
        if index % 3:
            assert len(answer.token_ids) == LENGTH
            assert _obeys(answer.token_ids)
