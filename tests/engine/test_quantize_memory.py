"""What is said beforehand of a run's GPU memory covers what runs took on an H200, and not much more."""

import json
from pathlib import Path

import pytest
from family_checkpoints import case_named

from lmdserve.engine.memory_sizes import CONTEXT_BYTES
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.quantize.memory import needed_gpu_bytes

GIB = 2**30
SIZES_7B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 92544,
}  # fmt: skip
SIZES_20B = SIZES_7B | {
    "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 48, "num_attention_heads": 48,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "has_evaluation", "measured_gib"),
    [(SIZES_7B, True, 9.85), (SIZES_7B, False, 5.21), (SIZES_7B, False, 6.1), (SIZES_20B, False, 10.4)],
)
def test_the_estimate_covers_what_was_measured(
    sizes: dict[str, int], has_evaluation: bool, measured_gib: float, tmp_path: Path
) -> None:
    """What torch held at most, in runs that were free to take more (or, the second, that had just the estimate)."""
    (tmp_path / "config.json").write_text(json.dumps(case_named("internlm2").config_json(**sizes)))
    config = ModelConfig.from_folder(tmp_path)
    needed = (needed_gpu_bytes(config, has_evaluation=has_evaluation) - CONTEXT_BYTES) / GIB
    assert measured_gib <= needed < 1.3 * measured_gib
