"""Deterministic answers on a CUDA device: the same tokens and logprobs, bit by bit, whatever runs beside them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import DEMO, Answer, benchmark_script, chat_prompts, greedy, make_requests, run_engine

from lmdserve.engine.config import EngineConfig, QuantPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 24
GREEDY = greedy(NUM_TOKENS, num_logprobs=3)


def config_for(model: str | Path, quant_policy: QuantPolicy, **changes: object) -> EngineConfig:
    options = {"cache_max_entry_count": 512, "session_len": 1024, "max_batch_size": 64, "deterministic": True} | changes
    return EngineConfig(model=str(model), device="cuda", dtype="float16", quant_policy=quant_policy, **options)


def bits(answer: Answer) -> tuple[object, ...]:
    """Return all that has to be equal."""
    return answer.token_ids, answer.logprobs


@pytest.fixture(scope="module", params=["fp16", "awq"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "fp16":
        return DEMO
    folder = tmp_path_factory.mktemp("awq") / "demo-awq"
    benchmark_script("demo_quality").write_awq(DEMO, folder)
    return folder


@pytest.mark.parametrize("quant_policy", [8, 4])
def test_an_answer_among_32_others_is_the_answer_alone(model: Path, quant_policy: QuantPolicy) -> None:
    prompts = (chat_prompts() * 3)[:33]
    together, alone = make_requests(prompts, GREEDY, label="a"), make_requests(prompts[5:6], GREEDY, label="b")
    config = config_for(model, quant_policy, enable_prefix_caching=False)
    rounds = run_engine(config, together, alone).rounds
    assert bits(rounds[0][5]) == bits(rounds[1][0])
    assert bits(rounds[0][5]) == bits(rounds[0][21])  # the same prompt, elsewhere in the batch


def test_a_wide_model_s_answers_are_the_same_bits_in_any_company(tmp_path: Path) -> None:
    """At a real model's widths a kernel has another form for few rows than for many, as the demo model's have not."""
    script = benchmark_script("random_model")
    script.write_model(replace(script.SHAPES["internlm2.5-7b"], num_layers=2), "awq", tmp_path / "wide")
    numbers = random.Random(1)
    lengths = (700, 3, 1, 65, 17, 900) + (300, 40) * 12
    prompts = [[numbers.randrange(3, 90000) for _ in range(length)] for length in lengths]
    config = config_for(tmp_path / "wide", 4, enable_prefix_caching=False)
    together, few = make_requests(prompts, GREEDY, label="a"), make_requests(prompts[:3], GREEDY, label="b")
    rounds = run_engine(config, together, few).rounds
    pieces = run_engine(replace(config, max_prefill_token_num=333), make_requests(prompts, GREEDY)).rounds[0]
    assert list(map(bits, rounds[1])) == list(map(bits, rounds[0][:3]))
    assert list(map(bits, pieces)) == list(map(bits, rounds[0]))


@pytest.mark.parametrize("quant_policy", [0, 4])
def test_one_request_can_ask_for_it(quant_policy: QuantPolicy) -> None:
    """The engine as such is not deterministic; the others of the batch do not ask."""
    prompts = chat_prompts()
    asked = make_requests(prompts[9:10], GREEDY, label="a", is_deterministic=True)
    alone = make_requests(prompts[9:10], GREEDY, label="b", is_deterministic=True)
    config = config_for(DEMO, quant_policy, deterministic=False)
    rounds = run_engine(config, [*asked, *make_requests(prompts, GREEDY, label="c")], alone).rounds
    assert bits(rounds[0][0]) == bits(rounds[1][0])


@pytest.mark.parametrize("quant_policy", [0, 4])
def test_a_prompt_from_the_prefix_cache_gives_the_same_bits(model: Path, quant_policy: QuantPolicy) -> None:
    prompts = [prompt for prompt in chat_prompts() if len(prompt) > 200]
    cold, warm = make_requests(prompts[:1], GREEDY, label="a"), make_requests(prompts[:1], GREEDY, label="b")
    rounds = run_engine(config_for(model, quant_policy), cold, warm).rounds
    assert rounds[0][0].num_cached_tokens == 0
    assert rounds[1][0].num_cached_tokens > 100
    assert bits(rounds[0][0]) == bits(rounds[1][0])


def test_prefill_in_pieces_gives_the_same_bits(model: Path) -> None:
    prompts = chat_prompts()[-4:]
    whole, pieces = (
        run_engine(config_for(model, 4, max_prefill_token_num=size), make_requests(prompts, GREEDY)).rounds[0]
        for size in (4096, 100)
    )
    assert list(map(bits, whole)) == list(map(bits, pieces))


def test_preempted_sequences_come_to_the_same_bits(model: Path) -> None:
    requests = make_requests(chat_prompts()[8:] * 2, greedy(100, num_logprobs=1))
    small = config_for(model, 4, cache_max_entry_count=40, enable_prefix_caching=False)
    crowded = run_engine(small, requests)
    assert crowded.stats.preemptions_total > 0
    roomy = run_engine(config_for(model, 4, enable_prefix_caching=False), requests)
    assert list(map(bits, crowded.rounds[0])) == list(map(bits, roomy.rounds[0]))
