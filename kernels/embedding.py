"""From token ids to the first residual rows: a gather from the 16-bit embedding table, widened to fp32.

A token that was sampled in the step before may not have reached the host: its id is then taken from a table by slot,
which that step has filled.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, release_next_kernel, wait_for_previous_kernel

_BLOCK = 1024  # a row of 4096 is shared by 4 programs, so that one row alone is not one program's serial work


@triton.jit
def _embed_kernel(  # type: ignore[no-untyped-def]
    table,
    token_ids,
    last_token_ids,
    slots,
    out,
    num_table_rows,
    num_columns,
    out_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous_kernel(PDL)
    token_id = tl.load(token_ids + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    sampled = tl.load(last_token_ids + slot).to(tl.int64)
    token_id = tl.where(token_id < 0, sampled, token_id)
    num_known_columns = tl.where((token_id >= 0) & (token_id < num_table_rows), num_columns, 0)
    values = tl.load(table + token_id * num_columns + columns, mask=columns < num_known_columns, other=0.0)
    release_next_kernel(PDL)
    tl.store(out + row * out_stride + columns, values.to(tl.float32), mask=columns < num_columns)


def embed(
    table: torch.Tensor, token_ids: torch.Tensor, last_token_ids: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the rows of table [vocab_size, D], contiguous, to out fp32 [M, D], whose columns are adjacent.

    token_ids int32 [M]; a negative one stands for last_token_ids[slots[row]]; slots int32 [M], last_token_ids int32
    [num_slots]. An id beyond the table gives zeros. Raises ValueError when shapes do not fit.
    """
    num_rows, num_columns = out.shape
    if table.shape[1] != num_columns or token_ids.shape != (num_rows,) or slots.shape != (num_rows,):
        raise ValueError(
            f"embed got a table {tuple(table.shape)}, {len(token_ids)} token ids, {len(slots)} slots and out "
            f"{tuple(out.shape)}; there has to be one id and one slot for each row of out, of the table's width"
        )
    if not table.is_contiguous() or out.stride(1) != 1:
        raise ValueError("embed needs a contiguous table and rows of out whose columns are adjacent")
    if num_rows == 0:
        return
    launch(
        _embed_kernel,
        (num_rows, triton.cdiv(num_columns, _BLOCK)),
        out.device,
        table,
        token_ids,
        last_token_ids,
        slots,
        out,
        table.shape[0],
        num_columns,
        out.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )
