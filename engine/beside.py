"""A second engine in a process that runs one: what it may take, and whether both fit at once.

Owns the plan of a swap, made before anything is loaded. Loading is `load_engine.py`'s business, the change of
requests from one engine to the other the server's.
"""

import dataclasses

import torch

from .api import ConfigError, EngineInfo, SwapPlan
from .config import EngineConfig
from .memory import MemoryPlan, plan_memory
from .memory_device import MemoryDevice, find_device, this_machine
from .memory_sizes import CONTEXT_BYTES
from .model_config import ModelConfig
from .model_folder import resolve_model_folder
from .option_checks import check_options

_GIB = 2**30


def plan_swap(config: EngineConfig, running: EngineInfo, *, may_load_beside: bool = True) -> SwapPlan:
    """Return how the checkpoint `config.model` takes the place of the running one.

    It is loaded beside that one where it gets the session length there that it would get alone. Raises ConfigError
    when it does not fit even alone.
    """
    model_config = ModelConfig.from_folder(resolve_model_folder(config.model, config.revision))
    check_options(config, model_config)
    uncapped = dataclasses.replace(config, max_gpu_memory=None)
    alone = plan_memory(uncapped, model_config, memory_without(running, config))
    beside = _plan_beside(uncapped, model_config, config) if may_load_beside else None
    running_bytes = sum(running.planned_bytes.values())
    if beside is not None and beside.session_len >= alone.session_len:
        how, reason, plan = "beside", "both fit into memory at once", beside
        peak_bytes = running_bytes + beside.peak_bytes - beside.context_bytes
    else:
        how, reason, plan = "drain", _why_not_beside(alone, beside, may_load_beside=may_load_beside), alone
        peak_bytes = max(running_bytes, alone.peak_bytes)
    return SwapPlan(
        how=how,  # type: ignore[arg-type]
        reason=reason,
        running_bytes=running_bytes,
        peak_bytes=peak_bytes,
        after_bytes=plan.peak_bytes,
        running_kv_tokens=running.num_kv_tokens,
        after_kv_tokens=plan.num_tokens,
        session_len=plan.session_len,
    )


def memory_left(config: EngineConfig) -> MemoryDevice:
    """Return what one more engine may take now: the context is there already, and plans count it."""
    if _is_on_cpu(config):
        return this_machine()
    device = find_device("cuda")  # gives back what torch holds without use
    free_bytes = torch.cuda.mem_get_info()[0] + CONTEXT_BYTES
    if config.max_gpu_memory is not None:
        free_bytes = min(free_bytes, config.max_gpu_memory - torch.cuda.memory_reserved())
    return device._replace(free_bytes=free_bytes)


def memory_without(running: EngineInfo, config: EngineConfig) -> MemoryDevice:
    """Return what an engine may take once the running one has given back its memory."""
    device = memory_left(config)
    if _is_on_cpu(config):
        held_bytes = sum(running.planned_bytes.get(part, 0) for part in ("weights", "KV cache"))
        return device._replace(free_bytes=device.free_bytes + held_bytes)
    return device._replace(free_bytes=device.free_bytes + torch.cuda.memory_reserved())


def spare_gpu_bytes(config: EngineConfig, running: EngineInfo) -> int | None:
    """Return what another process may take beside the running engine at its planned peak; None without a GPU."""
    if _is_on_cpu(config):
        return None
    planned_bytes = sum(running.planned_bytes.values()) - CONTEXT_BYTES  # the context is there already
    return torch.cuda.mem_get_info()[0] - max(0, planned_bytes - torch.cuda.memory_reserved())


def _plan_beside(config: EngineConfig, model_config: ModelConfig, asked: EngineConfig) -> MemoryPlan | None:
    try:
        return plan_memory(config, model_config, memory_left(asked))
    except ConfigError:
        return None


def _why_not_beside(alone: MemoryPlan, beside: MemoryPlan | None, *, may_load_beside: bool) -> str:
    if not may_load_beside:
        return "it was asked for"
    if beside is None:
        return f"{(alone.fixed_bytes - alone.context_bytes) / _GIB:.2f} GiB and a KV cache do not fit beside the rest"
    return f"beside the rest sessions would be limited to {beside.session_len} tokens, alone {alone.session_len} fit"


def _is_on_cpu(config: EngineConfig) -> bool:
    return config.device == "cpu" or not torch.cuda.is_available()
