"""Guessing ahead on a CUDA device: steps with guesses give what steps without them give."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engine_runs import DEMO, Answer, chat_prompts, common_prefix_share, greedy, make_requests, run_engine

from lmdserve.engine import load_engine
from lmdserve.engine.api import SamplingParams
from lmdserve.engine.config import Device, EngineConfig, QuantPolicy
from lmdserve.engine.sequence import Sequence as LiveSequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE: Device = "cuda"
NUM_TOKENS = 32
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=NUM_TOKENS, ignore_eos=True, num_logprobs=1)


class Guesses:
    """A proposer that always guesses: the known answer up to a random place, and nonsense from there on."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], num_draft_tokens: int) -> None:
        self._answers = answers
        self._num_draft_tokens = num_draft_tokens
        self._rng = random.Random(1)

    def wants_to_draft(self, sequences: Sequence[LiveSequence]) -> bool:
        return len(sequences) <= 12

    def propose(self, sequence: LiveSequence) -> tuple[int, ...]:
        answer = self._answers[tuple(sequence.token_ids[: sequence.num_prompt_tokens])]
        right = answer[sequence.num_output_tokens :][: self._rng.randrange(self._num_draft_tokens + 1)]
        return tuple([*right, *(7,) * self._num_draft_tokens][: self._num_draft_tokens])

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        pass


def run_twice(
    monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, quant_policy: QuantPolicy, **options: object
) -> tuple[list[Answer], list[Answer]]:
    """Return the answers without guesses and with them; some guesses are right, and some are not."""
    prompts = chat_prompts()[:10]
    settings = {"cache_max_entry_count": 512, "session_len": 1024, "enable_prefix_caching": False} | options
    config = EngineConfig(
        model=str(DEMO), device=DEVICE, dtype="float16", quant_policy=quant_policy, speculate="ngram", **settings
    )
    plain = run_engine(replace(config, speculate="off"), make_requests(prompts, sampling))
    answers = {tuple(p): answer.token_ids for p, answer in zip(prompts, plain.rounds[0], strict=True)}
    monkeypatch.setattr(load_engine, "NgramProposer", lambda num_draft_tokens: Guesses(answers, num_draft_tokens))
    guessed = run_engine(config, make_requests(prompts, sampling))
    assert plain.stats.drafted_tokens_total == 0
    assert 20 < guessed.stats.accepted_tokens_total < guessed.stats.drafted_tokens_total
    return plain.rounds[0], guessed.rounds[0]


@pytest.mark.parametrize("quant_policy", [0, 4])
@pytest.mark.parametrize("sampling", [greedy(NUM_TOKENS, num_logprobs=1), SAMPLED], ids=["greedy", "sampled"])
def test_deterministic_answers_are_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, quant_policy: QuantPolicy
) -> None:
    plain, guessed = run_twice(monkeypatch, sampling, quant_policy, deterministic=True)
    assert [(a.token_ids, a.logprobs) for a in guessed] == [(a.token_ids, a.logprobs) for a in plain]


def test_answers_are_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guessed = run_twice(monkeypatch, greedy(NUM_TOKENS), 0)
    assert common_prefix_share(guessed, plain) > 0.8
