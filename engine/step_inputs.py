"""From a schedule to the integers a fused step needs, all on the host: which row holds what, and which are sampled.

Owns the order of rows: decode rows first, then prefill tokens. Touches no device; `cuda_runner.py` carries the numbers
there.
"""

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from .step import Chunk

TOKEN_ON_DEVICE = -1  # in place of a token id: the one that this slot sampled last, which the host has not seen yet
# Integers that each part of a step begins at a multiple of: kernels are compiled for pointers aligned to 16 bytes, and
# again for others.
ALIGNMENT = 4
NUM_INPUT_PARTS = 11  # that a step is sent to the device in
NO_POSITION = -1  # a padding row's position; its context length is then 0, which computes nothing


def _ints() -> "array[int]":
    return array("i")


@dataclass(slots=True)
class StepInputs:
    """A step's rows as int32 arrays; see FusedStep for what each holds."""

    token_ids: "array[int]" = field(default_factory=_ints)
    positions: "array[int]" = field(default_factory=_ints)
    slots: "array[int]" = field(default_factory=_ints)
    num_decode_rows: int = 0
    query_starts: "array[int]" = field(default_factory=lambda: array("i", (0,)))
    prefill_slots: "array[int]" = field(default_factory=_ints)
    prefill_context_lens: "array[int]" = field(default_factory=_ints)
    max_query_len: int = 0
    sample_rows: "array[int]" = field(default_factory=_ints)  # the rows to sample from, in the order of the chunks
    sample_slots: "array[int]" = field(default_factory=_ints)
    output_positions: "array[int]" = field(default_factory=_ints)  # which token of its output each sample is, from 0
    prompt_logprob_rows: "array[int]" = field(default_factory=_ints)  # in the order of the chunks
    has_drafts: bool = False  # several decode rows may belong to one sequence
    is_deterministic: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the step, without padding."""
        return len(self.token_ids)


def build_step_inputs(chunks: SequenceOf[Chunk]) -> StepInputs:
    """Lay out the rows of a step.

    A chunk of one token, one with drafts, and a run become decode rows. In a deterministic step everything is prefill,
    because that attention gives a token the same bits whatever comes with it.
    """
    inputs = StepInputs(is_deterministic=any(chunk.sequence.is_deterministic for chunk in chunks))
    decodes: list[int] = []
    prefills: list[int] = []
    for index, chunk in enumerate(chunks):
        has_few_tokens = chunk.is_run or chunk.num_new_tokens == 1 + len(chunk.draft_token_ids)
        is_decode = has_few_tokens and not inputs.is_deterministic
        (decodes if is_decode else prefills).append(index)
    first_rows = [0] * len(chunks)
    for index in decodes:
        first_rows[index] = inputs.num_rows
        _add_tokens(inputs, chunks[index])
        inputs.has_drafts |= chunks[index].num_new_tokens > 1
    if prefills:
        pad_decode_rows(inputs, aligned_count(inputs.num_rows))
    inputs.num_decode_rows = inputs.num_rows
    for index in prefills:
        first_rows[index] = inputs.num_rows
        _add_tokens(inputs, chunks[index])
        _add_prefill(inputs, chunks[index])
    for chunk, first_row in zip(chunks, first_rows, strict=True):
        _add_wanted_rows(inputs, chunk, first_row)
    return inputs


def aligned_count(count: int) -> int:
    """Return the next multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def pad_decode_rows(inputs: StepInputs, num_rows: int) -> StepInputs:
    """Add rows that compute nothing to a step of decode rows, up to `num_rows`; return the step."""
    missing = num_rows - inputs.num_rows
    inputs.token_ids.extend((0,) * missing)
    inputs.positions.extend((NO_POSITION,) * missing)
    inputs.slots.extend((0,) * missing)
    inputs.num_decode_rows = num_rows
    return inputs


def _add_tokens(inputs: StepInputs, chunk: Chunk) -> None:
    sequence = chunk.sequence
    if chunk.start == sequence.num_tokens:
        inputs.token_ids.append(TOKEN_ON_DEVICE)
    else:
        known = sequence.token_ids[chunk.start : chunk.end - len(chunk.draft_token_ids)]
        inputs.token_ids.extend(known.tolist())
    inputs.token_ids.extend(chunk.draft_token_ids)
    inputs.positions.extend(range(chunk.start, chunk.end))
    inputs.slots.extend((sequence.slot,) * chunk.num_new_tokens)


def _add_prefill(inputs: StepInputs, chunk: Chunk) -> None:
    inputs.query_starts.append(inputs.query_starts[-1] + chunk.num_new_tokens)
    inputs.prefill_slots.append(chunk.sequence.slot)
    inputs.prefill_context_lens.append(chunk.end)
    inputs.max_query_len = max(inputs.max_query_len, chunk.num_new_tokens)


def _add_wanted_rows(inputs: StepInputs, chunk: Chunk, first_row: int) -> None:
    inputs.prompt_logprob_rows.extend(range(first_row, first_row + chunk.num_prompt_logprobs))
    count = chunk.num_sampled_rows
    if count:
        end = first_row + chunk.num_new_tokens
        inputs.sample_rows.extend(range(end - count, end))
        inputs.sample_slots.extend((chunk.sequence.slot,) * count)
        inputs.output_positions.extend(range(chunk.output_position, chunk.output_position + count))
