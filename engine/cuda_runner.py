"""Runs steps on a CUDA device without waiting for them: `launch` enqueues a step, `collect` reads what it brought.

Owns the stream, the input tensor and the decision between a captured graph and eager launches. A step may be launched
while the one before it still runs: the tokens that one samples stay on the device, where the next finds them by slot.
"""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import islice

import torch

from lmdserve.kernels.attention_workspace import DEFAULT_SCRATCH_BYTES, AttentionWorkspace

from .compute_stream import compute_stream
from .device_sampler import DeviceSampler, TokenMasks
from .graphs import DecodeGraphs
from .kv_cache import KVCache
from .models.fused_decoder import FusedDecoder, FusedStep, PrefillRows, StepMemory
from .readback import LogprobReadback, LogprobReader, to_device, to_host
from .runner import chunk_result
from .sampler import NO_CHOICE, NOT_FINITE, Sample
from .sequence import Sequence
from .slots import SlotWriter
from .step import Chunk, ChunkResult
from .step_buffers import SlotTables, StepBuffers, StepLimits
from .step_inputs import NUM_INPUT_PARTS, StepInputs, aligned_count, build_step_inputs, pad_decode_rows
from .warm_up import compile_kernels


@dataclass(slots=True, eq=False, kw_only=True)
class CudaStep:
    """A step in flight: what it computes, where its results will be, and when."""

    chunks: SequenceOf[Chunk]
    uploaded: "_DeviceInputs"
    logits: torch.Tensor  # fp32 [num_samples, vocab_size]; the next step's forward pass overwrites them
    begun: torch.cuda.Event
    done: torch.cuda.Event
    previous_done: torch.cuda.Event | None  # the end of the step that was in flight when this one was launched
    # Where results will be once the step is sampled.
    samples: torch.Tensor | None = None  # int32 [2, num_samples], pinned: token ids, then 1 where there was a choice
    logprobs: list[LogprobReadback] = field(default_factory=list)  # of the samples whose requests asked
    prompt_logprobs: list[LogprobReadback] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeviceInputs:
    step: FusedStep
    sample_rows: torch.Tensor
    sample_slots: torch.Tensor
    output_positions: torch.Tensor
    prompt_logprob_rows: torch.Tensor


