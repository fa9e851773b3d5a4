"""Runs one step on the engine thread: chunks -> tensors -> forward pass -> sampled tokens.

Owns the model, the KV cache and the only code that turns block tables into slots. It reads sequences, which the event
loop leaves alone while a step runs, and changes nothing of them but the sampler's own state. Whether a failing step is
one request's fault or everybody's is found out here, too.
"""

import logging
from array import array
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from .api import EngineDeadError, TokenLogprob
from .batch import StepBatch
from .blocks import PAD_BLOCK_ID
from .kv_cache import KVCache
from .sampler import Sample, sample, token_logprobs
from .scheduler import Chunk, ChunkResult

logger = logging.getLogger(__name__)

PROBE_ROPE_BASE = 10_000.0  # any base does: the probe's answer is not used


class Model(Protocol):
    """What the runner needs of a decoder."""

    def forward(self, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Return fp32 logits [len(batch.logit_rows), vocab_size] and append the step's K and V to the cache."""


class Runner:
    """One model on one device. `run` is called on the engine thread, one step at a time."""

    def __init__(self, model: Model, kv_cache: KVCache, *, block_size: int, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._device = device

    def run(self, chunks: SequenceOf[Chunk]) -> list[ChunkResult]:
        """Compute a step and return one result a chunk, in order. Raises EngineDeadError when nothing works any more.

        A step that raises is repeated one sequence at a time (K and V go where they went before), so that only those
        fail that make it raise.
        """
        try:
            return self._compute(chunks)
        except Exception:
            logger.exception("a step of %d sequences failed; each is tried alone", len(chunks))
        results = [self._compute_alone(chunk) for chunk in chunks]
        if all(result.failure is not None for result in results):
            self._probe()
        return results

    def _compute_alone(self, chunk: Chunk) -> ChunkResult:
        try:
            return self._compute([chunk])[0]
        except Exception as error:
            return ChunkResult(failure=f"computing this request failed with {type(error).__name__}: {error}")

    @torch.inference_mode()
    def _compute(self, chunks: SequenceOf[Chunk]) -> list[ChunkResult]:
        logits = self._model.forward(build_batch(chunks, self._block_size, self._device), self._kv_cache)
        return _read_logits(chunks, logits)

    @torch.inference_mode()
    def _probe(self) -> None:
        """Compute one token in the pad block, to tell failing requests from a failing device."""
        try:
            self._model.forward(_probe_batch(self._block_size, self._device), self._kv_cache).sum().item()
        except Exception as error:
            raise EngineDeadError(
                f"the model cannot compute any more ({type(error).__name__}: {error}); restart the server"
            ) from error


def build_batch(chunks: SequenceOf[Chunk], block_size: int, device: torch.device) -> StepBatch:
    """Lay the chunks end to end. All numbers travel to the device in one copy."""
    token_ids, positions, slot_ids, logit_rows, tables = (array("q") for _ in range(5))
    context_lens = tuple(chunk.sequence.num_computed_tokens + chunk.num_new_tokens for chunk in chunks)
    table_width = -(-max(context_lens) // block_size)
    for chunk, end in zip(chunks, context_lens, strict=True):
        sequence = chunk.sequence
        start = sequence.num_computed_tokens
        logit_rows.extend(len(token_ids) + offset for offset in _logit_offsets(chunk))
        token_ids += sequence.token_ids[start:end]
        positions.extend(range(start, end))
        slot_ids.extend(_slots(sequence.block_ids, start, end, block_size))
        table = sequence.block_ids[:table_width]
        tables += table
        tables.extend([PAD_BLOCK_ID] * (table_width - len(table)))
    parts = (token_ids, positions, slot_ids, logit_rows, tables)
    packed = torch.frombuffer(bytearray().join(parts), dtype=torch.int64).to(device)
    token_tensor, position_tensor, slot_tensor, row_tensor, table_tensor = torch.split(
        packed, [len(part) for part in parts]
    )
    return StepBatch(
        token_ids=token_tensor,
        positions=position_tensor,
        slot_ids=slot_tensor,
        query_lens=tuple(chunk.num_new_tokens for chunk in chunks),
        context_lens=context_lens,
        block_tables=table_tensor.view(len(chunks), table_width),
        rope_bases=tuple(chunk.sequence.rope_base for chunk in chunks),
        logit_rows=row_tensor,
    )


def _slots(block_ids: "array[int]", start: int, end: int, block_size: int) -> "array[int]":
    """Return where the tokens at positions start..end go: block id * block size + offset."""
    slots = array("q")
    for index in range(start // block_size, -(-end // block_size)):
        shift = (block_ids[index] - index) * block_size
        slots.extend(range(max(start, index * block_size) + shift, min(end, (index + 1) * block_size) + shift))
    return slots


def _num_prompt_logprobs(chunk: Chunk) -> int:
    """Return how many of the chunk's first rows predict a prompt token whose logprob is wanted."""
    sequence = chunk.sequence
    if not sequence.wants_prompt_logprobs:
        return 0
    return min(chunk.num_new_tokens, sequence.num_prompt_tokens - 1 - sequence.num_computed_tokens)


def _logit_offsets(chunk: Chunk) -> list[int]:
    """Return which of the chunk's rows need logits: prompt logprobs first, the row to sample from last."""
    offsets = list(range(_num_prompt_logprobs(chunk)))
    if chunk.is_sampled:
        offsets.append(chunk.num_new_tokens - 1)
    return offsets


def _probe_batch(block_size: int, device: torch.device) -> StepBatch:
    def number(value: int) -> torch.Tensor:
        return torch.tensor([value], device=device)

    return StepBatch(
        token_ids=number(0),
        positions=number(0),
        slot_ids=number(PAD_BLOCK_ID * block_size),
        query_lens=(1,),
        context_lens=(1,),
        block_tables=number(PAD_BLOCK_ID).view(1, 1),
        rope_bases=(PROBE_ROPE_BASE,),
        logit_rows=number(0),
    )


def _read_logits(chunks: SequenceOf[Chunk], logits: torch.Tensor) -> list[ChunkResult]:
    """Turn logits, rows as `_logit_offsets` asked for, into one result a chunk."""
    sampled_rows = []
    prompt_logprobs = []
    row = 0
    for chunk in chunks:
        num_prompt_rows = _num_prompt_logprobs(chunk)
        prompt_logprobs.append(_prompt_logprobs(chunk, logits[row : row + num_prompt_rows]) if num_prompt_rows else ())
        row += num_prompt_rows
        if chunk.is_sampled:
            sampled_rows.append(row)
            row += 1
    if len(sampled_rows) < row:
        logits = logits[torch.tensor(sampled_rows, dtype=torch.int64, device=logits.device)]
    samples = iter(sample(logits, [chunk.sequence for chunk in chunks if chunk.is_sampled]))
    return [
        _result(next(samples) if chunk.is_sampled else None, logprobs)
        for chunk, logprobs in zip(chunks, prompt_logprobs, strict=True)
    ]


def _prompt_logprobs(chunk: Chunk, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
    """Row i predicts the token after it."""
    first = chunk.sequence.num_computed_tokens + 1
    targets = chunk.sequence.token_ids[first : first + len(logits)]
    return tuple(token_logprobs(logits, targets, chunk.sequence.num_prompt_logprobs or 0))


def _result(chosen: Sample | None, prompt_logprobs: tuple[TokenLogprob, ...]) -> ChunkResult:
    if chosen is None:
        return ChunkResult(prompt_logprobs=prompt_logprobs)
    if chosen.failure is not None:
        return ChunkResult(failure=chosen.failure)
    return ChunkResult(chosen.token_id, chosen.logprob, prompt_logprobs)
