"""The KV plan's arithmetic and messages, and what the machine says is free."""

from pathlib import Path
from typing import Any

import pytest

from lmdserve.engine import memory_device
from lmdserve.engine.api import ConfigError
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.memory import KVCachePlan, MemoryPlan, plan_kv_cache, plan_memory
from lmdserve.engine.memory_device import MemoryDevice
from lmdserve.engine.model_config import ModelConfig

MIB = 2**20


def _plan(**changes: Any) -> KVCachePlan:
    numbers: dict[str, Any] = {
        "num_free_bytes": 1000 * MIB,
        "bytes_per_block": MIB,
        "block_size": 64,
        "cache_max_entry_count": 0.5,
        "max_batch_size": 100,
        "session_len": None,
        "context_len": 6400,
    }
    return plan_kv_cache(**(numbers | changes))


def test_a_share_of_free_memory_becomes_blocks() -> None:
    assert _plan() == KVCachePlan(num_blocks=500, session_len=6400)


def test_no_more_blocks_than_full_sessions_can_use() -> None:
    assert _plan(max_batch_size=2).num_blocks == 200
    assert _plan(max_batch_size=2, session_len=65).num_blocks == 4


def test_a_number_of_blocks_is_taken_as_it_is() -> None:
    assert _plan(cache_max_entry_count=700.0, max_batch_size=1).num_blocks == 700


def test_a_number_of_blocks_beyond_memory_is_refused() -> None:
    message = "--cache-max-entry-count 1001 is 1001 MiB of KV blocks and 1000 MiB of memory is free; give at most 1000"
    with pytest.raises(ConfigError, match=message):
        _plan(cache_max_entry_count=1001.0)


@pytest.mark.parametrize("count", [0.05, 50.0])
def test_the_default_session_shrinks_to_what_fits_and_says_so(count: float, caplog: pytest.LogCaptureFixture) -> None:
    assert _plan(cache_max_entry_count=count) == KVCachePlan(num_blocks=50, session_len=3200)
    assert "needs 100 KV blocks and there are 50: sessions are limited to 3200 tokens" in caplog.text


def test_a_session_asked_for_that_does_not_fit_is_refused_with_numbers() -> None:
    message = (
        r"a session of 6400 tokens needs 100 KV blocks of 64 tokens \(100 MiB\) and there are 50 "
        r"\(1000 MiB of memory is free, --cache-max-entry-count is 0\.05\); lower --session-len to at most 3200, raise"
    )
    with pytest.raises(ConfigError, match=message):
        _plan(session_len=6400, cache_max_entry_count=0.05)


def test_memory_for_not_even_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there are 0 .* lower --session-len, raise"):
        _plan(num_free_bytes=MIB)


def test_a_session_length_that_is_no_multiple_of_the_block_gets_its_last_block() -> None:
    assert _plan(session_len=6401, max_batch_size=1).num_blocks == 101


def test_free_memory_is_a_number_of_this_machine() -> None:
    available = memory_device.this_machine().free_bytes
    assert 16 * MIB < available < 2**50