class CudaRunner:
    """One model on one CUDA device; the `Runner` of step.py."""

    max_in_flight = 2

    def __init__(
        self, decoder: FusedDecoder, kv_cache: KVCache, limits: StepLimits, *, max_draft_rows: int = 0
    ) -> None:
        """Steps with drafts have up to `max_draft_rows` rows; with more, or unannounced, they take a while at first."""
        self._decoder = decoder
        self._limits = limits
        self._device = decoder.device
        memory = self._memory = StepMemory(
            kv_cache,
            SlotTables(decoder.config, limits, device=self._device),
            StepBuffers(decoder.config, limits, dtype=decoder.dtype, device=self._device),
            _attention_workspace(decoder, limits, kv_cache),
        )
        self._stream = compute_stream(self._device, self)
        self._sampler = DeviceSampler(limits.num_slots, decoder.config.vocab_size, self._device)
        self._logprobs = LogprobReader(limits.num_slots, decoder.config.vocab_size, self._device)
        self._slots = SlotWriter(decoder.config, memory.tables, self._sampler)
        self._inputs = torch.zeros(limits.max_inputs, dtype=torch.int32, device=self._device)
        self._graphs = DecodeGraphs(decoder, memory, self._inputs, max_rows=limits.max_logit_rows)
        self._in_flight: list[CudaStep] = []
        self.device_busy_s = 0.0
        self.device_idle_s = 0.0  # between the end of a step and the begin of the next, launched before that end
        # Weights and buffers were filled on the loading thread's stream, which this one does not wait for by itself.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compile_kernels(decoder, memory, self._sampler, limits, max_draft_rows=max_draft_rows)
            self._graphs.capture_all(max_draft_rows=max_draft_rows)

    @torch.inference_mode()
    def launch(self, chunks: SequenceOf[Chunk]) -> CudaStep:
        """Enqueue a step's forward pass behind the steps in flight."""
        begun, done = _event(), _event()
        with torch.cuda.stream(self._stream):
            self._slots.update(chunks)
            inputs = build_step_inputs(chunks)
            num_graph_rows = self._num_graph_rows(inputs)
            if num_graph_rows is not None:
                pad_decode_rows(inputs, num_graph_rows)
            uploaded = self._upload(inputs)
            begun.record()
            if num_graph_rows is not None:
                logits = self._graphs.replay(num_graph_rows, has_drafts=inputs.has_drafts)
                logits = _rows_of(logits, inputs, uploaded)
            else:
                self._decoder.forward(uploaded.step, self._memory)
                logits = self._decoder.logits(uploaded.step, uploaded.sample_rows, self._memory)
        step = CudaStep(
            chunks=chunks,
            uploaded=uploaded,
            logits=logits,
            begun=begun,
            done=done,
            previous_done=self._in_flight[-1].done if self._in_flight else None,
        )
        self._in_flight.append(step)
        return step

    @torch.inference_mode()
    def sample(self, step: CudaStep) -> None:
        """Enqueue the choice of the tokens of the step launched last."""
        try:
            with torch.cuda.stream(self._stream):
                step.samples, step.logprobs = self._sample(step.chunks, step.logits, step.uploaded)
                step.prompt_logprobs = list(self._prompt_logprobs(step.chunks, step.uploaded))
                step.done.record()
        except Exception:
            self._in_flight.remove(step)
            raise

    def collect(self, step: CudaStep) -> list[ChunkResult]:
        """Wait for the oldest step in flight and return one result a chunk, in order."""
        self._in_flight.remove(step)
        step.done.synchronize()
        self._count_time(step)
        return list(_results(step))

    def probe(self) -> None:
        """Compute a row that is nobody's; raise what the device raises when it cannot compute any more."""
        with torch.cuda.stream(self._stream):
            self._upload(pad_decode_rows(StepInputs(), 1))
            self._graphs.replay(1, has_drafts=False).sum().item()

    def _num_graph_rows(self, inputs: StepInputs) -> int | None:
        """Return the rows of the graph that computes this step, None when it has to be launched kernel by kernel."""
        if inputs.num_decode_rows < inputs.num_rows or inputs.prompt_logprob_rows:
            return None
        return self._graphs.padded_rows(inputs.num_rows)

    def _upload(self, inputs: StepInputs) -> _DeviceInputs:
        """Copy all numbers at once to the input tensor, where the graphs read the first four parts."""
        num_decode_rows = inputs.num_decode_rows
        context_lens = array("i", (position + 1 for position in inputs.positions[:num_decode_rows]))
        parts = (
            inputs.token_ids,
            inputs.positions,
            inputs.slots,
            context_lens,
            inputs.query_starts,
            inputs.prefill_slots,
            inputs.prefill_context_lens,
            inputs.sample_rows,
            inputs.sample_slots,
            inputs.output_positions,
            inputs.prompt_logprob_rows,
        )
        assert len(parts) == NUM_INPUT_PARTS
        gaps = [aligned_count(len(part)) - len(part) for part in parts]
        padded = (bytes(part) + bytes(gap * part.itemsize) for part, gap in zip(parts, gaps, strict=True))
        packed = torch.frombuffer(bytearray().join(padded), dtype=torch.int32).pin_memory()
        arrived = self._inputs[: len(packed)]
        arrived.copy_(packed, non_blocking=True)
        spans = torch.split(arrived, [len(part) + gap for part, gap in zip(parts, gaps, strict=True)])
        tensors = [span[: len(part)] for span, part in zip(spans, parts, strict=True)]
        prefill = None
        if num_decode_rows < inputs.num_rows:
            prefill = PrefillRows(
                query_starts=tensors[4],
                slots=tensors[5],
                context_lens=tensors[6],
                max_query_len=inputs.max_query_len,
                max_context_len=max(inputs.prefill_context_lens),
                total_context_len=sum(inputs.prefill_context_lens),
            )
        step = FusedStep(
            token_ids=tensors[0],
            positions=tensors[1],
            slots=tensors[2],
            context_lens=tensors[3],
            has_drafts=inputs.has_drafts,
            is_deterministic=inputs.is_deterministic,
            prefill=prefill,
        )
        return _DeviceInputs(
            step=step,
            sample_rows=tensors[7],
            sample_slots=tensors[8],
            output_positions=tensors[9],
            prompt_logprob_rows=tensors[10],
        )

    def _sample(
        self, chunks: SequenceOf[Chunk], logits: torch.Tensor, uploaded: _DeviceInputs
    ) -> tuple[torch.Tensor, list[LogprobReadback]]:
        """Choose the tokens, leave them where the next step looks, and begin to copy them to the host."""
        samples = self._sampler.sample(
            logits,
            uploaded.sample_slots,
            uploaded.output_positions,
            chunks,
            masks=self._masks(chunks),
            last_token_ids=self._memory.tables.last_token_ids,
        )
        asked = [(row, num_top) for row, num_top in enumerate(_num_logprobs_by_row(chunks)) if num_top is not None]
        logprobs: list[LogprobReadback] = []
        if asked:
            rows, num_top = zip(*asked, strict=True)
            row_ids = to_device(torch.tensor(rows), self._device)
            logprobs += self._logprobs.begin(logits, row_ids, samples[0, row_ids].long(), num_top)
        return to_host(samples), logprobs

    def _masks(self, chunks: SequenceOf[Chunk]) -> TokenMasks | None:
        """Return what the constraints of a step allow its rows, None where nothing is constrained."""
        rows, masks, row = [], [], 0
        for chunk in chunks:
            constraint = chunk.sequence.constraint
            mask = None if constraint is None or not chunk.is_sampled else constraint.mask_at(chunk.output_position)
            if mask is not None:
                rows.append(row)
                masks.append(mask)
            row += chunk.num_sampled_rows
        if not masks:
            return None
        packed = torch.frombuffer(bytearray().join(masks), dtype=torch.int32).view(len(masks), -1)
        return TokenMasks(rows, to_device(packed, self._device))

    def _prompt_logprobs(self, chunks: SequenceOf[Chunk], uploaded: _DeviceInputs) -> Iterator[LogprobReadback]:
        """Yield the logprobs of prompt tokens that were asked for, as many at a time as there is room for logits."""
        targets, num_top = array("q"), array("i")
        for chunk in chunks:
            count, first = chunk.num_prompt_logprobs, chunk.start + 1
            targets.extend(chunk.sequence.token_ids[first : first + count])
            num_top.extend((chunk.sequence.num_prompt_logprobs or 0,) * count)
        if not targets:
            return
        target_ids = to_device(torch.frombuffer(targets, dtype=torch.int64), self._device)
        limit = self._limits.max_logit_rows
        for start in range(0, len(targets), limit):
            part = slice(start, start + limit)
            logits = self._decoder.logits(uploaded.step, uploaded.prompt_logprob_rows[part], self._memory)
            rows = torch.arange(len(logits), device=self._device)
            yield from self._logprobs.begin(logits, rows, target_ids[part], num_top[part])

    def _count_time(self, step: CudaStep) -> None:
        self.device_busy_s += step.begun.elapsed_time(step.done) / 1000
        if step.previous_done is not None:
            self.device_idle_s += step.previous_done.elapsed_time(step.begun) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _rows_of(logits: torch.Tensor, inputs: StepInputs, uploaded: _DeviceInputs) -> torch.Tensor:
    """Return the sampled rows of a graph's logits; nearly always these are its first rows, in order."""
    count = len(inputs.sample_rows)
    if inputs.sample_rows == array("i", range(count)):
        return logits[:count]
    return logits.index_select(0, uploaded.sample_rows)


