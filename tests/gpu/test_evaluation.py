"""Evaluation on a GPU, through the fused decoder: the figures are the CPU's, but for 16-bit rounding."""

import math
from pathlib import Path

import pytest
import torch

import lmdserve
from lmdserve.engine.quantize.comparison import compare
from lmdserve.engine.quantize.evaluation import KV_POLICIES, LoadedModel, evaluate
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.engine.quantize.quality import QualityRow
from lmdserve.engine.quantize.run import TextSide, quantize
from lmdserve.engine.quantize.text import evaluation_windows, read_text
from lmdserve.server.calibration_text import load_encoders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEMO = Path(lmdserve.__file__).parent / "demo" / "model"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    encoders = load_encoders(DEMO)
    source = read_text(
        "builtin", data_dir=None, split="evaluation", encode=encoders.encode, encode_chat=encoders.encode_chat
    )
    return evaluation_windows(source, seqlen=500, max_tokens=3000)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model rounded to 4 bits, which needs no calibration."""
    options = QuantizeOptions(
        work_dir=str(tmp_path_factory.mktemp("quantized") / "demo-4bit"), calib_samples=0, skip_evaluation=True
    )
    return quantize(DEMO, options, TextSide(*load_encoders(DEMO)), lambda progress: None)


def assert_close(row: QualityRow, expected: QualityRow) -> None:
    """bfloat16 leaves 8 bits of each value between kernels; what it changes is far below what 4 bits do."""
    assert (row.weights, row.kv_bits) == (expected.weights, expected.kv_bits)
    assert None not in (row.perplexity, expected.perplexity)
    assert math.isclose(row.perplexity or 0, expected.perplexity or 0, rel_tol=0.02)
    assert math.isclose(row.kl_divergence or 0, expected.kl_divergence or 0, rel_tol=0.15, abs_tol=2e-3)
    assert math.isclose(row.top1_agreement or 0, expected.top1_agreement or 0, abs_tol=0.03)


def test_the_figures_are_the_cpus(windows: torch.Tensor, four_bit: Path) -> None:
    on_gpu = compare(DEMO, four_bit, windows, device=CUDA)
    on_cpu = compare(DEMO, four_bit, windows, device=CPU)
    for row, expected in zip(on_gpu, on_cpu, strict=True):
        assert_close(row, expected)


def test_a_model_does_not_differ_from_itself(windows: torch.Tensor) -> None:
    rows = compare(DEMO, DEMO, windows, device=CUDA)
    for first, second in zip(rows[:3], rows[3:], strict=True):
        assert second.kl_divergence == pytest.approx(first.kl_divergence, abs=1e-6)
    assert rows[3].kl_divergence == pytest.approx(0.0, abs=1e-6)
    assert rows[3].top1_agreement == pytest.approx(1.0, abs=1e-3)


def test_the_plain_decoder_is_measured_in_float32(windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    on_gpu = evaluate(DEMO, windows, device=CUDA, dtype="float32", kv_policies=(0,))
    on_cpu = evaluate(DEMO, windows, device=CPU, dtype="float32", kv_policies=(0,))
    assert on_gpu[0].perplexity == pytest.approx(on_cpu[0].perplexity, rel=1e-4)


def test_memory_is_the_models_and_a_few_chunks_of_logits(windows: torch.Tensor) -> None:
    """A [tokens, vocabulary] matrix of a large vocabulary would not fit; the workspaces here have fixed sizes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = LoadedModel(DEMO, device=CUDA)
    reference, _ = model.reference(windows)
    for policy in KV_POLICIES:
        model.measure(windows, policy, reference)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30
    del model, reference
    assert torch.cuda.memory_allocated() - before < 64 * 2**20
