"""The memory plan: what goes where, decided from numbers before anything is loaded or allocated.

Owns the arithmetic of the plan and its error messages. How large the parts are is `memory_sizes.py`'s business, what
the device has is `memory_device.py`'s. No torch, and nothing is allocated: `lmdserve plan` prints what a server with
the same options would do, and the server makes its KV cache as large as the plan says.
"""

import logging
from dataclasses import dataclass
from typing import NamedTuple

from .api import ConfigError
from .config import EngineConfig, QuantPolicy
from .memory_device import MemoryDevice
from .memory_sizes import (
    ComputeForm,
    Part,
    StepSizes,
    dequantized_kv_bytes,
    is_fused,
    kv_block_bytes,
    runtime_parts,
    weight_bytes,
)
from .model_config import ModelConfig

logger = logging.getLogger(__name__)

_MIB = 2**20
_GIB = 2**30

# Prompt tokens in one step. On a GPU 8192 keep the products at full speed and cost 0.9 GiB of buffers for a 7B model;
# a CPU reaches its full speed at 2048, and more would only make the sequences that decode wait.
DEFAULT_PREFILL_TOKENS = {"cuda": 8192, "cpu": 2048}

# Sequences at once. 256 take 0.35 GiB of buffers for a vocabulary of 92544. Two CPU cores make 501 tokens/s of the demo
# model with 8 sequences and 756 with 32.
DEFAULT_BATCH_SIZE = {"cuda": 256, "cpu": 64}


class KVCachePlan(NamedTuple):
    """How many blocks to allocate, and the session length that fits them."""

    num_blocks: int
    session_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a server takes: fixed parts, and a KV cache."""

    device: MemoryDevice
    limit_bytes: int  # what the process may take: free memory, or less by --max-gpu-memory
    dtype_name: str
    form: ComputeForm
    sizes: StepSizes
    parts: tuple[Part, ...]
    quant_policy: QuantPolicy
    block_size: int
    bytes_per_block: int
    num_blocks: int
    dequantized_kv_bytes: int
    session_len: int
    max_batch_size: int
    max_prefill_tokens: int

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV cache."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def context_bytes(self) -> int:
        """What the driver takes beside torch's allocations."""
        return sum(part.num_bytes for part in self.parts if part.is_outside_torch)

    @property
    def kv_bytes(self) -> int:
        """The KV cache, with the block that padding rows point to, and where a prefill step dequantizes it."""
        return (self.num_blocks + 1) * self.bytes_per_block + self.dequantized_kv_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that the process takes."""
        return self.fixed_bytes + self.kv_bytes

    @property
    def num_tokens(self) -> int:
        """How many tokens the KV cache holds."""
        return self.num_blocks * self.block_size

    def num_sequences(self, length: int) -> int:
        """Return how many sequences of `length` tokens run at once."""
        return min(self.max_batch_size, self.num_blocks // -(-length // self.block_size))


def plan_memory(config: EngineConfig, model_config: ModelConfig, device: MemoryDevice) -> MemoryPlan:
    """Return the plan for these options; raise ConfigError, with numbers and what to change, when it does not fit."""
    dtype_name = resolve_dtype_name(config, model_config, device.kind)
    itemsize = 4 if dtype_name == "float32" else 2
    form = ComputeForm(itemsize, is_fused(model_config, itemsize, device.capability), config.lm_head_bits)
    if form.head_bits == 8 and not form.is_fused:
        raise ConfigError(
            "--lm-head-bits 8 is for 16-bit types on a GPU of compute capability 8.0 or more, and this model would be "
            f"computed in {dtype_name} on {device.name}; leave the option out"
        )
    max_prefill_tokens = resolve_max_prefill_tokens(config, device.kind)
    max_batch_size = config.max_batch_size or DEFAULT_BATCH_SIZE[device.kind]
    wanted_len = config.session_len or model_config.max_position_embeddings
    max_decode_rows = max(max_batch_size, 1 + _num_draft_tokens(config))
    sizes = StepSizes(
        max_tokens=max_prefill_tokens + max_decode_rows,
        max_logit_rows=max_decode_rows,
        num_slots=max_batch_size,
        max_blocks_per_slot=-(-wanted_len // config.cache_block_seq_len),
    )
    parts = [Part("weights", weight_bytes(model_config, form)), *runtime_parts(model_config, form, sizes, device)]
    limit_bytes = _limit_bytes(config, device)
    num_fixed_bytes = sum(part.num_bytes for part in parts)
    if num_fixed_bytes >= limit_bytes:
        raise ConfigError(_does_not_fit(parts, limit_bytes, device, max_prefill_tokens))
    bytes_per_block = kv_block_bytes(
        model_config, block_size=config.cache_block_seq_len, quant_policy=config.quant_policy, itemsize=itemsize
    )
    scratch_bytes = dequantized_kv_bytes(form, config.quant_policy)
    kv = plan_kv_cache(
        num_free_bytes=limit_bytes - num_fixed_bytes - scratch_bytes - bytes_per_block,  # the padding rows' block
        bytes_per_block=bytes_per_block,
        block_size=config.cache_block_seq_len,
        cache_max_entry_count=config.cache_max_entry_count,
        max_batch_size=max_batch_size,
        session_len=config.session_len,
        context_len=model_config.max_position_embeddings,
    )
    return MemoryPlan(
        device=device,
        limit_bytes=limit_bytes,
        dtype_name=dtype_name,
        form=form,
        sizes=sizes,
        parts=tuple(parts),
        quant_policy=config.quant_policy,
        block_size=config.cache_block_seq_len,
        bytes_per_block=bytes_per_block,
        num_blocks=kv.num_blocks,
        dequantized_kv_bytes=scratch_bytes,
        session_len=kv.session_len,
        max_batch_size=max_batch_size,
        max_prefill_tokens=max_prefill_tokens,
    )


def resolve_dtype_name(config: EngineConfig, model_config: ModelConfig, kind: str) -> str:
    """Return the compute type: as asked for, else the checkpoint's on a GPU and float32 on a CPU."""
    if config.dtype != "auto":
        return config.dtype
    return model_config.dtype_name if kind == "cuda" else "float32"


