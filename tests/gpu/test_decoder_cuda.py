"""The decoder's plain-torch path on a GPU computes what it computes on a CPU."""

from pathlib import Path

import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import VOCAB_SIZE, case_named, write_checkpoint

from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("policy", [0, 8, 4])
@pytest.mark.parametrize("case_id", ["internlm2", "qwen2", "qwen3", "mistral-window"])
def test_gpu_logits_equal_the_cpus(
    case_id: str, policy: QuantPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 with TF32 off; a code of a quantized cache may flip by one where both sides round near a half."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case = case_named(case_id)
    write_checkpoint(tmp_path, case.config_json(), case.tensors(case.reference_model()))
    config = ModelConfig.from_folder(tmp_path)
    tokens = torch.randint(VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(7)).tolist()
    logits = {}
    for device in ("cpu", "cuda"):
        decoder = load_model(tmp_path, config, dtype=torch.float32, device=torch.device(device))
        driver = CacheDriver(decoder, quant_policy=policy, device=device)
        logits[device] = driver.run("all", tokens, [100, 7, 1]).cpu()
    tolerance = {0: 1e-4, 8: 2e-2, 4: 2e-1}[policy]
    assert (logits["cuda"] - logits["cpu"]).abs().max() <= tolerance
