"""An engine from its options: every "auto" decided, and options that cannot be honoured refused."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdserve.engine.api import ConfigError
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.load_engine import load_engine


def _config(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(**({"model": str(folder), "device": "cpu", "cache_max_entry_count": 40.0} | changes))


def test_loading_resolves_everything_and_logs_it_once(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lmdserve.engine.load_engine"):
        engine = load_engine(_config(tiny_checkpoint, device="auto", quant_policy=8))
    (record,) = [record for record in caplog.records if record.name == "lmdserve.engine.load_engine"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for part in (f"device {device}", "dtype float32", "weights hf", "session length 512", "40 blocks of 64 tokens"):
        assert part in record.getMessage()
    assert (engine.info.vocab_size, engine.info.session_len, engine.info.eos_token_ids) == (199, 512, frozenset({2}))
    assert engine.stats().num_total_blocks == 40


def test_without_a_session_length_the_context_shrinks_to_the_blocks(tiny_checkpoint: Path) -> None:
    assert load_engine(_config(tiny_checkpoint, cache_max_entry_count=3.0)).info.session_len == 192


def test_dynamic_rope_allows_sessions_beyond_the_context(tiny_checkpoint: Path) -> None:
    assert load_engine(_config(tiny_checkpoint, session_len=2048)).info.session_len == 2048


def test_fixed_rope_does_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = (tiny_checkpoint / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'"rope_scaling": {[^}]*}', '"rope_scaling": null', text))
    with pytest.raises(ConfigError, match=r"--session-len 513 is longer than the model's context, 512 tokens"):
        load_engine(_config(tmp_path, session_len=513))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 2}, "--tp 2 is not supported"),
        ({"max_batch_size": 0}, "--max-batch-size is 0; give 1 or more"),
        ({"cache_max_entry_count": 0.0}, "--cache-max-entry-count is 0.0; give 0.001 or more"),
        ({"cache_max_entry_count": 1.5}, "--cache-max-entry-count is 1.5; give a share"),
        ({"cache_max_entry_count": float("nan")}, "--cache-max-entry-count is nan; give a share"),
        ({"model_format": "awq"}, "--model-format is awq and the checkpoint's format is hf"),
        ({"session_len": 512, "cache_max_entry_count": 7.0}, "needs 8 KV blocks .* and there are 7"),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured_are_refused(
    tiny_checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(_config(tiny_checkpoint, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_asked_for_and_absent_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        load_engine(_config(tiny_checkpoint, device="cuda"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_compute_type_asked_for_is_used(tiny_checkpoint: Path, dtype: str) -> None:
    engine = load_engine(_config(tiny_checkpoint, dtype=dtype))
    assert str(engine._stepper._runner._kv_cache.dtype) == f"torch.{dtype}"
