"""The whole engine on a CUDA device gives what it gives on a CPU: tokens of the demo model, any type, any KV width.

16-bit rounding turns near ties. The demo model is sure of most tokens: on a CPU the answers in bfloat16 and float16 are
those of float32 for 88 % of their length and more, and the first token's logprob is within 0.015.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_runs import (
    DEMO,
    Answer,
    benchmark_script,
    chat_prompts,
    common_prefix_share,
    greedy,
    make_requests,
    run_engine,
)

from lmdserve.engine import speculation
from lmdserve.engine.api import SamplingParams
from lmdserve.engine.config import Device, Dtype, EngineConfig, QuantPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 48
LOGPROB_TOLERANCE = {"bfloat16": 0.06, "float16": 0.02}
SAMPLED = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    top_k=40,
    min_p=0.02,
    seed=11,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias={60: 1.5, 61: -100.0},
    max_tokens=NUM_TOKENS,
    min_tokens=4,
    ignore_eos=True,
)


def config_for(model: str | Path, device: Device, quant_policy: QuantPolicy, dtype: Dtype) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        device=device,
        dtype=dtype,
        quant_policy=quant_policy,
        cache_max_entry_count=512,
        session_len=1024,
        max_batch_size=64,
    )


@cache
def answers(model: Path, device: Device, quant_policy: QuantPolicy, dtype: Dtype) -> list[Answer]:
    """Return the greedy answers to the chat prompts, all generated at once."""
    requests = make_requests(chat_prompts(), greedy(NUM_TOKENS, num_logprobs=2))
    return run_engine(config_for(model, device, quant_policy, dtype), requests).rounds[0]


@pytest.fixture(scope="module")
def awq_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with 4-bit weights."""
    folder = tmp_path_factory.mktemp("awq") / "demo-awq"
    benchmark_script("demo_quality").write_awq(DEMO, folder)
    return folder


def first_token_gap(ours: list[Answer], expected: list[Answer]) -> float:
    """Return the largest difference of the first tokens' logprobs."""
    return max(abs(a.logprobs[0].logprob - b.logprobs[0].logprob) for a, b in zip(ours, expected, strict=True))


def assert_like_the_cpus(ours: list[Answer], expected: list[Answer], dtype: Dtype) -> None:
    assert [len(answer.token_ids) for answer in ours] == [NUM_TOKENS] * len(expected)
    assert [answer.token_ids[0] for answer in ours] == [answer.token_ids[0] for answer in expected]
    assert first_token_gap(ours, expected) <= LOGPROB_TOLERANCE[dtype]
    assert common_prefix_share(ours, expected) >= 0.75


@pytest.mark.parametrize("quant_policy", [0, 8, 4])
def test_float32_answers_are_the_cpus(quant_policy: QuantPolicy) -> None:
    """Nearly always on a quantized cache, where a sum's last bit can move a value by one of 255 or 15 steps."""
    ours, expected = answers(DEMO, "cuda", quant_policy, "float32"), answers(DEMO, "cpu", quant_policy, "float32")
    assert common_prefix_share(ours, expected) >= (1.0 if quant_policy == 0 else 0.8)


@pytest.mark.parametrize(
    ("quant_policy", "dtype"), [(0, "bfloat16"), (0, "float16"), (8, "float16"), (4, "bfloat16"), (4, "float16")]
)
def test_sixteen_bit_answers_are_mostly_the_cpus(quant_policy: QuantPolicy, dtype: Dtype) -> None:
    ours, expected = answers(DEMO, "cuda", quant_policy, dtype), answers(DEMO, "cpu", quant_policy, "float32")
    assert_like_the_cpus(ours, expected, dtype)


@pytest.mark.parametrize(("quant_policy", "dtype"), [(0, "float16"), (4, "float16"), (4, "bfloat16")])
def test_four_bit_weights_answer_mostly_as_on_the_cpu(quant_policy: QuantPolicy, dtype: Dtype, awq_model: Path) -> None:
    ours, expected = answers(awq_model, "cuda", quant_policy, dtype), answers(awq_model, "cpu", quant_policy, "float32")
    assert_like_the_cpus(ours, expected, dtype)


def test_sampled_answers_are_mostly_the_cpus() -> None:
    """Draws follow from seed and place alone, so equal logits give equal tokens, with all edits of the logits on."""
    requests = make_requests(chat_prompts(), SAMPLED)
    ours, expected = (
        run_engine(config_for(DEMO, device, 0, dtype), requests).rounds[0]
        for device, dtype in (("cuda", "float16"), ("cpu", "float32"))
    )
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(ours, expected, strict=True)) >= len(expected) - 1
    assert common_prefix_share(ours, expected) >= 0.5


def test_graphs_compute_what_launches_one_by_one_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdserve.engine.graphs import DecodeGraphs

    replayed = answers(DEMO, "cuda", 4, "float16")
    no_graph: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(DecodeGraphs, "padded_rows", no_graph)
    requests = make_requests(chat_prompts(), greedy(NUM_TOKENS, num_logprobs=2))
    launched = run_engine(config_for(DEMO, "cuda", 4, "float16"), requests).rounds[0]
    assert_like_the_cpus(launched, replayed, "float16")


def test_many_requests_come_and_go_in_a_small_pool() -> None:
    """Sequences are preempted and computed again; slots and blocks change hands; each answer stays its own."""
    config = EngineConfig(
        model=str(DEMO),
        device="cuda",
        dtype="float16",
        cache_max_entry_count=40,
        session_len=1024,
        max_batch_size=64,
        enable_prefix_caching=False,
    )
    crowded = run_engine(config, make_requests(chat_prompts()[8:] * 4, greedy(100)))
    assert crowded.stats.preemptions_total > 0
    expected = answers(DEMO, "cpu", 0, "float32")[8:] * 4
    begun = [Answer(answer.token_ids[:NUM_TOKENS]) for answer in crowded.rounds[0]]
    assert common_prefix_share(begun, expected) >= 0.75


def test_six_sequences_at_once_answer_as_many_do() -> None:
    """They end one by one, so five or six decode rows, padded to eight, stand beside the next one's prompt."""
    requests = [
        replace(request, sampling=greedy(12 + 5 * index))
        for index, request in enumerate(make_requests(chat_prompts(), greedy(1)))
    ]
    ours = run_engine(replace(config_for(DEMO, "cuda", 4, "float16"), max_batch_size=6), requests).rounds[0]
    assert [len(answer.token_ids) for answer in ours] == [request.sampling.max_tokens for request in requests]
    expected = [a.token_ids[: len(b.token_ids)] for a, b in zip(answers(DEMO, "cuda", 4, "float16"), ours, strict=True)]
    begun = [Answer(answer.token_ids[:NUM_TOKENS]) for answer in ours]
    assert common_prefix_share(begun, list(map(Answer, expected))) >= 0.75


def test_guessed_tokens_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are made wherever there is one, right or wrong, for as many sequences as guessing is ever on for."""
    monkeypatch.setattr(speculation, "MIN_ACCEPTED", 0.0)
    monkeypatch.setattr(speculation, "MARGIN", 0.0)
    config = replace(config_for(DEMO, "cuda", 4, "float16"), speculate="ngram")
    requests = make_requests(chat_prompts()[-8:], greedy(NUM_TOKENS, num_logprobs=2))
    guessed = run_engine(config, requests)
    assert guessed.stats.drafted_tokens_total > 0
    assert_like_the_cpus(guessed.rounds[0], answers(DEMO, "cuda", 4, "float16")[-8:], "float16")
