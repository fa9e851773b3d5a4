"""Runs steps with plain torch: chunks -> tensors -> forward pass -> sampled tokens, one step at a time.

Owns the model, the KV cache and the only code that turns block tables into slots. It reads sequences, which the event
loop leaves alone while a step is computed, and changes nothing of them but the sampler's own state.
"""

import math
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch

from .api import TokenLogprob
from .batch import StepBatch
from .blocks import PAD_BLOCK_ID
from .kv_cache import KVCache
from .sampler import NOT_FINITE, Sample, SampleRow, sample_rows, token_logprobs
from .step import Chunk, ChunkResult

PROBE_ROPE_BASE = 10_000.0  # any base does: the probe's answer is not used


class Model(Protocol):
    """What the runner needs of a decoder."""

    def forward(self, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Return fp32 logits [len(batch.logit_rows), vocab_size] and append the step's K and V to the cache."""


@dataclass(slots=True)
class ComputedStep:
    """A step whose forward pass is over."""

    chunks: SequenceOf[Chunk]
    logits: torch.Tensor
    results: list[ChunkResult] | None = None  # once it is sampled


class Runner:
    """One model on one device: the StepRunner of `step.py` that waits for everything it begins."""

    max_in_flight = 1
    device_busy_s = device_idle_s = 0.0  # not measured

    def __init__(self, model: Model, kv_cache: KVCache, *, block_size: int, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._device = device

    @torch.inference_mode()
    def launch(self, chunks: SequenceOf[Chunk]) -> ComputedStep:
        """Compute a step's logits. Raises whatever the model raises; a step may be computed again, as its K and V go
        where they went before.
        """
        batch = build_batch(chunks, self._block_size, self._device)
        return ComputedStep(chunks, self._model.forward(batch, self._kv_cache))

    @torch.inference_mode()
    def sample(self, step: ComputedStep) -> None:
        """Choose a step's tokens."""
        step.results = _read_logits(step.chunks, step.logits)

    def collect(self, step: ComputedStep) -> list[ChunkResult]:
        """Return one result a chunk."""
        assert step.results is not None, "a step is sampled before it is collected"
        return step.results

    @torch.inference_mode()
    def probe(self) -> None:
        """Compute one token in the pad block; raise what the device raises when it cannot compute any more."""
        self._model.forward(_probe_batch(self._block_size, self._device), self._kv_cache).sum().item()


def build_batch(chunks: SequenceOf[Chunk], block_size: int, device: torch.device) -> StepBatch:
    """Lay the chunks end to end. All numbers travel to the device in one copy."""
    token_ids, positions, slot_ids, logit_rows, tables = (array("q") for _ in range(5))
    context_lens = tuple(chunk.end for chunk in chunks)
    table_width = -(-max(context_lens) // block_size)
    for chunk, end in zip(chunks, context_lens, strict=True):
        sequence = chunk.sequence
        start = chunk.start
        logit_rows.extend(len(token_ids) + offset for offset in _logit_offsets(chunk))
        token_ids += sequence.token_ids[start : end - len(chunk.draft_token_ids)]
        token_ids.extend(chunk.draft_token_ids)
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


def _logit_offsets(chunk: Chunk) -> list[int]:
    """Return which of the chunk's rows need logits: prompt logprobs first, the rows to sample from last."""
    first_sampled = chunk.num_new_tokens - chunk.num_sampled_rows
    return [*range(chunk.num_prompt_logprobs), *range(first_sampled, chunk.num_new_tokens)]


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
    sampled_rows: list[int] = []
    prompt_logprobs = []
    row = 0
    for chunk in chunks:
        num_prompt_rows, num_sampled_rows = chunk.num_prompt_logprobs, chunk.num_sampled_rows
        prompt_logprobs.append(_prompt_logprobs(chunk, logits[row : row + num_prompt_rows]) if num_prompt_rows else ())
        row += num_prompt_rows
        sampled_rows.extend(range(row, row + num_sampled_rows))
        row += num_sampled_rows
    if len(sampled_rows) < row:
        logits = logits[torch.tensor(sampled_rows, dtype=torch.int64, device=logits.device)]
    samples = iter(sample_rows(logits, [row for chunk in chunks for row in _sample_rows(chunk)]))
    return [
        chunk_result(chunk, [next(samples) for _ in range(chunk.num_sampled_rows)], logprobs)
        for chunk, logprobs in zip(chunks, prompt_logprobs, strict=True)
    ]


def _sample_rows(chunk: Chunk) -> list[SampleRow]:
    first = chunk.output_position
    return [SampleRow(chunk.sequence, first + row) for row in range(chunk.num_sampled_rows)]


def _prompt_logprobs(chunk: Chunk, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
    """Row i predicts the token after it."""
    first = chunk.start + 1
    targets = chunk.sequence.token_ids[first : first + len(logits)]
    return tuple(token_logprobs(logits, targets, chunk.sequence.num_prompt_logprobs or 0))


def chunk_result(chunk: Chunk, samples: list[Sample], prompt_logprobs: tuple[TokenLogprob, ...]) -> ChunkResult:
    """Return a chunk's result; of its samples those up to the first that is not the draft after it are kept.

    The rows behind that one had a wrong past.
    """
    if any(math.isnan(record.logprob) for record in prompt_logprobs):
        return ChunkResult(failure=NOT_FINITE)
    kept: list[Sample] = []
    for sample, draft in zip(samples, (*chunk.draft_token_ids, None), strict=False):
        if sample.failure is not None:
            return ChunkResult(failure=sample.failure)
        kept.append(sample)
        if sample.token_id != draft:
            break
    logprobs = tuple(sample.logprob for sample in kept if sample.logprob is not None)
    return ChunkResult(tuple(sample.token_id for sample in kept), logprobs, prompt_logprobs)
