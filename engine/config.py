"""The engine's options, each with its name, default and help in one place, and the numbers they resolve to.

No torch here: `lmdserve --help` is built from this file. `server/options.py` turns the fields into arguments.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .api import ConfigError

ModelFormat = Literal["auto", "hf", "awq", "gptq", "compressed-tensors"]
QuantPolicy = Literal[0, 4, 8]
HeadBits = Literal[16, 8]
Speculation = Literal["ngram", "off"]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Device = Literal["auto", "cuda", "cpu"]


# Suffixes of a number of bytes, longest first, so that GiB is not read as B.
_BYTE_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
_BYTES_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


class ByteCount(int):
    """A number of bytes; text such as `20GiB`, `20.5 GB`, `512MiB` or `1000` is read, in either kind of unit."""

    def __new__(cls, value: "int | str") -> "ByteCount":
        """Raise ValueError, naming the text and the forms there are, when it is no number of bytes."""
        if not isinstance(value, str):
            return super().__new__(cls, value)
        match = _BYTES_TEXT.fullmatch(value.strip().lower())
        unit = match and _BYTE_UNITS.get(match[2] or "b")
        if match is None or unit is None:
            raise ValueError(f"{value!r} is no amount of memory; write 20GiB, 20GB, 512MiB or a number of bytes")
        return super().__new__(cls, round(float(match[1]) * unit))


def option(default: Any, text: str, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """Return a dataclass field that `server/options.py` shows as a command-line option with this help text."""
    return field(default=default, metadata={"help": text, "at_least": at_least, "at_most": at_most})


def check_bounds(config: Any) -> None:
    """Raise ConfigError for the first field of an options dataclass that lies outside its bounds."""
    for entry in fields(config):
        value, low, high = getattr(config, entry.name), entry.metadata["at_least"], entry.metadata["at_most"]
        name = "--" + entry.name.replace("_", "-")
        if value is not None and low is not None and value < low:
            raise ConfigError(f"{name} is {value}; give {low} or more")
        if value is not None and high is not None and value > high:
            raise ConfigError(f"{name} is {value}; give {high} or less")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked for. "auto" and None are decided once, in `engine/load_engine.py`, and logged."""

    model: str = option("demo", "local folder, hub name, or `demo` for the model in the package")
    revision: str | None = option(None, "branch, tag or commit, for a hub name")
    model_format: ModelFormat = option("auto", "weight format; auto reads it from config.json")
    dtype: Dtype = option("auto", "compute type; auto: the checkpoint's on a GPU, float32 on a CPU")
    device: Device = option("auto", "where to run; auto: a GPU when there is one")
    tp: int = option(1, "number of GPUs to split the model over (only 1 so far)", at_least=1)
    quant_policy: QuantPolicy = option(0, "KV cache bits: 0 as computed, 8 or 4 quantized per token and head")
    lm_head_bits: HeadBits = option(
        16, "weights of the output head on a GPU: 16 bits as stored, or 8 with a scale a row, for faster small batches"
    )
    session_len: int | None = option(
        None, "longest prompt plus answer, tokens; default: the model's context length", at_least=2
    )
    max_batch_size: int | None = option(
        None, "most sequences that run at once; default: 256 on a GPU, 64 on a CPU", at_least=1
    )
    max_prefill_token_num: int | None = option(
        None,
        "most prompt tokens computed in one step; longer prompts take several; default: 8192 on a GPU, 2048 on a CPU",
        at_least=1,
    )
    max_queue_size: int = option(512, "most requests that wait; one more is refused with 429", at_least=0)
    cache_max_entry_count: float = option(
        0.8,
        "KV cache: below 1 the share of the memory that weights and buffers leave free, from 1 a number of KV blocks",
        at_least=0.001,
    )
    max_gpu_memory: ByteCount | None = option(
        None, "most GPU memory that the whole process takes, such as 20GiB; default: all that is free"
    )
    cache_block_seq_len: int = option(64, "tokens in one KV block", at_least=1)
    enable_prefix_caching: bool = option(True, "reuse the KV blocks of equal prompt beginnings")
    deterministic: bool = option(
        False, "every answer the same, bit by bit, whatever is computed beside it; slower on a GPU"
    )
    speculate: Speculation = option(
        "off", "guess several tokens a step from the text itself, where that is faster; answers stay the same"
    )
    num_draft_tokens: int = option(4, "most tokens guessed for one sequence in a step", at_least=1, at_most=16)

    def __post_init__(self) -> None:
        check_bounds(self)
        if isinstance(self.max_gpu_memory, str):
            try:
                object.__setattr__(self, "max_gpu_memory", ByteCount(self.max_gpu_memory))
            except ValueError as error:
                raise ConfigError(f"--max-gpu-memory: {error}") from None
