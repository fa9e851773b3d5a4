"""Chooses the runner that fits a loaded model: the fused decoder has its own, which never waits for the device."""

from .config import EngineConfig
from .decode_chunks import MAX_ROWS_WITH_RUNS
from .kv_cache import KVCache
from .memory import MemoryPlan
from .models.decoder import Decoder
from .runner import Runner
from .speculation import max_rows_with_drafts
from .step import StepRunner
from .step_buffers import StepLimits
from .step_inputs import ALIGNMENT


def make_runner(model: object, kv_cache: KVCache, plan: MemoryPlan, config: EngineConfig) -> StepRunner:
    """Return the runner of a model that `load_model` returned, with everything allocated that its steps need."""
    if isinstance(model, Decoder):
        return Runner(model, kv_cache, block_size=config.cache_block_seq_len, device=model.device)
    from .cuda_runner import CudaRunner  # brings Triton, as the model has
    from .models.fused_decoder import FusedDecoder

    assert isinstance(model, FusedDecoder)
    sizes = plan.sizes
    limits = StepLimits(
        max_tokens=sizes.max_tokens + ALIGNMENT - 1,  # decode rows are padded where prefill tokens follow
        max_logit_rows=sizes.max_logit_rows,
        num_slots=sizes.num_slots,
        max_blocks_per_slot=sizes.max_blocks_per_slot,
    )
    max_draft_rows = max_rows_with_drafts(config.num_draft_tokens) if config.speculate != "off" else 0
    return CudaRunner(model, kv_cache, limits, max_draft_rows=max(max_draft_rows, MAX_ROWS_WITH_RUNS))
