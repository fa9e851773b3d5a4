"""Requests through the engine, over a fake model: what comes out, what is refused, who waits and who leaves."""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from engine_runs import chunks_of, make_request, running, tokens_of, until

from lmdserve.engine import loop
from lmdserve.engine.api import (
    ContextTooLongError,
    EngineInfo,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    Request,
    SamplingParams,
)
from lmdserve.engine.loop import AsyncEngine, FinishRate
from lmdserve.engine.sampler import sample
from lmdserve.engine.sequence import new_sequence

BuildEngine = Callable[..., AsyncEngine]


async def test_greedy_output_is_the_models_own(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    async with running(build_fake_engine()) as engine:
        chunks = await chunks_of(engine, make_request("a", [1, 2, 3], max_tokens=20))
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert token_ids == fake_model.greedy([1, 2, 3], 20)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_an_end_of_sequence_token_ends_and_is_handed_over(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    prompt = next([n] for n in range(60) if len(fake_model.greedy([n], 50)) < 50)
    async with running(build_fake_engine()) as engine:
        chunks = await chunks_of(engine, make_request("a", prompt, max_tokens=50))
        ignoring = await tokens_of(engine, make_request("b", prompt, max_tokens=50, ignore_eos=True))
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert token_ids == fake_model.greedy(prompt, 50)
    assert (token_ids[-1], chunks[-1].finish_reason) == (63, FinishReason.STOP)
    assert len(ignoring) == 50


async def test_requests_join_and_leave_at_every_step(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    rng = random.Random(1)
    jobs = [([rng.randrange(60) for _ in range(rng.randint(1, 30))], rng.randint(1, 20)) for _ in range(60)]

    async def late(engine: AsyncEngine, index: int) -> list[int]:
        await asyncio.sleep(rng.random() * 0.2)
        prompt, max_tokens = jobs[index]
        return await tokens_of(engine, make_request(f"r{index}", prompt, max_tokens=max_tokens))

    async with running(build_fake_engine(num_blocks=20)) as engine:
        outputs = await asyncio.gather(*(late(engine, index) for index in range(len(jobs))))
    assert outputs == [fake_model.greedy(prompt, max_tokens) for prompt, max_tokens in jobs]
    assert max(fake_model.batch_sizes) > 2


def _decode_alone(fake_model: Any, request: Request) -> list[int]:
    """Return what one token after another gives, each sampled with all tokens before it known."""
    info = EngineInfo(vocab_size=64, session_len=64, eos_token_ids=frozenset({63}))
    sequence = new_sequence(request, info=info, rope_base_for=lambda num_tokens: 1e4)
    while sequence.num_output_tokens < sequence.max_new_tokens:
        (chosen,) = sample(fake_model.logits(sequence.token_ids)[None], [sequence])
        sequence.token_ids.append(chosen.token_id)
        if chosen.token_id in sequence.stop_token_ids:
            break
    return sequence.token_ids[sequence.num_prompt_tokens :].tolist()


async def test_sampling_sees_every_token_before_also_those_in_flight(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    """Penalties count them, min_tokens and seeds go by place in the output, stop tokens end it where they come."""
    rng = random.Random(2)
    choices: list[dict[str, Any]] = [
        {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.7}, {"frequency_penalty": 1.5, "temperature": 0.7},
        {"min_tokens": 6, "stop_token_ids": frozenset(range(0, 64, 3))}, {"stop_token_ids": frozenset(range(40, 60))},
        {"min_tokens": 3, "logit_bias": {63: 9.0}, "presence_penalty": 1.0},
    ]  # fmt: skip
    requests = [
        make_request(
            f"r{n}", [rng.randrange(60) for _ in range(rng.randint(1, 12))], max_tokens=12, **({"seed": n} | fields)
        )
        for n, fields in enumerate(choices * 4)
    ]
    async with running(build_fake_engine(num_blocks=24)) as engine:
        outputs = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
    assert outputs == [_decode_alone(fake_model, request) for request in requests]


async def test_max_tokens_is_clipped_to_the_context(build_fake_engine: BuildEngine) -> None:
    async with running(build_fake_engine(session_len=20)) as engine:
        chunks = await chunks_of(engine, make_request("a", range(15), max_tokens=1000, ignore_eos=True))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 5
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_prompt_logprobs_come_once_with_the_first_chunk(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    prompt = list(range(20, 45))
    async with running(build_fake_engine(max_prefill_tokens=4)) as engine:
        chunks = await chunks_of(engine, make_request("a", prompt, num_logprobs=1, num_prompt_logprobs=2))
        (scored,) = await chunks_of(engine, make_request("b", prompt, max_tokens=0, num_prompt_logprobs=0))
    assert [chunk.prompt_logprobs is None for chunk in chunks] == [False] + [True] * (len(chunks) - 1)
    records = chunks[0].prompt_logprobs
    assert records is not None
    assert records[0] is None
    for position in range(1, len(prompt)):
        record, wanted = records[position], fake_model.logits(prompt[:position]).log_softmax(-1)
        assert record is not None
        assert record.token_id == prompt[position]
        assert record.logprob == pytest.approx(float(wanted[prompt[position]]), abs=1e-5)
        assert [token_id for token_id, _ in record.top] == wanted.topk(2).indices.tolist()
    assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)
    assert (scored.token_ids, scored.finish_reason) == ((), FinishReason.LENGTH)
    assert len(scored.prompt_logprobs or ()) == len(prompt)


async def test_cached_prompt_tokens_are_reported(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    prompt = list(range(13))
    async with running(build_fake_engine(block_size=4)) as engine:
        cold = await chunks_of(engine, make_request("cold", prompt))
        warm = await chunks_of(engine, make_request("warm", prompt))
        stats = engine.stats()
    assert {chunk.num_cached_tokens for chunk in cold} == {0}
    assert {chunk.num_cached_tokens for chunk in warm} == {12}
    assert [t for c in warm for t in c.token_ids] == fake_model.greedy(prompt, 8)
    assert (stats.prompt_tokens_total, stats.cached_tokens_total) == (26, 12)
    assert stats.generation_tokens_total == 2 * len(fake_model.greedy(prompt, 8))
    assert stats.num_cached_blocks > 0


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [1, 64]}, "prompt", "token id 64; this model's ids are 0 to 63"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [2**70]}, "prompt", "not a token id"),
        ({"temperature": -0.1}, "temperature", "temperature is -0.1; give a number of 0 or more"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"top_p": 1.5}, "top_p", "from 0 to 1"),
        ({"min_p": -1.0}, "min_p", "from 0 to 1"),
        ({"top_k": -1}, "top_k", "0 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty", "that is finite"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "that is finite"),
        ({"logit_bias": {64: 1.0}}, "logit_bias", "token id 64"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias", "that is finite"),
        ({"stop_token_ids": frozenset({99})}, "stop_token_ids", "token id 99"),
        ({"max_tokens": -1}, "max_tokens", "0 or more"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "more than max_tokens, 8"),
        ({"num_logprobs": 65}, "logprobs", "from 0 to 64"),
        ({"num_prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 64"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_honoured_is_refused_before_anything_runs(
    build_fake_engine: BuildEngine, fake_model: Any, fields: dict[str, Any], param: str, message: str
) -> None:
    async with running(build_fake_engine()) as engine:
        with pytest.raises(InvalidRequestError, match=message) as refusal:
            await chunks_of(engine, make_request("a", **({"prompt": [1]} | fields)))
        assert refusal.value.param == param
    assert fake_model.num_steps == 0


async def test_a_prompt_without_room_for_an_answer_is_refused_with_both_numbers(build_fake_engine: BuildEngine) -> None:
    async with running(build_fake_engine(session_len=20)) as engine:
        with pytest.raises(ContextTooLongError, match=r"20 tokens.* 20 tokens") as refusal:
            await chunks_of(engine, make_request("a", range(20)))
        assert (refusal.value.num_prompt_tokens, refusal.value.session_len) == (20, 20)
        assert len(await tokens_of(engine, make_request("b", range(19), ignore_eos=True))) == 1


async def test_an_id_in_use_is_refused_and_the_first_request_is_unharmed(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    async with running(build_fake_engine()) as engine:
        first = asyncio.create_task(tokens_of(engine, make_request("same", [1, 2])))
        await until(lambda: engine.stats().num_running == 1)
        with pytest.raises(InvalidRequestError, match="running already"):
            await chunks_of(engine, make_request("same", [3]))
        assert await first == fake_model.greedy([1, 2], 8)


async def test_what_cannot_be_deterministic_says_so(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3)
    request = Request(uid="a", prompt_token_ids=[1], sampling=params, deterministic=True)
    async with running(build_fake_engine(can_be_deterministic=False)) as engine:
        with pytest.raises(InvalidRequestError, match="not possible with this server's compute type") as refusal:
            await chunks_of(engine, request)
        assert refusal.value.param == "deterministic"
    async with running(build_fake_engine()) as engine:
        assert await tokens_of(engine, request) == fake_model.greedy([1], 3)


async def test_a_full_queue_refuses_with_an_estimate(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    async with running(build_fake_engine(max_batch_size=1, max_queue_size=2)) as engine:
        fake_model.gate.clear()
        tasks = [asyncio.create_task(tokens_of(engine, make_request(f"r{n}", [n]))) for n in range(3)]
        await until(lambda: len(engine._streams) == 3)
        with pytest.raises(QueueFullError, match="3 requests are running or waiting") as refusal:
            await chunks_of(engine, make_request("one too many", [9]))
        assert refusal.value.retry_after_s > 0
        fake_model.gate.set()
        assert await asyncio.gather(*tasks) == [fake_model.greedy([n], 8) for n in range(3)]
        await tokens_of(engine, make_request("there is room again", [9]))


def test_the_estimate_is_the_mean_time_between_finishes() -> None:
    rate = FinishRate()
    rate.record(100.0)
    assert rate.seconds_per_request(105.0) == 1.0
    for now_s in (102.0, 104.0):
        rate.record(now_s)
    assert rate.seconds_per_request(104.0) == pytest.approx(2.0)
    assert rate.seconds_per_request(144.0) == pytest.approx(22.0), "a stall makes the wait longer"


async def test_the_estimate_leaves_out_the_time_without_requests(
    build_fake_engine: BuildEngine, fake_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst after a quiet night was told to come back in minutes: the night counted as time between two finishes."""
    async with running(build_fake_engine(max_batch_size=1, max_queue_size=1)) as engine:
        for uid in ("a", "b"):
            await tokens_of(engine, make_request(uid, [1]))
        await until(lambda: engine._is_idle)
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 36_000.0))
        fake_model.gate.clear()
        tasks = [asyncio.create_task(tokens_of(engine, make_request(f"r{n}", [n]))) for n in range(2)]
        await until(lambda: engine.stats().num_running == 1)
        with pytest.raises(QueueFullError) as refusal:
            await chunks_of(engine, make_request("one too many", [9]))
        fake_model.gate.set()
        await asyncio.gather(*tasks)
    assert refusal.value.retry_after_s < 60.0


async def test_closing_the_iterator_frees_the_blocks_with_the_steps_in_flight(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    async with running(build_fake_engine()) as engine:
        async with aclosing(engine.generate(make_request("a", [1, 2], max_tokens=50, ignore_eos=True))) as chunks:
            await anext(chunks)
            fake_model.gate.clear()
            await asyncio.sleep(0.01)
        num_steps = fake_model.num_steps
        assert engine.stats().num_running == 0
        fake_model.gate.set()
        await until(lambda: engine.stats().num_used_blocks == 0)
        assert fake_model.num_steps <= num_steps + engine._stepper._runner.max_in_flight


async def test_closing_before_the_first_chunk_and_cancelling_a_reader_abort_too(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    async with running(build_fake_engine()) as engine:
        await engine.generate(make_request("never read", [1])).aclose()
        assert engine.stats().num_waiting == 0
        fake_model.gate.clear()
        reader = asyncio.create_task(tokens_of(engine, make_request("cancelled", [1], max_tokens=50)))
        await until(lambda: engine.stats().num_running == 1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert engine.stats().num_running == 0
        fake_model.gate.set()


async def test_a_late_close_does_not_hit_a_new_request_of_the_same_id(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    async with running(build_fake_engine()) as engine:
        old = engine.generate(make_request("same", [1], max_tokens=1))
        assert (await anext(old)).finish_reason is FinishReason.LENGTH
        fake_model.gate.clear()
        new = asyncio.create_task(tokens_of(engine, make_request("same", [2])))
        await until(lambda: engine.stats().num_running == 1)
        await old.aclose()
        fake_model.gate.set()
        assert await new == fake_model.greedy([2], 8)


async def test_a_storm_of_aborts_leaves_the_others_whole(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    rng = random.Random(5)

    async def reader(engine: AsyncEngine, index: int) -> None:
        prompt = [rng.randrange(4) for _ in range(rng.randint(1, 25))]
        num_wanted = rng.choice([None, 0, 1, 3])
        await asyncio.sleep(rng.random() * 0.1)
        received: list[int] = []
        async with aclosing(engine.generate(make_request(f"r{index}", prompt, max_tokens=12))) as chunks:
            async for chunk in chunks:
                received += chunk.token_ids
                if num_wanted is not None and len(received) > num_wanted:
                    break
        expected = fake_model.greedy(prompt, 12)
        assert received == expected[: len(received)]
        assert num_wanted is not None or received == expected

    async with running(build_fake_engine(num_blocks=11, max_queue_size=200)) as engine:
        async with asyncio.timeout(60):
            await asyncio.gather(*(reader(engine, index) for index in range(150)))
        await until(lambda: engine.stats().num_used_blocks == 0)
        stats = engine.stats()
    assert (stats.num_waiting, stats.num_used_blocks) == (0, 0)
    assert stats.preemptions_total > 0


async def test_a_slow_reader_holds_up_nobody_and_gets_everything_at_once(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    async with running(build_fake_engine()) as engine:
        slow = engine.generate(make_request("slow", [1, 2], max_tokens=40, ignore_eos=True))
        first = await anext(slow)
        fast = await tokens_of(engine, make_request("fast", [3, 4], max_tokens=40, ignore_eos=True))
        await until(lambda: engine.stats().num_running == 0)  # `slow` is computed, and still unread
        rest = [chunk async for chunk in slow]
    assert len(fast) == 40
    assert len(rest) == 1
    assert len(first.token_ids + rest[0].token_ids) == 40


async def test_the_event_loop_stays_free_while_a_step_runs(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    async with running(build_fake_engine()) as engine:
        fake_model.gate.clear()
        task = asyncio.create_task(tokens_of(engine, make_request("a", [1])))
        await until(lambda: engine.stats().num_running == 1)
        started_s = time.monotonic()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert time.monotonic() - started_s < 1.0
        assert not task.done()
        fake_model.gate.set()
        await task
