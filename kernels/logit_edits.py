"""Changes to rows of logits before a token is chosen: penalties on tokens that were seen, and a grammar's bans.

Owns the form in which seen tokens are kept on the device: a row of int32 for each slot that has penalties, for every
token of the vocabulary 2 * (how often it is in the output) + (1 if it is in the prompt). Sampling itself brings the row
up to date, because the host does not know a token yet when the next step is launched.
"""

import torch
import triton
import triton.language as tl

from .launch import launch_options, release_next_kernel, wait_for_previous_kernel
from .sampling_weights import FREQUENCY, NUM_PARAMETERS, PENALTY_ROW, PRESENCE, REPETITION, parameter

IN_PROMPT = 1
IN_OUTPUT = 2  # for every time
_BLOCK = 1024
_RECORD_BLOCK = 128


@triton.jit
def _edit_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_slots,
    parameters,
    seen,
    mask_rows,
    allowed,
    logits_stride,
    vocab_size,
    num_words,
    HAS_SEEN: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = ids < vocab_size
    wait_for_previous_kernel(PDL)
    values = tl.load(logits + row * logits_stride + ids, mask=is_inside, other=0.0)
    if HAS_SEEN:
        slot = tl.load(row_slots + row).to(tl.int64)
        seen_row = parameter(parameters, slot, PENALTY_ROW).to(tl.int64)
        if seen_row >= 0:
            states = tl.load(seen + seen_row * vocab_size + ids, mask=is_inside, other=0)
            repetition = parameter(parameters, slot, REPETITION).to(tl.float32)
            repeated = tl.where(values > 0, values / repetition, values * repetition)
            values = tl.where(states > 0, repeated, values)
            counts = (states // 2).to(tl.float32)
            values -= counts * parameter(parameters, slot, FREQUENCY).to(tl.float32)
            values -= tl.where(counts > 0, parameter(parameters, slot, PRESENCE).to(tl.float32), 0.0)
    if HAS_MASKS:
        mask_row = tl.load(mask_rows + row).to(tl.int64)
        if mask_row >= 0:
            words = tl.load(allowed + mask_row * num_words + ids // 32, mask=is_inside, other=0)
            values = tl.where((words >> (ids % 32)) & 1 == 1, values, float("-inf"))
    release_next_kernel(PDL)
    tl.store(logits + row * logits_stride + ids, values, mask=is_inside)


def penalize(logits: torch.Tensor, row_slots: torch.Tensor, parameters: torch.Tensor, seen: torch.Tensor) -> None:
    """Apply each slot's penalties to its row of logits fp32 [R, vocab_size] in place, adjacent columns.

    Repetition penalty (Keskar et al., 2019: positive logits are divided, negative multiplied), then OpenAI's presence
    and frequency penalties. row_slots int32 [R]; parameters fp64 [num_slots, NUM_PARAMETERS]; seen int32
    [num_seen_rows, vocab_size]. Rows whose slot has no row of `seen` stay as they are.
    """
    if seen.shape[1] != logits.shape[1] or row_slots.shape != logits.shape[:1]:
        raise ValueError(
            f"penalize got logits {tuple(logits.shape)}, {len(row_slots)} slots and counts {tuple(seen.shape)}; "
            "there has to be one slot a row, and as many counts as logits in a row"
        )
    _edit(logits, row_slots, parameters, seen=seen)


def ban_tokens(logits: torch.Tensor, mask_rows: torch.Tensor, allowed: torch.Tensor) -> None:
    """Set logits fp32 [R, vocab_size] to -inf, in place, where a row's bit mask has a 0.

    mask_rows int32 [R] says which row of `allowed`, int32 [num_masks, ceil(vocab_size / 32)], is a row's mask, -1:
    none. Bit i of word w is token 32 * w + i.
    """
    if allowed.shape[1] != triton.cdiv(logits.shape[1], 32) or mask_rows.shape != logits.shape[:1]:
        raise ValueError(
            f"ban_tokens got logits {tuple(logits.shape)} and masks {tuple(allowed.shape)}; a mask has a bit for each "
            f"token, in {triton.cdiv(logits.shape[1], 32)} words of 32"
        )
    _edit(logits, mask_rows, None, masks=(mask_rows, allowed))


def _edit(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    parameters: torch.Tensor | None,
    *,
    seen: torch.Tensor | None = None,
    masks: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    num_rows, vocab_size = logits.shape
    mask_rows, allowed = (row_slots, row_slots) if masks is None else masks
    _edit_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
        logits,
        row_slots,
        logits if parameters is None else parameters,
        row_slots if seen is None else seen,
        mask_rows,
        allowed,
        logits.stride(0),
        vocab_size,
        triton.cdiv(vocab_size, 32),
        HAS_SEEN=seen is not None,
        HAS_MASKS=masks is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(logits.device),
    )


@triton.jit
def _record_kernel(  # type: ignore[no-untyped-def]
    token_ids,
    row_slots,
    parameters,
    seen,
    last_token_ids,
    num_rows,
    vocab_size,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    wait_for_previous_kernel(PDL)
    token_ids = tl.load(token_ids + rows, mask=is_row, other=0)
    slots = tl.load(row_slots + rows, mask=is_row, other=0).to(tl.int64)
    tl.store(last_token_ids + slots, token_ids, mask=is_row)
    seen_rows = tl.load(parameters + slots * NUM_PARAMETERS + PENALTY_ROW, mask=is_row, other=-1.0).to(tl.int64)
    tl.atomic_add(seen + seen_rows * vocab_size + token_ids, COUNT, mask=is_row & (seen_rows >= 0), sem="relaxed")
    release_next_kernel(PDL)


def record_tokens(
    token_ids: torch.Tensor,
    row_slots: torch.Tensor,
    parameters: torch.Tensor,
    seen: torch.Tensor,
    last_token_ids: torch.Tensor,
) -> None:
    """Leave each row's new token where the next step looks: last_token_ids[slot], and its count in the slot's `seen`.

    token_ids and row_slots int32 [R], last_token_ids int32 [num_slots]; the others as in `penalize`. Of several rows of
    one slot any one's token is left.
    """
    num_rows = token_ids.shape[0]
    _record_kernel[(triton.cdiv(num_rows, _RECORD_BLOCK),)](
        token_ids,
        row_slots,
        parameters,
        seen,
        last_token_ids,
        num_rows,
        seen.shape[1],
        COUNT=IN_OUTPUT,
        BLOCK=_RECORD_BLOCK,
        num_warps=4,
        **launch_options(token_ids.device),
    )
