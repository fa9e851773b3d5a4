"""Perplexity, KL divergence and agreement equal what transformers' forward passes of the same weights give."""

import math
import statistics
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import VOCAB_SIZE, case_named, write_checkpoint
from fused_driver import TorchLinearAssembly
from torch.nn import functional

from lmdserve.engine import loader
from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize import comparison, evaluation, forward_pass
from lmdserve.engine.quantize.comparison import compare
from lmdserve.engine.quantize.evaluation import evaluate
from lmdserve.engine.quantize.quality import QualityRow

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Not a multiple of the cache's blocks, and more windows than go into one pass.
WINDOWS = torch.randint(VOCAB_SIZE, (5, 100), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a pass, and logits for 7 rows at a time, which divides nothing here."""
    monkeypatch.setattr(forward_pass, "_TOKENS_AT_ONCE", {"cpu": 250, "cuda": 250})
    monkeypatch.setattr(evaluation, "_LOGIT_BYTES", 7 * 4 * VOCAB_SIZE)


def write_model(folder: Path, case_id: str, *, noise: float = 0.0, **sizes: Any) -> transformers.PreTrainedModel:
    """Write a tiny checkpoint and return transformers' model of it; noise makes another model of it."""
    case = case_named(case_id)
    model = case.reference_model(**sizes)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    write_checkpoint(folder, case.config_json(**sizes), case.tensors(model))
    return model


@torch.no_grad()
def log_probabilities(model: transformers.PreTrainedModel) -> torch.Tensor:
    """Return [num_windows, seqlen - 1, vocab] in float64, each window by itself."""
    logits = torch.cat([model(window[None]).logits for window in WINDOWS])
    return functional.log_softmax(logits[:, :-1].double(), -1)


def perplexity(said: torch.Tensor) -> float:
    chosen = said.gather(-1, WINDOWS[:, 1:, None])
    return float((-chosen.mean()).exp())


def error_over_windows(values: torch.Tensor) -> float:
    """Return the standard error of the mean, windows being what is independent."""
    means = values.flatten(1).mean(1).tolist()
    return statistics.stdev(means) / len(means) ** 0.5


@pytest.mark.parametrize("case_id", ["internlm2", "llama-tied-mlp-bias", "qwen3"])
def test_the_figures_are_those_of_transformers(case_id: str, tmp_path: Path) -> None:
    expected = log_probabilities(write_model(tmp_path / "one", case_id))
    said = log_probabilities(write_model(tmp_path / "two", case_id, noise=0.02))
    first, second = compare(tmp_path / "one", tmp_path / "two", WINDOWS, device=CPU, kv_policies=(0,))
    assert first.perplexity == pytest.approx(perplexity(expected), rel=1e-4)
    assert second.perplexity == pytest.approx(perplexity(said), rel=1e-4)
    assert second.perplexity_increase == pytest.approx(perplexity(said) / perplexity(expected) - 1, abs=1e-4)
    divergence = (expected.exp() * (expected - said)).sum(-1)
    assert second.kl_divergence == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert second.kl_divergence_error == pytest.approx(error_over_windows(divergence), rel=1e-3)
    difference = (expected - said).gather(-1, WINDOWS[:, 1:, None])
    error = math.exp(difference.mean()) * error_over_windows(difference)
    assert second.perplexity_increase_error == pytest.approx(error, rel=1e-3)
    agreed = (expected.argmax(-1) == said.argmax(-1)).double().mean()
    assert 0.1 < agreed < 0.99  # else it would show nothing
    assert second.top1_agreement == pytest.approx(float(agreed), abs=0.005)  # of 495, two may be near a tie


def test_a_model_does_not_differ_from_itself_but_by_its_cache(tmp_path: Path) -> None:
    write_model(tmp_path, "internlm2")
    rows = compare(tmp_path, tmp_path, WINDOWS, device=CPU)
    assert [row.kv_bits for row in rows] == [16, 8, 4, 16, 8, 4]
    assert rows[:3] == rows[3:]
    same, int8, int4 = rows[:3]
    assert (same.kl_divergence, same.top1_agreement, same.perplexity_increase) == (0.0, 1.0, 0.0)
    assert (same.kl_divergence_error, same.perplexity_increase_error) == (0.0, 0.0)
    assert int8.kl_divergence is not None
    assert int4.kl_divergence is not None
    assert 0 < int8.kl_divergence < int4.kl_divergence / 20  # steps 17 times as large, and errors go with their square
    assert {row.weights for row in rows} == {"16-bit"}


def test_without_a_reference_there_is_perplexity_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama2")
    rows = evaluate(tmp_path, WINDOWS, device=CPU, kv_policies=(0, 4))
    assert rows[0].perplexity == pytest.approx(perplexity(log_probabilities(model)), rel=1e-4)
    assert rows[1].perplexity != rows[0].perplexity
    assert {(row.kl_divergence, row.top1_agreement, row.perplexity_increase) for row in rows} == {(None, None, None)}


def test_the_fused_decoder_is_measured_as_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, else interpreted with products of plain torch; float16 rounds, and nothing else may differ."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    write_model(tmp_path, "llama2", num_hidden_layers=1, **sizes)
    windows = WINDOWS[:2, :30]
    plain = evaluate(tmp_path, windows, device=CPU, kv_policies=(0, 8))
    monkeypatch.setattr(loader, "choose_assembly", lambda *_: TorchLinearAssembly())
    fused = evaluate(tmp_path, windows, device=DEVICE, dtype="float16", kv_policies=(0, 8))
    assert fused[0].perplexity != fused[1].perplexity
    for row, expected in zip(fused, plain, strict=True):
        assert row.perplexity == pytest.approx(expected.perplexity, rel=5e-3)


def test_garbage_is_not_a_number(tmp_path: Path) -> None:
    """A model that answers nothing finite must not look like one without divergence."""
    write_model(tmp_path / "one", "llama2")
    case = case_named("llama2")
    tensors = case.tensors(case.reference_model())
    tensors["model.norm.weight"][0] = torch.inf
    write_checkpoint(tmp_path / "two", case.config_json(), tensors)
    row = compare(tmp_path / "one", tmp_path / "two", WINDOWS, device=CPU, kv_policies=(0,))[-1]
    assert (row.perplexity, row.perplexity_increase, row.kl_divergence) == (None, None, None)


def test_logits_exist_for_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "llama2")
    seen: list[tuple[int, ...]] = []
    real = functional.log_softmax

    def log_softmax(rows: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        return real(rows, dim)

    monkeypatch.setattr(functional, "log_softmax", log_softmax)
    compare(tmp_path, tmp_path, WINDOWS, device=CPU, kv_policies=(0,))
    assert {columns for _, columns in seen} == {VOCAB_SIZE}
    assert max(rows for rows, _ in seen) == 7


def test_the_first_model_is_gone_before_the_second_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "llama2")
    loaded: list[weakref.ref[object]] = []
    alive: list[int] = []

    def load_model(*arguments: Any, **options: Any) -> object:
        alive.append(sum(reference() is not None for reference in loaded))
        model = loader.load_model(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluation, "load_model", load_model)
    compare(tmp_path, tmp_path, WINDOWS, device=CPU, kv_policies=(0, 8))
    assert alive == [0, 0]


