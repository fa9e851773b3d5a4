"""From chunks to a StepBatch, number by number, and from logits back to the right chunk."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch

from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.engine.runner import Runner, build_batch
from lmdserve.engine.sequence import Sequence, new_sequence
from lmdserve.engine.step import Chunk, ChunkResult

BLOCK_SIZE = 4
CPU = torch.device("cpu")
INFO = EngineInfo(vocab_size=64, session_len=1000, eos_token_ids=frozenset())


def _sequence(
    prompt: SequenceOf[int],
    blocks: SequenceOf[int],
    *,
    num_computed: int = 0,
    rope_base: float = 1e4,
    num_prompt_logprobs: int | None = None,
    **sampling: Any,
) -> Sequence:
    request = Request(
        uid=f"on {blocks}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(**({"temperature": 0.0} | sampling)),
        num_prompt_logprobs=num_prompt_logprobs,
    )
    sequence = new_sequence(request, info=INFO, rope_base_for=lambda n: rope_base)
    sequence.block_ids.extend(blocks)
    sequence.num_computed_tokens = num_computed
    return sequence


def _chunk(sequence: Sequence, num_new_tokens: int, drafts: tuple[int, ...] = ()) -> Chunk:
    """Return the sequence's next chunk, which is sampled if it reaches the end of what is known."""
    start = sequence.num_computed_tokens
    is_sampled = start + num_new_tokens - len(drafts) == sequence.num_tokens and sequence.max_new_tokens > 0
    return Chunk(sequence, start, num_new_tokens, is_sampled, drafts)


def _run(runner: Runner, chunks: list[Chunk]) -> list[ChunkResult]:
    step = runner.launch(chunks)
    runner.sample(step)
    return runner.collect(step)


def _runner(model: Any) -> Runner:
    kv_cache: Any = torch.full((16, BLOCK_SIZE), -1)
    return Runner(model, kv_cache, block_size=BLOCK_SIZE, device=CPU)


def test_a_mixed_step_is_laid_end_to_end() -> None:
    decoding = _sequence(range(10, 20), [7, 2, 9], num_computed=9)
    prefilling = _sequence(range(30, 39), [5, 1, 3], num_computed=3, rope_base=2e4)
    unfinished = _sequence(range(40, 50), [4, 6, 8])
    batch = build_batch([_chunk(decoding, 1), _chunk(prefilling, 6), _chunk(unfinished, 2)], BLOCK_SIZE, CPU)
    assert batch.token_ids.tolist() == [19, 33, 34, 35, 36, 37, 38, 40, 41]
    assert batch.positions.tolist() == [9, 3, 4, 5, 6, 7, 8, 0, 1]
    assert batch.slot_ids.tolist() == [37, 23, 4, 5, 6, 7, 12, 16, 17]
    assert batch.query_lens == (1, 6, 2)
    assert batch.context_lens == (10, 9, 2)
    assert batch.block_tables.tolist() == [[7, 2, 9], [5, 1, 3], [4, 6, 8]]
    assert batch.rope_bases == (1e4, 2e4, 1e4)
    assert batch.logit_rows.tolist() == [0, 6], "a chunk that does not reach the end of its prompt needs no logits"
    tensors = (batch.token_ids, batch.positions, batch.slot_ids, batch.block_tables, batch.logit_rows)
    assert all(tensor.dtype is torch.int64 for tensor in tensors)


def test_tables_are_as_wide_as_the_step_needs_and_padded_with_the_pad_block() -> None:
    short = _sequence([1, 2], [3])
    long = _sequence(range(30), range(4, 12), num_computed=4)
    batch = build_batch([_chunk(short, 2), _chunk(long, 5)], BLOCK_SIZE, CPU)
    assert batch.block_tables.tolist() == [[3, 0, 0], [4, 5, 6]]
    assert batch.logit_rows.tolist() == [1]


