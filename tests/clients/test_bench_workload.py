"""What a benchmark sends follows from its seed, and has the lengths that were asked for."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmdserve.clients.bench_workload import BenchOptions, Calibration, plan_level, read_dataset
from lmdserve.clients.settings import SettingError

CALIBRATION = Calibration(overhead_tokens=10.0, tokens_per_word=1.5)


def options(**changes: Any) -> BenchOptions:
    return BenchOptions(**({"model": "demo", "num_prompts": 200, "input_len": 100, "output_len": 40} | changes))


def text_of(payload: dict[str, Any]) -> str:
    return str(payload["messages"][0]["content"])


def test_calibration_is_the_line_through_two_counts() -> None:
    calibration = Calibration.from_counts((32, 58), (160, 250))
    assert calibration == CALIBRATION
    assert calibration.num_words(100) == 60
    assert calibration.num_words(5) == 1


def test_a_server_whose_counts_do_not_grow_cannot_be_calibrated() -> None:
    with pytest.raises(SettingError, match="--dataset"):
        Calibration.from_counts((32, 58), (160, 58))


def test_the_same_seed_plans_the_same_and_another_seed_or_level_does_not() -> None:
    wanted = options(disconnect_share=0.5, request_rate=3.0, range_ratio=0.5)
    plan = plan_level(wanted, 0, CALIBRATION)
    assert plan_level(wanted, 0, CALIBRATION) == plan
    others = plan_level(wanted, 1, CALIBRATION), plan_level(options(seed=1), 0, CALIBRATION)
    prompts = [{text_of(request.payload) for request in one} for one in (plan, *others)]
    assert len(set.union(*prompts)) == 600


def test_prompts_have_the_wanted_length_and_answers_the_limit() -> None:
    for request in plan_level(options(), 0, CALIBRATION):
        assert len(text_of(request.payload).split()) == 60
        assert request.payload["max_tokens"] == 40
        assert (request.arrival_s, request.leave_after_chunks) == (0.0, None)


def test_a_range_ratio_varies_lengths_within_it_and_around_the_middle() -> None:
    plan = plan_level(options(range_ratio=0.5), 0, CALIBRATION)
    words = [len(text_of(request.payload).split()) for request in plan]
    limits = [request.payload["max_tokens"] for request in plan]
    assert 27 <= min(words) < 35 < 80 < max(words) <= 93
    assert 20 <= min(limits) < 25 < 55 < max(limits) <= 60
    assert sum(limits) / len(limits) == pytest.approx(40, abs=3)


def test_arrivals_come_at_the_wanted_rate_and_not_like_a_clock() -> None:
    arrivals = [
        request.arrival_s for request in plan_level(options(num_prompts=2000, request_rate=5.0), 0, CALIBRATION)
    ]
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.1)
    # Of a Poisson process, the standard deviation of the gaps equals their mean.
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.15)


def test_the_wanted_share_of_clients_leaves_within_the_answer() -> None:
    plan = plan_level(options(num_prompts=1000, disconnect_share=0.2), 0, CALIBRATION)
    leaving = [request.leave_after_chunks for request in plan if request.leave_after_chunks is not None]
    assert 150 < len(leaving) < 250
    assert (min(leaving), max(leaving)) == (1, 20)


def test_a_payload_has_only_what_was_asked_for() -> None:
    [request] = plan_level(options(num_prompts=1), 0, CALIBRATION)
    assert set(request.payload) == {"model", "max_tokens", "temperature", "stream_options", "messages"}
    [request] = plan_level(options(num_prompts=1, ignore_eos=True, endpoint="completions"), 0, CALIBRATION)
    assert request.payload["ignore_eos"] is True
    assert len(request.payload["prompt"].split()) == 60
    assert "messages" not in request.payload


def test_a_dataset_is_read_in_order_and_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "你好"}]
    path.write_text(f'{{"prompt": "one", "max_tokens": 7}}\n\n{json.dumps({"messages": messages})}\n')
    plan = plan_level(options(num_prompts=3, dataset_path=path), 0, None)
    assert [request.payload["messages"] for request in plan] == [
        [{"role": "user", "content": "one"}],
        messages,
        [{"role": "user", "content": "one"}],
    ]
    assert [request.payload["max_tokens"] for request in plan] == [7, 40, 7]


@pytest.mark.parametrize(
    ("content", "endpoint", "expected"),
    [
        ("", "chat", "holds no prompts"),
        ("\n\n", "chat", "holds no prompts"),
        ('{"prompt": "x"}\n{', "chat", "line 2 is not valid JSON"),
        ("[]", "chat", "line 1 is not a JSON object"),
        ("{}", "chat", "line 1 has no `messages` or `prompt`"),
        ('{"prompt": ""}', "chat", "line 1 has no `messages` or `prompt`"),
        ('{"messages": [{}]}', "completions", "line 1 has no `prompt`"),
        ('{"prompt": "x", "max_tokens": 0}', "chat", "max_tokens is 0"),
        ('{"prompt": "x", "max_tokens": true}', "chat", "max_tokens is True"),
    ],
)
def test_a_wrong_dataset_is_explained(content: str, endpoint: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(SettingError) as caught:
        read_dataset(path, options(endpoint=endpoint))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot read .*none\.jsonl"):
        read_dataset(tmp_path / "none.jsonl", options())