def test_a_reference_too_large_for_the_device_goes_through_it_in_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "one", "internlm2")
    write_model(tmp_path / "two", "internlm2", noise=0.02)
    whole = compare(tmp_path / "one", tmp_path / "two", WINDOWS, device=CPU, kv_policies=(0,))
    monkeypatch.setattr(comparison, "_is_too_large", lambda *_: True)
    shares: list[float] = []
    layered = compare(
        tmp_path / "one", tmp_path / "two", WINDOWS, device=CPU, kv_policies=(0, 8), on_progress=shares.append
    )
    assert [row.kv_bits for row in layered] == [16, 16, 8]
    for row, expected in zip(layered, whole, strict=False):
        assert row.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert row.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3, abs=1e-7)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_progress_rises_to_one(tmp_path: Path) -> None:
    write_model(tmp_path, "llama2")
    shares: list[float] = []
    compare(tmp_path, tmp_path, WINDOWS, device=CPU, kv_policies=(0, 4), on_progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 4 * 3  # four measurements of three passes
    assert shares[-1] == pytest.approx(1.0)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "one", "llama2")
    write_model(tmp_path / "two", "llama2", vocab_size=VOCAB_SIZE + 1)

    def run(windows: torch.Tensor) -> list[QualityRow]:
        return compare(tmp_path / "one", tmp_path / "two", windows, device=CPU, kv_policies=(0,))

    with pytest.raises(ConfigError, match=r"132 tokens .* 131; only models of one vocabulary"):
        run(WINDOWS)
    with pytest.raises(ConfigError, match="windows have 300 tokens and the model's context 256"):
        run(WINDOWS.repeat(1, 3))
    with pytest.raises(ConfigError, match="token 131 and the model's vocabulary ends at 130"):
        run(WINDOWS + 1)
