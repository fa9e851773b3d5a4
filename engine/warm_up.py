"""Compiles every kernel that a model's steps launch before the first request comes, so that none waits for a compiler.

Owns the list of steps that stand for all others: kernels differ by ranges of row counts, of sequences and of decode
rows, and each range has one step here. What is compiled once stays in Triton's cache on disk. Steps with penalties or
logit biases, and deterministic ones, compile a few more kernels when the first of them comes.
"""

import logging
import os
import time
from collections.abc import Iterator

import torch

from lmdserve.kernels.launch import compile_ahead
from lmdserve.kernels.w4a16_plan import ROW_BUCKETS

from .device_sampler import DeviceSampler
from .graphs import graph_row_counts
from .models.fused_decoder import FusedDecoder, FusedStep, PrefillRows, StepMemory
from .step_buffers import StepLimits

logger = logging.getLogger(__name__)

_MOST_THREADS = 8
_LONG_QUERY = 512  # contexts of long chunks are dequantized first, which is another set of kernels
_SHORT_QUERY = 2
# Few enough prefill tokens that decode rows and they share a product of few rows, and so many that they do not.
_FEW_TOKENS, _MANY_TOKENS = 8, 256


@torch.inference_mode()
def compile_kernels(
    decoder: FusedDecoder, memory: StepMemory, sampler: DeviceSampler, limits: StepLimits, *, max_draft_rows: int
) -> None:
    """Compile, several kernels at once, what the decoder and the sampler launch; nothing of it runs.

    A kernel that cannot be compiled is no reason not to start: whoever needs it first gets its error.
    """
    start_s = time.perf_counter()
    shallow = decoder.first_layer_alone()
    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    try:
        with compile_ahead(num_threads):
            for step in _steps(limits, decoder.device, max_draft_rows):
                shallow.forward(step, memory)
            for num_rows in graph_row_counts(limits.max_logit_rows):
                _choose_tokens(shallow, memory, sampler, num_rows)
    except Exception:
        logger.warning("kernels could not be compiled ahead; each is compiled when it is first needed", exc_info=True)
    else:
        logger.info("kernels ready after %.1f s", time.perf_counter() - start_s)


def _steps(limits: StepLimits, device: torch.device, max_draft_rows: int) -> Iterator[FusedStep]:
    row_counts = graph_row_counts(limits.max_logit_rows)
    for num_rows in row_counts:
        yield _step(device, num_rows)
        if num_rows <= max_draft_rows:
            yield _step(device, num_rows, has_drafts=True)
    for num_tokens in (*(count for count in ROW_BUCKETS if count < limits.max_tokens), limits.max_tokens):
        yield _step(device, 0, num_tokens, max_query_len=num_tokens)
    for num_seqs in _powers_of_two(limits.num_slots):
        if _SHORT_QUERY * num_seqs <= limits.max_tokens:
            for max_query_len in (_SHORT_QUERY, _LONG_QUERY):
                yield _step(device, 0, _SHORT_QUERY * num_seqs, num_seqs=num_seqs, max_query_len=max_query_len)
    for num_rows in _powers_of_two(limits.max_logit_rows):
        for num_tokens in (_FEW_TOKENS, _MANY_TOKENS):
            if num_rows + num_tokens <= limits.max_tokens:
                yield _step(device, num_rows, num_tokens, max_query_len=num_tokens)


def _step(
    device: torch.device,
    num_decode_rows: int,
    num_prefill_tokens: int = 0,
    *,
    num_seqs: int = 1,
    max_query_len: int = 0,
    has_drafts: bool = False,
) -> FusedStep:
    """Return a step of these sizes; its contents are never read."""

    def ints(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    prefill = None
    if num_prefill_tokens:
        prefill = PrefillRows(
            query_starts=ints(num_seqs + 1),
            slots=ints(num_seqs),
            context_lens=ints(num_seqs),
            max_query_len=max_query_len,
            max_context_len=max_query_len,
            total_context_len=max_query_len * num_seqs,
        )
    num_tokens = num_decode_rows + num_prefill_tokens
    return FusedStep(
        token_ids=ints(num_tokens),
        positions=ints(num_tokens),
        slots=ints(num_tokens),
        context_lens=ints(num_decode_rows),
        has_drafts=has_drafts,
        is_deterministic=False,
        prefill=prefill,
    )


def _choose_tokens(decoder: FusedDecoder, memory: StepMemory, sampler: DeviceSampler, num_rows: int) -> None:
    step = _step(decoder.device, num_rows)
    decoder.logits(step, None, memory)
    logits = decoder.logits(step, step.slots, memory)
    sampler.sample(logits, step.slots, step.positions, None, last_token_ids=memory.tables.last_token_ids)


def _powers_of_two(most: int) -> Iterator[int]:
    """Yield 4, 8, ..., up to the first that is not below `most`, which is cut to it."""
    count = 4
    while count < most:
        yield count
        count *= 2
    yield most
