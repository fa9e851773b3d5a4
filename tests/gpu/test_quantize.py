"""The quantizer on a GPU: what it finds is as good as on a CPU, and a run that goes on leaves the same bytes."""

from pathlib import Path

import pytest
import torch
from quantize_runs import DEMO, Interrupted, quantize_folder, relative_errors, weight_files

from lmdserve.engine.quantize import hidden_states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = {"calib_samples": 8, "calib_seqlen": 512, "skip_evaluation": True}


def test_rounding_loses_no_more_than_on_a_cpu(tmp_path: Path) -> None:
    """bfloat16 instead of float32, other tokens in the sample, and yet the same search."""
    on_gpu = relative_errors(quantize_folder(DEMO, tmp_path / "gpu", device="cuda", **OPTIONS))
    on_cpu = relative_errors(quantize_folder(DEMO, tmp_path / "cpu", device="cpu", **OPTIONS))
    assert on_gpu.keys() == on_cpu.keys()
    assert sum(on_gpu.values()) == pytest.approx(sum(on_cpu.values()), rel=0.03)


def test_hidden_states_in_host_memory_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = quantize_folder(DEMO, tmp_path / "device", device="cuda", **OPTIONS)
    monkeypatch.setattr(hidden_states, "LARGEST_TEXT_SHARE", 0.0)
    assert weight_files(quantize_folder(DEMO, tmp_path / "host", device="cuda", **OPTIONS)) == weight_files(on_device)


def test_a_run_that_goes_on_writes_the_same_bytes(tmp_path: Path) -> None:
    whole = quantize_folder(DEMO, tmp_path / "whole", device="cuda", **OPTIONS)
    with pytest.raises(Interrupted):
        quantize_folder(DEMO, tmp_path / "parts", device="cuda", interrupt_at_layer=3, **OPTIONS)
    parts = quantize_folder(DEMO, tmp_path / "parts", device="cuda", resume=True, **OPTIONS)
    assert weight_files(parts) == weight_files(whole)
