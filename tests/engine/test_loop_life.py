"""The engine's life over a fake model: failing requests, a dying device, health, draining and stopping."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from engine_runs import chunks_of, make_request, running, tokens_of, until

from lmdserve.engine import loop
from lmdserve.engine.api import (
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    FinishReason,
)
from lmdserve.engine.loop import AsyncEngine

BuildEngine = Callable[..., AsyncEngine]


async def test_a_request_that_makes_the_step_raise_fails_alone(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    fake_model.raises_on = {62}
    async with running(build_fake_engine()) as engine:
        results = await asyncio.gather(
            *(tokens_of(engine, make_request(f"r{n}", [n, 62 if n == 3 else 0])) for n in range(6)),
            return_exceptions=True,
        )
        assert isinstance(results[3], EngineError)
        assert not isinstance(results[3], EngineDeadError)
        assert "the fake model was told to raise" in str(results[3])
        assert results[:3] + results[4:] == [fake_model.greedy([n, 0], 8) for n in range(6) if n != 3]
        with pytest.raises(EngineError, match="told to raise"):
            await tokens_of(engine, make_request("alone", [62]))
        engine.check_health()
        assert await tokens_of(engine, make_request("after", [5])) == fake_model.greedy([5], 8)


async def test_not_a_number_fails_that_request_alone(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    fake_model.nan_on = {61}
    async with running(build_fake_engine()) as engine:
        results = await asyncio.gather(
            *(tokens_of(engine, make_request(f"r{n}", [n, 61 if n == 2 else 0])) for n in range(4)),
            return_exceptions=True,
        )
        assert isinstance(results[2], EngineError)
        assert "not finite (NaN or infinity)" in str(results[2])
        assert results[:2] + results[3:] == [fake_model.greedy([n, 0], 8) for n in range(4) if n != 2]
        engine.check_health()


async def test_not_a_number_as_a_prompts_logprob_fails_the_request_too(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    """A text that was only scored was answered with NaN, which is no JSON."""
    fake_model.nan_on = {61}
    async with running(build_fake_engine()) as engine:
        with pytest.raises(EngineError, match="not finite"):
            await chunks_of(engine, make_request("a", [1, 61, 2], max_tokens=0, num_prompt_logprobs=0))


async def test_when_nothing_works_any_more_everybody_is_told(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    engine = build_fake_engine(max_batch_size=2)
    await engine.start()
    fake_model.gate.clear()
    tasks = [asyncio.create_task(tokens_of(engine, make_request(f"r{n}", [n]))) for n in range(5)]
    await until(lambda: engine.stats().num_running == 2)
    fake_model.is_broken = True
    fake_model.gate.set()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, EngineDeadError)
        assert "cannot compute any more" in str(error)
    with pytest.raises(EngineDeadError, match="cannot compute"):
        engine.check_health()
    with pytest.raises(EngineDeadError, match="cannot compute"):
        await tokens_of(engine, make_request("late", [1]))
    await engine.stop(0.0)


async def test_a_process_that_was_stopped_goes_on_where_it_was(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    """A paused container came back to an engine that had given up on its step, which had had no time either."""
    async with running(build_fake_engine(step_limit_s=0.2)) as engine:
        fake_model.gate.clear()
        task = asyncio.create_task(tokens_of(engine, make_request("a", [1])))
        await until(lambda: engine.stats().num_running == 1)
        asyncio.get_running_loop().call_soon(time.sleep, 0.4)  # the event loop stands still, and so does the step
        await asyncio.sleep(0)
        fake_model.gate.set()
        assert await task == fake_model.greedy([1], 8)


async def test_a_step_that_hangs_is_noticed(
    build_fake_engine: BuildEngine,
    fake_model: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "LAST_STEP_LIMIT_S", 0.1)
    engine = build_fake_engine(step_limit_s=1.0)
    await engine.start()
    fake_model.gate.clear()
    task = asyncio.create_task(tokens_of(engine, make_request("a", [1])))
    await asyncio.sleep(0.1)
    engine.check_health()
    assert engine.stats().heartbeat_age_s > 0.05
    with pytest.raises(EngineDeadError, match=r"has not come back for 1 s"):
        await task
    assert "the engine is dead: a step has not come back for 1 s; restart the server" in caplog.text
    with pytest.raises(EngineDeadError, match="has not come back"):
        engine.check_health()
    fake_model.gate.set()
    await engine.stop(0.0)


async def test_a_bug_in_the_loop_kills_the_engine_and_not_silently(
    build_fake_engine: BuildEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_fake_engine()
    await engine.start()

    def broken() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(engine._scheduler, "schedule", broken)
    with pytest.raises(EngineDeadError, match="ValueError: a bug"):
        await tokens_of(engine, make_request("a", [1]))
    with pytest.raises(EngineDeadError, match="a bug"):
        engine.check_health()
    await engine.stop(0.0)


async def test_health_of_an_engine_that_never_started_and_one_that_stopped(build_fake_engine: BuildEngine) -> None:
    engine = build_fake_engine()
    with pytest.raises(EngineDeadError, match="not running"):
        engine.check_health()
    with pytest.raises(EngineError, match=r"call start\(\) first"):
        await tokens_of(engine, make_request("a", [1]))
    await engine.start()
    await asyncio.sleep(0.05)
    engine.check_health()
    assert engine.stats().heartbeat_age_s == 0.0, "sleeping with nothing to do is healthy"
    await engine.stop(1.0)
    with pytest.raises(EngineDeadError, match="not running"):
        engine.check_health()
    with pytest.raises(RuntimeError, match="started before"):
        await engine.start()


async def test_stopping_lets_running_requests_finish_and_takes_no_new_ones(
    build_fake_engine: BuildEngine, fake_model: Any
) -> None:
    engine = build_fake_engine(max_batch_size=2)
    await engine.start()
    fake_model.gate.clear()
    tasks = [asyncio.create_task(tokens_of(engine, make_request(f"r{n}", [n]))) for n in range(5)]
    await until(lambda: len(engine._streams) == 5)
    stopping = asyncio.create_task(engine.stop(10.0))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await tokens_of(engine, make_request("late", [1]))
    fake_model.gate.set()
    await stopping
    assert await asyncio.gather(*tasks) == [fake_model.greedy([n], 8) for n in range(5)]


async def test_stopping_aborts_what_does_not_finish_in_time(build_fake_engine: BuildEngine, fake_model: Any) -> None:
    engine = build_fake_engine(max_batch_size=2)
    await engine.start()
    fake_model.gate.clear()
    tasks = [asyncio.create_task(chunks_of(engine, make_request(f"r{n}", [n]))) for n in range(4)]
    await until(lambda: len(engine._streams) == 4)
    asyncio.get_running_loop().call_later(0.15, fake_model.gate.set)
    started_s = time.monotonic()
    await engine.stop(0.05)
    assert time.monotonic() - started_s < 2.0
    for chunks in await asyncio.gather(*tasks):
        assert chunks[-1].finish_reason is FinishReason.ABORT
    engine._scheduler.check()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


async def test_a_step_that_never_ends_does_not_hold_up_stopping(
    build_fake_engine: BuildEngine, fake_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LAST_STEP_LIMIT_S", 0.1)
    engine = build_fake_engine()
    await engine.start()
    fake_model.gate.clear()
    reader = asyncio.create_task(chunks_of(engine, make_request("a", [1])))
    await until(lambda: engine.stats().num_running == 1)
    async with asyncio.timeout(5.0):
        await engine.stop(0.0)
    assert (await reader)[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(EngineDeadError, match="the engine was stopped"):
        engine.check_health()
    fake_model.gate.set()


async def test_stopping_an_engine_that_never_started_is_fine(build_fake_engine: BuildEngine) -> None:
    await build_fake_engine().stop(1.0)
