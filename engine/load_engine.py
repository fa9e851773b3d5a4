"""An engine from its options: every "auto" decided, the model loaded, the KV cache allocated, the parts put together.

Owns the order of this, and the one log line that tells what was decided. What each part is lies in its own file.
"""

import dataclasses
import logging
import os
from pathlib import Path

import torch

from .api import ConfigError, EngineInfo
from .assembly import can_fuse
from .blocks import BlockPool
from .config import EngineConfig
from .kv_cache import KVCache
from .loader import load_model
from .loop import AsyncEngine
from .make_runner import make_runner
from .memory import MemoryPlan, plan_memory
from .memory_device import MemoryDevice, find_device
from .memory_guard import held_to_plan
from .memory_table import describe_plans
from .model_config import ModelConfig
from .model_folder import resolve_model_folder
from .option_checks import check_options, format_name
from .scheduler import Scheduler
from .speculation import NgramProposer
from .step import StepRunner

logger = logging.getLogger(__name__)

# Longer than any healthy step: the first one on a GPU may compile kernels, a CPU may prefill for a 20B model.
STEP_LIMIT_S = {"cuda": 180.0, "cpu": 600.0}


def load_engine(config: EngineConfig, *, memory: MemoryDevice | None = None) -> AsyncEngine:
    """Decide every "auto", load the model, plan and allocate the KV cache. Blocks; raises ConfigError.

    `memory` is what may be taken, where this process has loaded an engine before (`beside.py`): --max-gpu-memory is
    then held to already.
    """
    folder = resolve_model_folder(config.model, config.revision)
    model_config = ModelConfig.from_folder(folder)
    check_options(config, model_config)
    device = _resolve_device(config)
    if device.type == "cpu":
        _leave_a_core_to_the_event_loop()
    if memory is not None:
        config = dataclasses.replace(config, max_gpu_memory=None)
    plan = plan_memory(config, model_config, memory or find_device("cuda" if device.type == "cuda" else "cpu"))
    dtype: torch.dtype = getattr(torch, plan.dtype_name)
    # Rows are independent in float32 on a CPU (linear.py), and where the fused decoder is asked to make them so.
    can_be_deterministic = can_fuse(model_config, dtype, device) or (device.type == "cpu" and dtype is torch.float32)
    _check_deterministic(config, can_be_deterministic)
    with held_to_plan(plan, device, is_limited=config.max_gpu_memory is not None):
        runner = _load_runner(folder, model_config, plan, config, dtype, device)
    _log_decisions(folder, model_config, plan, config, device)
    pool = BlockPool(num_blocks=plan.num_blocks, block_size=config.cache_block_seq_len)
    scheduler = Scheduler(
        pool,
        max_batch_size=plan.max_batch_size,
        max_prefill_tokens=plan.max_prefill_tokens,
        max_decode_rows=plan.sizes.max_logit_rows,
        enable_prefix_caching=config.enable_prefix_caching,
        proposer=NgramProposer(config.num_draft_tokens) if config.speculate == "ngram" else None,
    )
    return AsyncEngine(
        runner,
        scheduler,
        pool,
        info=_engine_info(model_config, plan, config),
        rope_base_for=model_config.rope_base,
        max_live_requests=plan.max_batch_size + config.max_queue_size,
        step_limit_s=STEP_LIMIT_S[device.type],
        can_be_deterministic=can_be_deterministic,
        is_always_deterministic=config.deterministic,
    )


def _load_runner(
    folder: Path,
    model_config: ModelConfig,
    plan: MemoryPlan,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> StepRunner:
    model = load_model(folder, model_config, dtype=dtype, device=device, lm_head_bits=config.lm_head_bits)
    kv_cache = KVCache(
        model_config,
        num_blocks=plan.num_blocks + 1,  # and the pad block
        block_size=config.cache_block_seq_len,
        quant_policy=config.quant_policy,
        dtype=dtype,
        device=device,
    )
    return make_runner(model, kv_cache, plan, config)


def _log_decisions(
    folder: Path, model_config: ModelConfig, plan: MemoryPlan, config: EngineConfig, device: torch.device
) -> None:
    logger.info(
        "model %s: device %s, dtype %s, weights %s, session length %d, KV cache of %d blocks of %d tokens "
        "(quant policy %d, %.0f MiB), prefix cache %s; memory plan:\n%s",
        folder,
        device,
        plan.dtype_name,
        format_name(model_config),
        plan.session_len,
        plan.num_blocks,
        config.cache_block_seq_len,
        config.quant_policy,
        plan.kv_bytes / 2**20,
        "on" if config.enable_prefix_caching else "off",
        describe_plans([plan], [], model_config),
    )


def _engine_info(model_config: ModelConfig, plan: MemoryPlan, config: EngineConfig) -> EngineInfo:
    return EngineInfo(
        vocab_size=model_config.vocab_size,
        session_len=plan.session_len,
        eos_token_ids=frozenset(t for t in model_config.eos_token_ids if 0 <= t < model_config.vocab_size),
        planned_bytes={part.name: part.num_bytes for part in plan.parts} | {"KV cache": plan.kv_bytes},
        num_kv_tokens=plan.num_tokens,
        kv_bits=config.quant_policy or 16,
        weight_format=format_name(model_config),
    )


def _check_deterministic(config: EngineConfig, is_possible: bool) -> None:
    if config.deterministic and not is_possible:
        raise ConfigError(
            "--deterministic is not possible with this compute type on this device; use --dtype float32 on a CPU, "
            "or 16 bits on a GPU of compute capability 8.0 or more"
        )


def _resolve_device(config: EngineConfig) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("--device is cuda and torch finds no CUDA device; use --device cpu, or install CUDA's torch")
    is_gpu_wanted = config.device == "cuda" or (config.device == "auto" and has_gpu)
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu_wanted else torch.device("cpu")


def _leave_a_core_to_the_event_loop() -> None:
    """Compute on all physical cores but, where there are no more logical ones, the event loop's.

    On a machine of two cores the demo model's engine made 118 tokens/s alone and 775 in a batch of 32 with one thread,
    70 and 612 with two.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)))
