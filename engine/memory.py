"""The memory plan: how many KV blocks there are, decided from numbers before anything is allocated.

Owns the arithmetic and its error messages, and asks the machine what is free. It allocates nothing.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from .api import ConfigError

logger = logging.getLogger(__name__)

_MIB = 2**20
_CGROUP = Path("/sys/fs/cgroup")


class KVCachePlan(NamedTuple):
    """How many blocks to allocate, and the session length that fits them."""

    num_blocks: int
    session_len: int


def plan_kv_cache(
    *,
    num_free_bytes: int,
    bytes_per_block: int,
    block_size: int,
    cache_max_entry_count: float,
    max_batch_size: int,
    session_len: int | None,
    context_len: int,
) -> KVCachePlan:
    """Return the plan; raise ConfigError, with numbers and what to change, when not one session fits.

    `session_len` is what the user asked for. Without it the model's `context_len` is taken, or less when that does
    not fit. A share of memory is never more than `max_batch_size` whole sessions can use.
    """
    wanted_len = session_len or context_len
    num_session_blocks = -(-wanted_len // block_size)
    if cache_max_entry_count < 1:
        num_affordable = int(num_free_bytes * cache_max_entry_count) // bytes_per_block
        num_blocks = min(num_affordable, max_batch_size * num_session_blocks)
    else:
        num_blocks = int(cache_max_entry_count)
        _check_blocks_fit(num_blocks, bytes_per_block, num_free_bytes)
    if num_blocks >= num_session_blocks:
        return KVCachePlan(num_blocks, wanted_len)
    if session_len is not None or num_blocks == 0:
        raise ConfigError(
            f"a session of {wanted_len} tokens needs {num_session_blocks} KV blocks of {block_size} tokens "
            f"({_mib(num_session_blocks * bytes_per_block)}) and there are {num_blocks} "
            f"({_mib(num_free_bytes)} of memory is free, --cache-max-entry-count is {cache_max_entry_count:g}); "
            f"lower --session-len{f' to at most {num_blocks * block_size}' if num_blocks else ''}, "
            "raise --cache-max-entry-count, or set --quant-policy 8 or 4"
        )
    logger.warning(
        "the model's context of %d tokens needs %d KV blocks and there are %d: sessions are limited to %d tokens",
        wanted_len,
        num_session_blocks,
        num_blocks,
        num_blocks * block_size,
    )
    return KVCachePlan(num_blocks, num_blocks * block_size)


def available_bytes(device: torch.device) -> int:
    """Return how much memory can still be allocated on the device, beside what is in use already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    in_container = _container_available_bytes(_CGROUP)
    on_machine = _machine_available_bytes()
    return on_machine if in_container is None else min(on_machine, in_container)


def _check_blocks_fit(num_blocks: int, bytes_per_block: int, num_free_bytes: int) -> None:
    if num_blocks * bytes_per_block > num_free_bytes:
        raise ConfigError(
            f"--cache-max-entry-count {num_blocks} is {_mib(num_blocks * bytes_per_block)} of KV blocks and "
            f"{_mib(num_free_bytes)} of memory is free; give at most {num_free_bytes // bytes_per_block} blocks"
        )


def _machine_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; give --cache-max-entry-count as a number of blocks")


def _container_available_bytes(cgroup: Path) -> int | None:
    """Return what the container's limit (cgroup v2) leaves, page cache counted as free; None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.0f} MiB"