def test_a_container_limit_counts_page_cache_as_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{60 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {40 * MIB}\ninactive_file {20 * MIB}\n")
    assert memory_device.container_available_bytes(tmp_path) == 60 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_device.container_available_bytes(tmp_path) is None
    assert memory_device.container_available_bytes(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20GiB", 20 * 2**30),
        ("20.5 gib", 41 * 2**29),
        ("20GB", 20 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1e3", None),
        ("1000", 1000),
        ("7 b", 7),
        ("-1GiB", None),
        ("GiB", None),
        ("3 bytes", None),
    ],
)
def test_amounts_of_memory_are_read_with_their_unit(text: str, expected: int | None) -> None:
    if expected is not None:
        assert EngineConfig(max_gpu_memory=text).max_gpu_memory == expected
        return
    with pytest.raises(ConfigError, match=r"--max-gpu-memory: .* is no amount of memory"):
        EngineConfig(max_gpu_memory=text)


GPU = MemoryDevice("cuda", "GPU", 24 * 2**30, 24 * 2**30, (9, 0))


def _gpu_plan(folder: Path, device: MemoryDevice = GPU, **options: Any) -> MemoryPlan:
    return plan_memory(EngineConfig(**options), ModelConfig.from_folder(folder), device)


def test_a_share_is_of_what_weights_and_buffers_leave(tiny_checkpoint: Path) -> None:
    plan = _gpu_plan(tiny_checkpoint, cache_max_entry_count=0.5, max_batch_size=10**6, max_prefill_token_num=8)
    left = plan.limit_bytes - plan.fixed_bytes
    assert plan.kv_bytes == pytest.approx(left / 2, abs=2 * plan.bytes_per_block)
    assert plan.peak_bytes == plan.fixed_bytes + plan.kv_bytes
    assert plan.num_tokens == plan.num_blocks * 64


def test_a_cap_takes_the_place_of_free_memory(tiny_checkpoint: Path) -> None:
    options = {"cache_max_entry_count": 0.9, "max_batch_size": 10**5, "max_prefill_token_num": 8}
    assert _gpu_plan(tiny_checkpoint, max_gpu_memory="4GiB", **options).peak_bytes <= 4 * 2**30
    busy = GPU._replace(free_bytes=3 * 2**30)
    with pytest.raises(ConfigError, match=r"--max-gpu-memory is 4\.00 GiB and 3\.00 GiB of the 24\.00 GiB of GPU are"):
        _gpu_plan(tiny_checkpoint, busy, max_gpu_memory="4GiB", **options)


def test_prefill_steps_are_larger_on_a_gpu(tiny_checkpoint: Path) -> None:
    assert _gpu_plan(tiny_checkpoint).max_prefill_tokens == 8192
    cpu = MemoryDevice("cpu", "CPU", 8 * 2**30, 8 * 2**30)
    assert _gpu_plan(tiny_checkpoint, cpu).max_prefill_tokens == 2048
    assert _gpu_plan(tiny_checkpoint, max_prefill_token_num=100).max_prefill_tokens == 100


def test_the_compute_type_is_the_checkpoints_on_a_gpu_alone(tiny_checkpoint: Path) -> None:
    cpu = MemoryDevice("cpu", "CPU", 8 * 2**30, 8 * 2**30)
    assert _gpu_plan(tiny_checkpoint, cpu, dtype="bfloat16").dtype_name == "bfloat16"
    assert _gpu_plan(tiny_checkpoint).dtype_name == "float32"


def test_a_model_too_large_is_refused_with_every_part(tiny_checkpoint: Path) -> None:
    small = GPU._replace(free_bytes=100 * MIB)
    with pytest.raises(
        ConfigError, match=r"needs .* before its KV cache \(weights .*, CUDA context .*\) and 0\.10 GiB"
    ):
        _gpu_plan(tiny_checkpoint, small)


def test_a_lone_sequence_with_drafts_needs_a_row_for_each(tiny_checkpoint: Path) -> None:
    assert _gpu_plan(tiny_checkpoint, max_batch_size=1).sizes.max_logit_rows == 1
    plan = _gpu_plan(tiny_checkpoint, max_batch_size=1, speculate="ngram", num_draft_tokens=6)
    assert plan.sizes.max_logit_rows == 7
    assert plan.sizes.max_tokens == plan.max_prefill_tokens + 7


def test_sequences_are_counted_in_whole_blocks_and_never_beyond_the_batch(tiny_checkpoint: Path) -> None:
    plan = _gpu_plan(tiny_checkpoint, cache_max_entry_count=10.0, max_batch_size=4)
    assert [plan.num_sequences(length) for length in (64, 65, 320, 321, 641)] == [4, 4, 2, 1, 0]
