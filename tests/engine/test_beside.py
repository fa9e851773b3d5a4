"""Two engines in one process: what the plan says about both, and that a released one is really gone."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdserve.engine import beside
from lmdserve.engine.api import ConfigError, EngineInfo, Request, SamplingParams
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.load_engine import load_engine
from lmdserve.engine.memory import plan_memory
from lmdserve.engine.memory_device import MemoryDevice
from lmdserve.engine.model_config import ModelConfig

MIB = 2**20


def _config(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(**({"model": str(folder), "device": "cpu", "max_batch_size": 4} | changes))


def _running(folder: Path) -> EngineInfo:
    plan = plan_memory(_config(folder), ModelConfig.from_folder(folder), MemoryDevice("cpu", "x", 2**34, 2**34))
    parts = {part.name: part.num_bytes for part in plan.parts} | {"KV cache": plan.kv_bytes}
    return EngineInfo(
        vocab_size=1, session_len=plan.session_len, eos_token_ids=frozenset(), planned_bytes=parts,
        num_kv_tokens=plan.num_tokens,
    )  # fmt: skip


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how much memory the machine has left."""

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(beside, "this_machine", lambda: MemoryDevice("cpu", "this machine", 2**34, num_bytes))

    return set_free


def test_with_room_for_both_the_new_one_is_loaded_beside(
    tiny_checkpoint: Path, free_bytes: Callable[[int], None]
) -> None:
    free_bytes(2**33)
    running = _running(tiny_checkpoint)
    plan = beside.plan_swap(_config(tiny_checkpoint), running)
    assert plan.how == "beside"
    assert plan.running_bytes == sum(running.planned_bytes.values())
    assert plan.peak_bytes == plan.running_bytes + plan.after_bytes
    assert (plan.running_kv_tokens, plan.session_len) == (running.num_kv_tokens, 512)


def test_where_sessions_would_get_shorter_the_old_one_goes_first(
    tiny_checkpoint: Path, free_bytes: Callable[[int], None]
) -> None:
    """What the old weights give back is what makes the difference."""
    running = _running(tiny_checkpoint)
    weights = running.planned_bytes["weights"]
    fixed = sum(running.planned_bytes.values()) - running.planned_bytes["KV cache"]
    free_bytes(fixed + weights // 4)
    plan = beside.plan_swap(_config(tiny_checkpoint), running)
    assert plan.how == "drain"
    assert "beside the rest" in plan.reason
    assert plan.peak_bytes == max(plan.running_bytes, plan.after_bytes)


def test_draining_can_be_asked_for(tiny_checkpoint: Path, free_bytes: Callable[[int], None]) -> None:
    free_bytes(2**33)
    plan = beside.plan_swap(_config(tiny_checkpoint), _running(tiny_checkpoint), may_load_beside=False)
    assert (plan.how, plan.reason) == ("drain", "it was asked for")


def test_what_does_not_fit_alone_either_is_refused_with_numbers(
    tiny_checkpoint: Path, free_bytes: Callable[[int], None]
) -> None:
    free_bytes(MIB // 4)
    with pytest.raises(ConfigError, match="may be taken on this machine"):
        beside.plan_swap(_config(tiny_checkpoint), _running(tiny_checkpoint))


def _tensor_bytes() -> int:
    return sum(found.nbytes for found in gc.get_objects() if type(found) is torch.Tensor)


async def test_a_released_engine_is_gone_without_a_garbage_collection(tiny_checkpoint: Path) -> None:
    """Its bugs: the loader's records referred to the weights in a circle, and the engine thread to the last step."""
    gc.collect()
    gc.disable()
    try:
        before = _tensor_bytes()
        for _ in range(5):
            engine = load_engine(_config(tiny_checkpoint, cache_max_entry_count=40.0))
            await engine.start()
            request = Request(uid="a", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=3))
            assert [chunk async for chunk in engine.generate(request)]
            assert _tensor_bytes() > before + MIB // 2
            await engine.stop(1.0)
            engine.release()
            assert _tensor_bytes() == before
    finally:
        gc.enable()
    assert engine.info.num_kv_tokens == 40 * 64