def _num_logprobs_by_row(chunks: SequenceOf[Chunk]) -> Iterator[int | None]:
    for chunk in chunks:
        for _ in range(chunk.num_sampled_rows):
            yield chunk.sequence.sampling.num_logprobs


def _results(step: CudaStep) -> Iterator[ChunkResult]:
    """Yield the result of each chunk from what has arrived on the host."""
    assert step.samples is not None, "a step is sampled before it is collected"
    token_ids, is_valid = step.samples.tolist()
    logprobs = iter([row for part in step.logprobs for row in part.read()])
    prompt_logprobs = iter([row for part in step.prompt_logprobs for row in part.read()])
    samples = zip(token_ids, is_valid, strict=True)
    for chunk in step.chunks:
        own_prompt_logprobs = tuple(islice(prompt_logprobs, chunk.num_prompt_logprobs))
        wants_logprobs = chunk.sequence.sampling.num_logprobs is not None
        own_samples = [
            Sample(token_id, next(logprobs) if wants_logprobs else None, None if ok else _failure(chunk.sequence))
            for token_id, ok in islice(samples, chunk.num_sampled_rows)
        ]
        yield chunk_result(chunk, own_samples, own_prompt_logprobs)


def _failure(sequence: Sequence) -> str:
    """Say why a row had nothing to choose; which of the two it was is not worth reading its logits back."""
    sampling = sequence.sampling
    may_forbid = bool(sampling.logit_bias) or sampling.min_tokens > 0 or sequence.constraint is not None
    return NO_CHOICE if may_forbid else NOT_FINITE


def _attention_workspace(decoder: FusedDecoder, limits: StepLimits, kv_cache: KVCache) -> AttentionWorkspace:
    config = decoder.config
    return AttentionWorkspace.allocate(
        max_rows=aligned_count(limits.max_logit_rows),  # beside prefill tokens, decode rows are padded
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        device=decoder.device,
        scratch_bytes=0 if kv_cache.quant_policy == 0 else DEFAULT_SCRATCH_BYTES,
    )
