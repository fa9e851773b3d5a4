"""The workspace takes what the memory plan was told."""

import pytest
import torch

from lmdserve.kernels.attention_workspace import (
    _INTERPRETED_PROCESSORS,
    AttentionWorkspace,
    attention_workspace_bytes,
)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (4, 4, 64), (6, 2, 64)])
def test_its_size_is_the_planned_one(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    workspace = AttentionWorkspace.allocate(max_rows=9, device=torch.device("cpu"), scratch_bytes=1000, **shape)
    buffers = (workspace.partial_outputs, workspace.partial_weights, workspace.counters, workspace.scratch)
    planned = attention_workspace_bytes(max_rows=9, num_processors=_INTERPRETED_PROCESSORS, scratch_bytes=1000, **shape)
    assert sum(buffer.nbytes for buffer in buffers) == planned
    assert not workspace.counters.any()
