"""The floors of the benchmark tables, against sums done by hand from the model's geometry."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lmdserve.engine.model_config import ModelConfig


@pytest.fixture
def model(load_script: Callable[[str], ModuleType], tmp_path: Path) -> ModelConfig:
    """InternLM2.5-7B with 4-bit weights in groups of 128."""
    script = load_script("random_model")
    config = script.config_json(script.SHAPES["internlm2.5-7b"], "awq")
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    return ModelConfig.from_folder(tmp_path)


def test_a_step_reads_every_weight_and_the_cache_once(
    load_script: Callable[[str], ModuleType], model: ModelConfig
) -> None:
    script = load_script("floor")
    weights = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    floor = script.Floor(model, 8, script.Device(bandwidth=1e12, flops=1e30))
    assert floor.linear_weights == weights
    assert floor.kv_bytes_per_token == 66 * 1024
    head_bytes = 92544 * 4096 * 2
    expected_s = (weights * 4.15625 / 8 + head_bytes + 1000 * 66 * 1024) / 1e12
    assert floor.decode_step_s(1, 1000) == pytest.approx(expected_s)


def test_a_long_prompt_is_bound_by_flops(load_script: Callable[[str], ModuleType], model: ModelConfig) -> None:
    script = load_script("floor")
    floor = script.Floor(model, 16, script.KNOWN_DEVICES["NVIDIA H200"])
    products = 2 * floor.linear_weights * 4096
    causal_attention = 4 * 32 * 4096 * 4096 * 4096 / 2
    assert floor.prefill_s(4096) == pytest.approx((products + causal_attention) / 790e12, rel=0.01)


def test_a_run_is_its_prompts_and_its_steps(load_script: Callable[[str], ModuleType], model: ModelConfig) -> None:
    script = load_script("floor")
    floor = script.Floor(model, 4, script.KNOWN_DEVICES["NVIDIA H200"])
    expected_s = 16 * floor.prefill_s(512) + 255 * floor.decode_step_s(16, 512 + 128)
    assert floor.batch_s(16, 512, 256) == pytest.approx(expected_s)
