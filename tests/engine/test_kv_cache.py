"""What the KV cache allocates; that the plan tells the truth about it is test_memory_sizes.py's business."""

import pytest
import torch
from family_checkpoints import case_named, write_checkpoint

from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.kv_cache import KVCache
from lmdserve.engine.model_config import ModelConfig

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), case_named("internlm2").config_json(), {})
    return ModelConfig.from_folder(folder)


def test_four_bits_are_half_of_eight(config: ModelConfig) -> None:
    caches = {
        policy: KVCache(
            config, num_blocks=3, block_size=16, quant_policy=policy, dtype=torch.float32, device=torch.device("cpu")
        )
        for policy in (8, 4)
    }
    assert caches[4].layer(0)[0].numel() * 2 == caches[8].layer(0)[0].numel()


@pytest.mark.parametrize("policy", [0, 8, 4])
def test_blocks_start_finite_and_a_blocks_scales_lie_beside_it(config: ModelConfig, policy: QuantPolicy) -> None:
    cache = KVCache(
        config, num_blocks=3, block_size=16, quant_policy=policy, dtype=torch.float32, device=torch.device("cpu")
    )
    for layer in range(NUM_LAYERS):
        data, scales = cache.layer(layer)
        assert data.count_nonzero() == 0
        assert (scales is None) == (policy == 0)
        if scales is not None:
            assert scales.count_nonzero() == 0
            assert scales.shape == (*data.shape[:-1], 2)