def test_rows_for_prompt_logprobs_come_before_the_sampled_row() -> None:
    first = _sequence(range(6), [1, 2], num_prompt_logprobs=1)
    second = _sequence(range(6), [3, 4], num_computed=2, num_prompt_logprobs=1, max_tokens=0)
    batch = build_batch([_chunk(first, 6), _chunk(second, 4)], BLOCK_SIZE, CPU)
    assert batch.logit_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_every_chunk_gets_its_own_result(fake_model: Any) -> None:
    decoding = _sequence([1, 2, 3], [1])
    scored = _sequence([4, 5, 6], [2], num_prompt_logprobs=0, num_logprobs=0)
    unfinished = _sequence(range(7, 17), [3, 4, 5])
    chunks = [_chunk(decoding, 3), _chunk(unfinished, 4), _chunk(scored, 3)]
    runner = _runner(fake_model)
    results = _run(runner, chunks)
    assert [result.token_ids for result in results] == [
        (int(fake_model.logits([1, 2, 3]).argmax()),),
        (),
        (int(fake_model.logits([4, 5, 6]).argmax()),),
    ]
    assert [len(result.prompt_logprobs) for result in results] == [0, 0, 2]
    assert [record.token_id for record in results[2].prompt_logprobs] == [5, 6]
    wanted = [fake_model.logits([4]).log_softmax(-1)[5], fake_model.logits([4, 5]).log_softmax(-1)[6]]
    assert [record.logprob for record in results[2].prompt_logprobs] == pytest.approx([float(w) for w in wanted])
    assert results[0].logprobs == ()
    assert len(results[2].logprobs) == 1


def test_drafts_are_rows_of_their_own_after_the_last_token() -> None:
    sequence = _sequence(range(10, 16), [3, 5], num_computed=5, num_prompt_logprobs=None)
    batch = build_batch([_chunk(sequence, 3, (40, 41))], BLOCK_SIZE, CPU)
    assert batch.token_ids.tolist() == [15, 40, 41]
    assert batch.positions.tolist() == [5, 6, 7]
    assert batch.slot_ids.tolist() == [21, 22, 23]
    assert batch.context_lens == (8,)
    assert batch.logit_rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}], ids=["greedy", "seeded"])
def test_drafts_change_no_token_and_count_as_far_as_they_are_right(fake_model: Any, sampling: Any) -> None:
    """With k right drafts a step brings k + 1 tokens, the very ones that k + 1 steps bring."""

    def sequence() -> Sequence:
        return _sequence([1, 2, 3], [1, 2, 3], num_logprobs=0, **sampling)

    runner, plain = _runner(fake_model), sequence()
    expected: list[int] = []
    for _ in range(5):
        (result,) = _run(runner, [_chunk(plain, plain.num_tokens - plain.num_computed_tokens)])
        plain.num_computed_tokens = plain.num_tokens
        plain.token_ids.extend(result.token_ids)
        expected += result.token_ids
    for num_right in range(4):
        guessing = sequence()
        _run(runner, [_chunk(guessing, 2)])
        guessing.num_computed_tokens = 2
        wrong = (expected[num_right] + 1) % 64
        drafts = (*expected[:num_right], wrong, *expected[num_right + 1 : 4])
        (result,) = _run(runner, [_chunk(guessing, 1 + len(drafts), drafts)])
        assert list(result.token_ids) == expected[: num_right + 1]
        assert [record.token_id for record in result.logprobs] == expected[: num_right + 1]


def test_a_draft_that_gives_nonsense_fails_only_once_it_is_accepted(fake_model: Any) -> None:
    fake_model.nan_on = {61}
    sequence = _sequence([1, 2, 3], [1, 2])
    right = int(fake_model.logits([1, 2, 3]).argmax())
    (result,) = _run(_runner(fake_model), [_chunk(sequence, 5, (right, 61))])
    assert result.failure is None
    assert result.token_ids == (right, int(fake_model.logits([1, 2, 3, right]).argmax()))


def test_a_probe_touches_the_pad_block_only(fake_model: Any) -> None:
    kv_cache: Any = torch.full((16, BLOCK_SIZE), -1)
    runner = Runner(fake_model, kv_cache, block_size=BLOCK_SIZE, device=CPU)
    runner.probe()
    assert kv_cache[1:].eq(-1).all()
    assert kv_cache[0].tolist() == [0, -1, -1, -1]
    fake_model.is_broken = True
    with pytest.raises(RuntimeError, match="told to raise"):
        runner.probe()
