"""A memory plan as text: for `lmdserve plan`, and for the server's log at start."""

import dataclasses
from collections.abc import Sequence

from .api import ConfigError
from .config import EngineConfig, QuantPolicy
from .memory import MemoryPlan, plan_memory
from .memory_device import MemoryDevice, find_device, find_gpu, imagined_gpu
from .memory_sizes import Part
from .model_config import ModelConfig
from .model_folder import resolve_config_folder
from .option_checks import check_options

_MIB = 2**20
_GIB = 2**30
# Lengths that a reader can compare with other engines; the session length stands beside them.
_POLICIES: tuple[QuantPolicy, ...] = (0, 8, 4)
_COMMON_LENGTHS = (2048, 4096)
_COLUMN_GAP = "   "


def plan_table(config: EngineConfig, *, gpu_bytes: int | None = None) -> str:
    """Return what would fit with these options under every KV policy; ConfigError when nothing does.

    `gpu_bytes` asks about an empty GPU of that size, wherever this runs.
    """
    model_config = ModelConfig.from_folder(resolve_config_folder(config.model, config.revision))
    check_options(config, model_config)
    device = _choose_device(config, gpu_bytes)
    plans, refusals = [], []
    for quant_policy in _POLICIES:
        try:
            plans.append(plan_memory(dataclasses.replace(config, quant_policy=quant_policy), model_config, device))
        except ConfigError as error:
            refusals.append(error)
    return describe_plans(plans, refusals, model_config)


def describe_plans(plans: Sequence[MemoryPlan], refusals: Sequence[ConfigError], model_config: ModelConfig) -> str:
    """Return the fixed parts, then a row for each plan, which differ in the KV cache alone.

    `refusals` say why a policy has no plan; with no plan at all the first one is raised.
    """
    if not plans:
        raise refusals[0]
    first = plans[0]
    weights = model_config.dtype_name if model_config.quantization is None else model_config.quantization.method
    device = first.device
    lines = [
        f"{model_config.family.name}, {model_config.num_parameters / 1e6:,.0f} million parameters, {weights} weights, "
        f"computed in {first.dtype_name}",
        f"on {device.name}: {_size(device.total_bytes)}, {_size(device.free_bytes)} free"
        + (f", at most {_size(first.limit_bytes)} to be taken" if first.limit_bytes < device.free_bytes else ""),
        *_aligned(
            [*map(_part_row, first.parts), ("left for the KV cache", _size(first.limit_bytes - first.fixed_bytes))]
        ),
        "",
        *_aligned(_kv_rows(plans)),
    ]
    return "\n".join([*lines, *(f"no plan: {refusal}" for refusal in refusals)])


def _choose_device(config: EngineConfig, gpu_bytes: int | None) -> MemoryDevice:
    if gpu_bytes is not None:
        if config.device == "cpu":
            raise ConfigError("--gpu-memory asks about a GPU and --device is cpu; leave one of them out")
        return imagined_gpu(gpu_bytes, like=find_gpu())
    gpu = find_gpu() if config.device != "cpu" else None
    if gpu is None and config.device == "cuda":
        raise ConfigError(
            "--device is cuda and no GPU is here; say how large one to plan for, such as --gpu-memory 24GiB"
        )
    return gpu or find_device("cpu")


def _part_row(part: Part) -> tuple[str, str]:
    return part.name, _size(part.num_bytes)


def _kv_rows(plans: Sequence[MemoryPlan]) -> list[tuple[str, ...]]:
    longest = max(plan.session_len for plan in plans)
    lengths = [*(length for length in _COMMON_LENGTHS if length < longest), longest]
    header = (
        "--quant-policy",
        "KV cache",
        "blocks",
        "tokens",
        *(f"sequences of {n}" for n in lengths),
        "whole process",
    )
    return [header, *(_kv_row(plan, lengths) for plan in plans)]


def _kv_row(plan: MemoryPlan, lengths: Sequence[int]) -> tuple[str, ...]:
    return (
        str(plan.quant_policy),
        _size(plan.kv_bytes),
        str(plan.num_blocks),
        str(plan.num_tokens),
        *(str(plan.num_sequences(length)) for length in lengths),
        _size(plan.peak_bytes),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + _COLUMN_GAP.join(
            [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        )
        for first, *rest in rows
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"
