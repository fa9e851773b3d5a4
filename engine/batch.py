"""One step's work as tensors: what the runner builds from a schedule and what a model's forward pass reads."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The new tokens of every sequence in this step, laid end to end, and where each finds its past.

    A sequence decodes when it brings one token and prefills when it brings more; the model does not tell them apart.
    Lengths are Python ints as well, so that nothing waits for the device to learn a shape.
    """

    token_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens], position in its own sequence, from 0
    slot_ids: torch.Tensor  # int64 [num_tokens], block_id * block_size + offset: where this token's K and V go
    query_lens: tuple[int, ...]  # [num_seqs], new tokens of each sequence, in order; sums to num_tokens
    context_lens: tuple[int, ...]  # [num_seqs], tokens of each sequence in the KV cache once this step has appended
    block_tables: torch.Tensor  # int64 [num_seqs, max_blocks], padded with 0 past a sequence's last block
    rope_bases: tuple[float, ...]  # [num_seqs], RoPE base of each sequence (dynamic NTK fixes it per request)
    logit_rows: torch.Tensor  # int64 [num_logits], the rows of the token axis whose logits are wanted
