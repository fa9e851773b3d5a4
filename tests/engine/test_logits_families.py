"""Logits of every family equal transformers' within 1e-4 in float32, however the tokens are cut into steps."""

from pathlib import Path

import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import FAMILY_CASES, VOCAB_SIZE, FamilyCase, case_named, write_checkpoint

from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.models.decoder import Decoder

CPU = torch.device("cpu")
TOLERANCE = 1e-4
NUM_TOKENS = 75
CHUNKINGS = {"prefill": [NUM_TOKENS], "chunked": [7, 20, 1, 30], "decode": [1]}


def random_tokens(count: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def load(folder: Path) -> Decoder:
    return load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float32, device=CPU)


def both(case: FamilyCase, folder: Path, **changes: int) -> tuple[Decoder, torch.nn.Module]:
    reference = case.reference_model(**changes)
    return load(write_checkpoint(folder, case.config_json(**changes), case.tensors(reference))), reference


@torch.no_grad()
def expected_logits(reference: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return reference(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.id)
def test_logits_equal_transformers(case: FamilyCase, tmp_path: Path) -> None:
    decoder, reference = both(case, tmp_path)
    tokens = random_tokens(NUM_TOKENS)
    expected = expected_logits(reference, tokens)
    assert expected.std() > 0.5, "the reference's logits must be large enough for the tolerance to mean something"
    for name, chunk_sizes in CHUNKINGS.items():
        actual = CacheDriver(decoder).run(name, tokens, chunk_sizes)
        assert (actual - expected).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("case_id", ["internlm2", "internlm1", "internlm3"])
def test_past_the_ntk_limit_the_base_is_the_prompts(case_id: str, tmp_path: Path) -> None:
    """transformers takes the base of the longest position in the call, which for the whole prompt is the prompt's."""
    decoder, reference = both(case_named(case_id), tmp_path, max_position_embeddings=32)
    tokens = random_tokens(NUM_TOKENS)
    expected = expected_logits(reference, tokens)
    limited = expected_logits(reference, tokens[:31])  # transformers resets its base only below the limit
    assert (expected[:31] - limited).abs().max() > 0.01, "past the limit the base must matter"
    for name, chunk_sizes in CHUNKINGS.items():
        actual = CacheDriver(decoder).run(name, tokens, chunk_sizes)
        assert (actual - expected).abs().max() <= TOLERANCE, name
    assert (CacheDriver(decoder).run("short", tokens[:31], [31]) - limited).abs().max() <= TOLERANCE


def test_sequences_with_different_bases_share_a_step(tmp_path: Path) -> None:
    decoder, reference = both(case_named("internlm2"), tmp_path, max_position_embeddings=32)
    prompts = {"short": random_tokens(20), "long": random_tokens(70), "longer": random_tokens(90)}
    driver = CacheDriver(decoder)
    for name, tokens in prompts.items():
        driver.add(name, len(tokens))
    for name, actual in driver.step(prompts).items():
        assert (actual - expected_logits(reference, prompts[name])).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("case_id", ["llama3.1", "qwen3", "mistral-window", "internlm3"])
def test_folders_written_by_transformers_load(case_id: str, tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters and dtype, and splits what older versions wrote flat."""
    reference = case_named(case_id).reference_model()
    reference.save_pretrained(tmp_path)
    tokens = random_tokens(30)
    actual = CacheDriver(load(tmp_path)).run("all", tokens, [30])
    assert (actual - expected_logits(reference, tokens)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding of 16-bit activations: bounded by the type's step times the logits' size, with room for two layers."""
    decoder, reference = both(case_named("internlm2"), tmp_path)
    half = load_model(tmp_path, decoder.config, dtype=dtype, device=CPU)
    tokens = random_tokens(40)
    expected = expected_logits(reference, tokens)
    actual = CacheDriver(half).run("all", tokens, [20, 1])
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_only_the_asked_rows_have_logits(tmp_path: Path) -> None:
    decoder, _ = both(case_named("internlm2"), tmp_path)
    driver = CacheDriver(decoder)
    tokens = random_tokens(12)
    everything = driver.run("all", tokens, [12])
    for rows in ([11, 3], [], [5]):
        driver.add(str(rows), len(tokens))
        assert torch.equal(driver.step({str(rows): tokens}, logit_rows=rows)[str(rows)], everything[rows])
