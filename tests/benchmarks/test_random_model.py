"""The random checkpoints: our loader and tokenizer take them, their numbers are sane and follow from the seed."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from lmdserve.engine.config import EngineConfig
from lmdserve.engine.load_engine import load_engine
from lmdserve.engine.model_config import ModelConfig
from lmdserve.server.model import load_served_model


@pytest.fixture(scope="session")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("random_model")


@pytest.fixture(scope="session")
def awq_folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-awq")
    script.write_model(script.SHAPES["tiny"], "awq", folder)
    return folder


@pytest.mark.parametrize("weight_format", ["awq", "fp16", "bf16"])
def test_the_engine_loads_every_format(script: ModuleType, weight_format: str, tmp_path: Path) -> None:
    num_bytes = script.write_model(script.SHAPES["tiny"], weight_format, tmp_path)
    tensors = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == num_bytes
    engine = load_engine(EngineConfig(model=str(tmp_path), device="cpu", cache_max_entry_count=8.0))
    assert engine.info.vocab_size == 512


def test_words_are_single_tokens_and_all_text_survives(awq_folder: Path) -> None:
    tokenizer = load_served_model(awq_folder, name="tiny", chat_template=None).tokenizer
    assert len(tokenizer.encode(" bo di fu")) == 3
    text = "Straße 你好 badeki, 3 apples\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 512


def test_the_same_seed_gives_the_same_bits_and_another_does_not(script: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.write_model(script.SHAPES["tiny"], "awq", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_four_bit_weights_have_the_deviation_that_keeps_activations_level(script: ModuleType, awq_folder: Path) -> None:
    tensors = load_file(awq_folder / "model-00001-of-00001.safetensors")
    name = "model.layers.1.feed_forward.w2"
    nibbles = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (tensors[f"{name}.qweight"].unsqueeze(-1) >> nibbles & 15).flatten(1).float()  # columns permuted alike
    zeros = (tensors[f"{name}.qzeros"].unsqueeze(-1) >> nibbles & 15).flatten(1).float()
    scales = tensors[f"{name}.scales"].float()
    assert set(zeros.unique().tolist()) == {6.0, 7.0, 8.0, 9.0}
    weights = (codes - zeros.repeat_interleave(128, 0)) * scales.repeat_interleave(128, 0)
    assert weights.std().item() * 512**0.5 == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    [
        ("internlm2.5-1.8b", 1_889_110_016 - 49 * 2048),
        ("internlm2.5-7b", 7_737_708_544 - 65 * 4096),
        ("internlm2.5-20b", 19_861_149_696 - 97 * 6144),
        ("llama-2-7b", 6_738_415_616 - 65 * 4096),
        ("llama-2-13b", 13_015_864_320 - 81 * 5120),
    ],
)
def test_the_geometries_have_the_published_sizes(
    script: ModuleType, shape: str, num_parameters: int, tmp_path: Path
) -> None:
    """Published counts include the norms; ours leave them out."""
    script.write_json(tmp_path / "config.json", script.config_json(script.SHAPES[shape], "awq"))
    config = ModelConfig.from_folder(tmp_path)
    assert config.num_parameters == num_parameters
    plans = list(script.plan_tensors(script.SHAPES[shape], "fp16"))
    assert sum(plan.num_bytes for plan in plans if not plan.name.endswith("norm.weight")) == 2 * num_parameters
