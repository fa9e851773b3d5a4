"""From rows of logits to tokens without the host: the sampler of steps that are launched before their tokens are known.

Owns what the device knows of each slot's sampling: parameters, the hash of its seed, and for slots with penalties which
tokens were seen. `sampler.py` is the reference: the same logits, seeds and positions give the same tokens. Nothing here
waits for the device, and a step of plain requests costs no work by row on the host.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lmdserve.kernels.logit_edits import IN_OUTPUT, IN_PROMPT, ban_tokens, penalize, record_tokens
from lmdserve.kernels.sampling import draw_tokens, find_best
from lmdserve.kernels.sampling_thresholds import limit_tokens
from lmdserve.kernels.sampling_weights import NUM_PARAMETERS, SEED_HASH, sampling_scratch

from .memory_sizes import MOST_COPIED_LOGIT_ROWS
from .sampler import seed_hash
from .sequence import Sequence, has_penalties
from .step import Chunk

_NO_PENALTY_ROW = -1


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some rows of a step may take: for rows[i] the bits of allowed[i], int32 [num_rows, vocab / 32]."""

    rows: SequenceOf[int]
    allowed: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Edits:
    """What a slot changes about its logits, beside penalties."""

    bias: tuple[torch.Tensor, torch.Tensor] | None  # token ids int64, values fp32
    stop_token_ids: torch.Tensor | None  # int64, banned as long as min_tokens says


_NO_EDITS = _Edits(bias=None, stop_token_ids=None)


class _EditedRow(NamedTuple):
    row: int
    bias: tuple[torch.Tensor, torch.Tensor] | None
    has_penalties: bool
    banned: torch.Tensor | None


