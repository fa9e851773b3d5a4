"""Embedding rows: ids from the host, ids that only the device knows, and ids that are none."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels.embedding import _embed_kernel, embed


def _ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_columns", [63, 1024, 2500])
def test_rows_are_gathered_and_widened(dtype: torch.dtype, num_columns: int, device: torch.device) -> None:
    table = torch.randn(50, num_columns, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    last = _ints([7, 49, 0, 3], device)
    token_ids, slots = _ints([0, -1, 49, 5, -1, 5], device), _ints([0, 1, 1, 3, 3, 2], device)
    out = torch.full((6, num_columns + 5), math.nan, device=device)
    embed(table, token_ids, last, slots, out[:, :num_columns])
    assert torch.equal(out[:, :num_columns], table[[0, 49, 49, 5, 3, 5]].float())
    assert out[:, num_columns:].isnan().all()


def test_an_id_beyond_the_table_gives_zeros(device: torch.device) -> None:
    """A row without a finite logit has no token; what follows it in the pipeline must not read past the table."""
    table = torch.ones(4, 16, dtype=torch.float16, device=device)
    out = torch.full((3, 16), math.nan, device=device)
    embed(table, _ints([4, -1, 2**31 - 1], device), _ints([-5], device), _ints([0, 0, 0], device), out)
    assert not out.any()


def test_no_rows_and_wrong_shapes(device: torch.device) -> None:
    table, last = torch.ones(4, 16, dtype=torch.float16, device=device), _ints([0], device)
    embed(table, _ints([], device), last, _ints([], device), torch.empty(0, 16, device=device))
    with pytest.raises(ValueError, match="one id and one slot for each row"):
        embed(table, _ints([1], device), last, _ints([0], device), torch.empty(2, 16, device=device))


def test_it_compiles_for_every_architecture() -> None:
    signature = {
        "table": "*bf16", "token_ids": "*i32", "last_token_ids": "*i32", "slots": "*i32", "out": "*fp32",
        "num_table_rows": "i32:16", "num_columns": "i32:16", "out_stride": "i32:16",
    }  # fmt: skip
    for kernel in compile_for_all(_embed_kernel, signature, {"BLOCK": 1024}).values():
        assert_fits(kernel)
