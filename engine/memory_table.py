"""A memory plan as text: for `lmdserve plan`, and for the server's log at start."""

from collections.abc import Sequence

from .api import ConfigError
from .memory import MemoryPlan
from .memory_sizes import Part
from .model_config import ModelConfig

_MIB = 2**20
_GIB = 2**30
# Lengths that a reader can compare with other engines; the session length stands beside them.
_COMMON_LENGTHS = (2048, 4096)
_COLUMN_GAP = "   "


def describe_plans(plans: Sequence[MemoryPlan], refusals: Sequence[ConfigError], model_config: ModelConfig) -> str:
    """Return the fixed parts, then a row for each plan, which differ in the KV cache alone.

    `refusals` say why a policy has no plan; with no plan at all the first one is raised.
    """
    if not plans:
        raise refusals[0]
    first = plans[0]
    weights = (
        "16- or 32-bit weights" if model_config.quantization is None else f"{model_config.quantization.method} weights"
    )
    device = first.device
    lines = [
        f"{model_config.family.name}, {model_config.num_parameters / 1e9:.1f} billion parameters, {weights}, "
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