def resolve_max_prefill_tokens(config: EngineConfig, kind: str) -> int:
    """Return --max-prefill-token-num, or the device's default."""
    return config.max_prefill_token_num or DEFAULT_PREFILL_TOKENS[kind]


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
    """Return how many blocks to make; raise ConfigError, with numbers and what to change, when not one session fits.

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
    if session_len is not None or num_blocks <= 0:
        raise ConfigError(
            f"a session of {wanted_len} tokens needs {num_session_blocks} KV blocks of {block_size} tokens "
            f"({_mib(num_session_blocks * bytes_per_block)}) and there are {max(0, num_blocks)} "
            f"({_mib(num_free_bytes)} of memory is free, --cache-max-entry-count is {cache_max_entry_count:g}); "
            f"lower --session-len{f' to at most {num_blocks * block_size}' if num_blocks > 0 else ''}, "
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


def _num_draft_tokens(config: EngineConfig) -> int:
    return config.num_draft_tokens if config.speculate == "ngram" else 0


def _limit_bytes(config: EngineConfig, device: MemoryDevice) -> int:
    if config.max_gpu_memory is None or device.kind != "cuda":
        return device.free_bytes
    if config.max_gpu_memory > device.free_bytes:
        raise ConfigError(
            f"--max-gpu-memory is {_gib(config.max_gpu_memory)} and {_gib(device.free_bytes)} of the "
            f"{_gib(device.total_bytes)} of {device.name} are free; give less, or end what else runs there"
        )
    return config.max_gpu_memory


def _does_not_fit(parts: list[Part], limit_bytes: int, device: MemoryDevice, max_prefill_tokens: int) -> str:
    listed = ", ".join(f"{part.name} {_gib(part.num_bytes)}" for part in parts)
    needed = sum(part.num_bytes for part in parts)
    advice = "take a checkpoint with 4-bit weights, or a larger GPU" if device.kind == "cuda" else "use a smaller model"
    return (
        f"the model needs {_gib(needed)} before its KV cache ({listed}) and {_gib(limit_bytes)} may be taken on "
        f"{device.name}; lower --max-prefill-token-num ({max_prefill_tokens}) or --max-batch-size, raise "
        f"--max-gpu-memory where it is set, {advice}"
    )


def _check_blocks_fit(num_blocks: int, bytes_per_block: int, num_free_bytes: int) -> None:
    if num_blocks * bytes_per_block > num_free_bytes:
        raise ConfigError(
            f"--cache-max-entry-count {num_blocks} is {_mib(num_blocks * bytes_per_block)} of KV blocks and "
            f"{_mib(num_free_bytes)} of memory is free; give at most {max(0, num_free_bytes) // bytes_per_block} blocks"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.0f} MiB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
