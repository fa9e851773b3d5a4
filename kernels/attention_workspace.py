"""The memory that attention works in beside its arguments, allocated once, counted by the memory plan beforehand.

Decoding keeps the partial results of split contexts here until the last program of a row adds them up, and a counter
for each row and key-value head, which is zero between launches. Prefill keeps dequantized blocks here. One workspace
serves one stream at a time; nothing is allocated during a launch, so launches can be captured into graphs.
"""

from dataclasses import dataclass

import torch

# Programs that a decode launch aims at for each processor: as many, of two warps, as are resident at once. Long rows
# are cut until about that many have work.
_PROGRAMS_PER_PROCESSOR = 6
# What the interpreter, which has no processors, splits contexts for.
_INTERPRETED_PROCESSORS = 1
DEFAULT_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWorkspace:
    """Buffers for up to `max_rows` decode rows of one model's attention layers; built by `allocate`."""

    max_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_splits: int  # a row's context is cut so that all rows together have about this many parts for each KV head
    partial_outputs: torch.Tensor  # fp32 [max_rows + num_splits, num_heads, head_dim]
    partial_weights: torch.Tensor  # fp32 [max_rows + num_splits, num_heads], log2 of each part's softmax denominator
    counters: torch.Tensor  # int32 [max_rows, num_kv_heads], zero between launches
    scratch: torch.Tensor  # uint8, dequantized keys and values of a prefill step

    @staticmethod
    def allocate(
        *,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
        num_splits: int | None = None,
    ) -> "AttentionWorkspace":
        """Allocate on `device`; scratch_bytes may be 0 when the cache is not quantized."""
        splits = _num_splits(num_kv_heads, device) if num_splits is None else num_splits
        num_parts = max_rows + splits
        return AttentionWorkspace(
            max_rows=max_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_splits=splits,
            partial_outputs=torch.empty(num_parts, num_heads, head_dim, dtype=torch.float32, device=device),
            partial_weights=torch.empty(num_parts, num_heads, dtype=torch.float32, device=device),
            counters=torch.zeros(max_rows, num_kv_heads, dtype=torch.int32, device=device),
            scratch=torch.empty(scratch_bytes, dtype=torch.uint8, device=device),
        )


def attention_workspace_bytes(
    *,
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_processors: int,
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> int:
    """Return what `AttentionWorkspace.allocate` takes on a GPU with `num_processors` multiprocessors."""
    num_parts = max_rows + _splits_for(num_kv_heads, num_processors)
    return num_parts * num_heads * (head_dim + 1) * 4 + max_rows * num_kv_heads * 4 + scratch_bytes


def _num_splits(num_kv_heads: int, device: torch.device) -> int:
    if device.type != "cuda":
        return _splits_for(num_kv_heads, _INTERPRETED_PROCESSORS)
    return _splits_for(num_kv_heads, torch.cuda.get_device_properties(device).multi_processor_count)


def _splits_for(num_kv_heads: int, num_processors: int) -> int:
    return max(1, _PROGRAMS_PER_PROCESSOR * num_processors // num_kv_heads)
