"""Rows of a fused step, checked against what each chunk says."""

from array import array

from lmdserve.engine.api import SamplingParams
from lmdserve.engine.sequence import Sequence
from lmdserve.engine.step import Chunk
from lmdserve.engine.step_inputs import NO_POSITION, TOKEN_ON_DEVICE, build_step_inputs, pad_decode_rows


def sequence(slot: int, num_tokens: int, num_prompt_tokens: int, *, is_deterministic: bool = False) -> Sequence:
    made = Sequence(
        uid=str(slot),
        sampling=SamplingParams(),
        token_ids=array("q", range(100 * slot, 100 * slot + num_tokens)),
        num_prompt_tokens=num_prompt_tokens,
        max_new_tokens=100,
        stop_token_ids=frozenset(),
        seed=0,
        rope_base=1e4,
        num_prompt_logprobs=None,
        is_deterministic=is_deterministic,
    )
    made.slot = slot
    return made


def test_decode_rows_come_first_padded_and_samples_keep_the_chunks_order() -> None:
    """Prefill tokens begin at a multiple of four rows, so that their pointers stay aligned."""
    prompt = Chunk(sequence(1, 10, 10), 4, 6, is_sampled=True)
    part = Chunk(sequence(2, 90, 90), 0, 3, is_sampled=False)
    decode = Chunk(sequence(3, 12, 10), 11, 1, is_sampled=True)
    inputs = build_step_inputs([prompt, part, decode])
    assert list(inputs.token_ids) == [311, 0, 0, 0, 104, 105, 106, 107, 108, 109, 200, 201, 202]
    assert list(inputs.positions) == [11, *[NO_POSITION] * 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert list(inputs.slots) == [3, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert inputs.num_decode_rows == 4
    assert list(inputs.query_starts) == [0, 6, 9]
    assert list(inputs.prefill_slots) == [1, 2]
    assert list(inputs.prefill_context_lens) == [10, 3]
    assert inputs.max_query_len == 6
    assert list(inputs.sample_rows) == [9, 0]
    assert list(inputs.sample_slots) == [1, 3]
    assert list(inputs.output_positions) == [0, 2]


def test_a_token_in_flight_is_taken_from_the_device() -> None:
    inputs = build_step_inputs([Chunk(sequence(5, 8, 6), 8, 1, is_sampled=True)])
    assert list(inputs.token_ids) == [TOKEN_ON_DEVICE]
    assert list(inputs.positions) == [8]
    assert list(inputs.output_positions) == [3]


def test_drafts_are_decode_rows_that_are_all_sampled() -> None:
    drafted = Chunk(sequence(1, 20, 10), 19, 3, is_sampled=True, draft_token_ids=(7, 8))
    inputs = build_step_inputs([drafted, Chunk(sequence(2, 5, 4), 4, 1, is_sampled=True)])
    assert inputs.has_drafts
    assert inputs.num_decode_rows == 4
    assert list(inputs.token_ids) == [119, 7, 8, 204]
    assert list(inputs.positions) == [19, 20, 21, 4]
    assert list(inputs.sample_rows) == [0, 1, 2, 3]
    assert list(inputs.output_positions) == [10, 11, 12, 1]


def test_a_run_is_decode_rows_of_which_the_last_is_sampled() -> None:
    run = Chunk(sequence(1, 20, 10), 16, 4, is_sampled=True, is_run=True)
    part = Chunk(sequence(2, 20, 10), 12, 2, is_sampled=False, is_run=True)
    inputs = build_step_inputs([run, part, Chunk(sequence(3, 5, 4), 4, 1, is_sampled=True)])
    assert inputs.has_drafts
    assert inputs.num_decode_rows == inputs.num_rows == 7
    assert list(inputs.token_ids) == [116, 117, 118, 119, 212, 213, 304]
    assert list(inputs.slots) == [1, 1, 1, 1, 2, 2, 3]
    assert list(inputs.sample_rows) == [3, 6]
    assert list(inputs.output_positions) == [10, 1]


def test_one_deterministic_sequence_makes_everything_prefill() -> None:
    plain, strict = sequence(1, 20, 10), sequence(2, 5, 4, is_deterministic=True)
    inputs = build_step_inputs([Chunk(plain, 19, 1, is_sampled=True), Chunk(strict, 4, 1, is_sampled=True)])
    assert inputs.is_deterministic
    assert inputs.num_decode_rows == 0
    assert list(inputs.query_starts) == [0, 1, 2]
    assert inputs.max_query_len == 1


def test_padding_rows_have_no_context() -> None:
    inputs = pad_decode_rows(build_step_inputs([Chunk(sequence(5, 8, 6), 7, 1, is_sampled=True)]), 4)
    assert inputs.num_decode_rows == inputs.num_rows == 4
    assert list(inputs.positions) == [7] + [NO_POSITION] * 3
    assert list(inputs.sample_rows) == [0]