class DeviceSampler:
    """Samples on one device; all calls are enqueued on the current stream, in the order of the steps.

    Memory on the device, all allocated at once: about 64 KiB a slot, what each slot has seen (4 bytes * vocab_size),
    and room for MOST_COPIED_LOGIT_ROWS rows of edited logits.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._parameters = torch.zeros((num_slots, NUM_PARAMETERS.value), dtype=torch.float64, device=device)
        self._parameters[:, -1] = _NO_PENALTY_ROW
        self._scratch = sampling_scratch(num_slots, vocab_size, device)
        self._seen = torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device)  # kernels/logit_edits.py
        num_copied_rows = min(num_slots, MOST_COPIED_LOGIT_ROWS)
        self._edited_logits = torch.empty((num_copied_rows, vocab_size), dtype=torch.float32, device=device)
        # What is known of slots on the host; a slot stays here until its next sequence is admitted.
        self._penalized: set[int] = set()
        self._edits: dict[int, _Edits] = {}
        self._drawing: set[int] = set()
        self._limited: set[int] = set()

    def admit(self, sequence: Sequence) -> None:
        """Take over `sequence.slot` for this sequence, with the tokens it has now.

        Call it before the first step of a sequence, and again when it comes back from preemption, once no step with
        it is in flight.
        """
        slot, sampling = sequence.slot, sequence.sampling
        _set_member(self._drawing, slot, sampling.temperature > 0.0)
        _set_member(self._limited, slot, sampling.temperature > 0.0 and (sampling.top_k > 0 or sampling.top_p < 1.0))
        self._admit_edits(sequence)
        penalty_row = self._admit_penalties(sequence)
        row = torch.tensor(
            [
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                min(sampling.top_k, self._vocab_size),
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                0.0,
                penalty_row,
            ],
            dtype=torch.float64,
        )
        hashed = seed_hash(sequence.seed)
        row.view(torch.int64)[SEED_HASH.value] = hashed - 2**64 if hashed >= 2**63 else hashed
        self._parameters[slot].copy_(self._pinned(row), non_blocking=True)

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        row_slots: torch.Tensor,
        output_positions: torch.Tensor,
        chunks: SequenceOf[Chunk] | None,
        *,
        masks: TokenMasks | None = None,
        last_token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return int32 [2, R]: each row's token, and 1 where there was one to choose (a finite best logit), else 0.

        logits fp32 [R, vocab_size] stay as they are. row_slots and output_positions int32 [R]: whose token a row gives,
        and which of its output, counted from 0. chunks: the step's, whose sampled rows are the R rows in order, so that
        launches are spared and rows are edited (logit_bias, penalties, min_tokens); None: all launches, no edits, which
        is what a CUDA graph captures, after one call outside with as many rows. last_token_ids int32 [num_slots]
        receives each slot's token. Rows of one slot must not have penalties.
        """
        num_rows = logits.shape[0]
        if num_rows == 0:
            return row_slots.new_zeros((2, 0))
        if num_rows > self._scratch.max_rows:
            self._scratch = sampling_scratch(num_rows, self._vocab_size, self._device)
        samples = self._choose(logits, row_slots, output_positions, chunks)
        edited = list(self._edited_rows(chunks, masks))
        most = len(self._edited_logits)
        for start in range(0, len(edited), most):
            part = edited[start : start + most]
            self._sample_edited(logits, row_slots, output_positions, chunks, part, masks, samples)
        if last_token_ids is not None:
            record_tokens(samples[0], row_slots, self._parameters, self._seen, last_token_ids)
        return samples

    def _choose(
        self,
        logits: torch.Tensor,
        row_slots: torch.Tensor,
        output_positions: torch.Tensor,
        chunks: SequenceOf[Chunk] | None,
    ) -> torch.Tensor:
        samples = row_slots.new_empty((2, logits.shape[0]))
        deterministic = chunks is not None and any(chunk.sequence.is_deterministic for chunk in chunks)
        find_best(logits, row_slots, self._parameters, samples, self._scratch, deterministic=deterministic)
        if _any_in(self._limited, chunks):
            limit_tokens(logits, row_slots, self._parameters, self._scratch, deterministic=deterministic)
        if _any_in(self._drawing, chunks):
            draw_tokens(logits, row_slots, output_positions, self._parameters, samples, self._scratch)
        return samples

    def _sample_edited(
        self,
        logits: torch.Tensor,
        row_slots: torch.Tensor,
        output_positions: torch.Tensor,
        chunks: SequenceOf[Chunk] | None,
        edited: list[_EditedRow],
        masks: TokenMasks | None,
        samples: torch.Tensor,
    ) -> None:
        """Choose again for the edited rows, from a copy; a row is valid when it was before and after."""
        rows = self._on_device([edit.row for edit in edited])
        adjusted = torch.index_select(logits, 0, rows, out=self._edited_logits[: len(edited)])
        slots = row_slots.index_select(0, rows)
        self._adjust(adjusted, slots, edited, masks)
        chosen = self._choose(adjusted, slots, output_positions.index_select(0, rows), chunks)
        chosen[1] &= samples[1].index_select(0, rows)
        samples.index_copy_(1, rows, chosen)

    def _adjust(
        self, logits: torch.Tensor, slots: torch.Tensor, edited: list[_EditedRow], masks: TokenMasks | None
    ) -> None:
        """Apply logit_bias, penalties, min_tokens and masks, in this order, in place."""
        flat, width = logits.view(-1), logits.shape[1]
        biases = [(index, edit.bias) for index, edit in enumerate(edited) if edit.bias is not None]
        if biases:
            places = torch.cat([token_ids + index * width for index, (token_ids, _) in biases])
            flat.index_add_(0, places, torch.cat([values for _, (_, values) in biases]))
        if any(edit.has_penalties for edit in edited):
            penalize(logits, slots, self._parameters, self._seen)
        bans = [edit.banned + index * width for index, edit in enumerate(edited) if edit.banned is not None]
        if bans:
            flat.index_fill_(0, torch.cat(bans), -math.inf)
        if masks is not None:
            mask_of = {row: index for index, row in enumerate(masks.rows)}
            mask_rows = [mask_of.get(edit.row, -1) for edit in edited]
            ban_tokens(logits, self._on_device(mask_rows).int(), masks.allowed)

    def _edited_rows(self, chunks: SequenceOf[Chunk] | None, masks: TokenMasks | None) -> Iterator[_EditedRow]:
        """Yield the rows whose logits change, in order."""
        masked = set() if masks is None else set(masks.rows)
        if chunks is None or not (masked or self._edits or self._penalized):
            return
        first_row = 0
        for chunk in chunks:
            slot, count = chunk.sequence.slot, chunk.num_sampled_rows
            edits, has_penalties = self._edits.get(slot, _NO_EDITS), slot in self._penalized
            for row in range(first_row, first_row + count):
                is_banned = chunk.sequence.is_stop_banned_at(chunk.output_position + row - first_row)
                banned = edits.stop_token_ids if is_banned else None
                if edits.bias is not None or has_penalties or banned is not None or row in masked:
                    yield _EditedRow(row, edits.bias, has_penalties, banned)
            first_row += count

    def _admit_edits(self, sequence: Sequence) -> None:
        sampling = sequence.sampling
        bias = stop_token_ids = None
        if sampling.logit_bias:
            values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
            bias = self._on_device(list(sampling.logit_bias)), self._to_device(values)
        if sequence.is_stop_banned_at(0):
            stop_token_ids = self._on_device(list(sequence.stop_token_ids))
        self._edits.pop(sequence.slot, None)
        if bias is not None or stop_token_ids is not None:
            self._edits[sequence.slot] = _Edits(bias, stop_token_ids)

    def _admit_penalties(self, sequence: Sequence) -> int:
        """Return the row of seen tokens that the slot has from now on, filled with the sequence's tokens."""
        slot, is_penalized = sequence.slot, has_penalties(sequence.sampling)
        _set_member(self._penalized, slot, is_penalized)
        if not is_penalized:
            return _NO_PENALTY_ROW
        count = sequence.num_prompt_tokens
        token_ids = self._on_device(sequence.token_ids)
        seen = self._seen[slot].zero_()
        seen.index_fill_(0, token_ids[:count], IN_PROMPT)
        output_ids = token_ids[count:]
        seen.index_add_(0, output_ids, torch.full_like(output_ids, IN_OUTPUT, dtype=torch.int32))
        return slot

    def _on_device(self, numbers: SequenceOf[int]) -> torch.Tensor:
        return self._to_device(torch.tensor(numbers, dtype=torch.int64))

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pinned(tensor).to(self._device, non_blocking=True)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor where a copy to the device does not wait."""
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _any_in(slots: set[int], chunks: SequenceOf[Chunk] | None) -> bool:
    return chunks is None or (bool(slots) and any(chunk.sequence.slot in slots for chunk in chunks))


def _set_member(members: set[int], slot: int, is_member: bool) -> None:
    if is_member:
        members.add(slot)
    else:
        members.discard(slot)
