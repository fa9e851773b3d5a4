"""From chunks to a StepBatch, number by number, and from logits back to the right chunk."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch

from lmdserve.engine.api import EngineDeadError, EngineInfo, Request, SamplingParams
from lmdserve.engine.runner import Runner, build_batch
from lmdserve.engine.scheduler import Chunk
from lmdserve.engine.sequence import Sequence, new_sequence

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


def _runner(model: Any) -> Runner:
    kv_cache: Any = torch.full((16, BLOCK_SIZE), -1)
    return Runner(model, kv_cache, block_size=BLOCK_SIZE, device=CPU)


def test_a_mixed_step_is_laid_end_to_end() -> None:
    decoding = _sequence(range(10, 20), [7, 2, 9], num_computed=9)
    prefilling = _sequence(range(30, 39), [5, 1, 3], num_computed=3, rope_base=2e4)
    unfinished = _sequence(range(40, 50), [4, 6, 8])
    batch = build_batch([Chunk(decoding, 1), Chunk(prefilling, 6), Chunk(unfinished, 2)], BLOCK_SIZE, CPU)
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
    batch = build_batch([Chunk(short, 2), Chunk(long, 5)], BLOCK_SIZE, CPU)
    assert batch.block_tables.tolist() == [[3, 0, 0], [4, 5, 6]]
    assert batch.logit_rows.tolist() == [1]


def test_rows_for_prompt_logprobs_come_before_the_sampled_row() -> None:
    first = _sequence(range(6), [1, 2], num_prompt_logprobs=1)
    second = _sequence(range(6), [3, 4], num_computed=2, num_prompt_logprobs=1, max_tokens=0)
    batch = build_batch([Chunk(first, 6), Chunk(second, 4)], BLOCK_SIZE, CPU)
    assert batch.logit_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_every_chunk_gets_its_own_result(fake_model: Any) -> None:
    decoding = _sequence([1, 2, 3], [1])
    scored = _sequence([4, 5, 6], [2], num_prompt_logprobs=0, num_logprobs=0)
    unfinished = _sequence(range(7, 17), [3, 4, 5])
    chunks = [Chunk(decoding, 3), Chunk(unfinished, 4), Chunk(scored, 3)]
    results = _runner(fake_model).run(chunks)
    assert [result.token_id for result in results] == [
        int(fake_model.logits([1, 2, 3]).argmax()),
        None,
        int(fake_model.logits([4, 5, 6]).argmax()),
    ]
    assert [len(result.prompt_logprobs) for result in results] == [0, 0, 2]
    assert [record.token_id for record in results[2].prompt_logprobs] == [5, 6]
    wanted = [fake_model.logits([4]).log_softmax(-1)[5], fake_model.logits([4, 5]).log_softmax(-1)[6]]
    assert [record.logprob for record in results[2].prompt_logprobs] == pytest.approx([float(w) for w in wanted])
    assert results[0].logprob is None
    assert results[2].logprob is not None


def test_a_step_that_raises_is_repeated_one_by_one(fake_model: Any) -> None:
    fake_model.raises_on = {9}
    chunks = [Chunk(_sequence([1], [1]), 1), Chunk(_sequence([9], [2]), 1), Chunk(_sequence([3], [3]), 1)]
    results = _runner(fake_model).run(chunks)
    assert fake_model.batch_sizes == [3, 1, 1, 1]
    assert results[0].token_id == int(fake_model.logits([1]).argmax())
    assert results[1].failure == "computing this request failed with RuntimeError: the fake model was told to raise"
    assert results[2].token_id == int(fake_model.logits([3]).argmax())


def test_when_all_fail_a_probe_decides_whose_fault_it_is(fake_model: Any) -> None:
    runner = _runner(fake_model)
    fake_model.raises_on = {9}
    (result,) = runner.run([Chunk(_sequence([9], [2]), 1)])
    assert result.failure is not None
    fake_model.is_broken = True
    with pytest.raises(EngineDeadError, match="cannot compute any more"):
        runner.run([Chunk(_sequence([9], [2]), 1)])


def test_the_probe_touches_the_pad_block_only(fake_model: Any) -> None:
    kv_cache: Any = torch.full((16, BLOCK_SIZE), -1)
    runner = Runner(fake_model, kv_cache, block_size=BLOCK_SIZE, device=CPU)
    fake_model.raises_on = {9}
    runner.run([Chunk(_sequence([9], [2]), 1)])
    assert kv_cache[1:].eq(-1).all()
    assert kv_cache[0].tolist() == [0, -1, -1, -1]
