"""What the KV cache allocates, and that bytes_per_block tells the truth about it."""

import pytest
import torch
from family_checkpoints import HEAD_DIM, NUM_KV_HEADS, case_named, write_checkpoint

from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.kv_cache import KVCache
from lmdserve.engine.model_config import ModelConfig

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), case_named("internlm2").config_json(), {})
    return ModelConfig.from_folder(folder)


def allocated_bytes(cache: KVCache) -> int:
    tensors = [tensor for layer in range(NUM_LAYERS) for tensor in cache.layer(layer) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("policy", [0, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_per_block_is_what_is_allocated(config: ModelConfig, policy: QuantPolicy, dtype: torch.dtype) -> None:
    cache = KVCache(config, num_blocks=7, block_size=16, quant_policy=policy, dtype=dtype, device=torch.device("cpu"))
    per_block = KVCache.bytes_per_block(config, block_size=16, quant_policy=policy, dtype=dtype)
    assert allocated_bytes(cache) == 7 * per_block


def test_four_bits_are_half_of_eight(config: ModelConfig) -> None:
    rows = NUM_LAYERS * 2 * NUM_KV_HEADS * 16
    sizes = {
        policy: KVCache.bytes_per_block(config, block_size=16, quant_policy=policy, dtype=torch.float32)
        for policy in (0, 8, 4)
    }
    assert sizes == {0: rows * HEAD_DIM * 4, 8: rows * (HEAD_DIM + 4), 4: rows * (HEAD_DIM // 2 + 4)}
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
