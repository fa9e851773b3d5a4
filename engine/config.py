"""The engine's options, each with its name, default and help in one place, and the numbers they resolve to.

No torch here: `lmdserve --help` is built from this file. `server/options.py` turns the fields into arguments.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

ModelFormat = Literal["auto", "hf", "awq", "gptq"]
QuantPolicy = Literal[0, 4, 8]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Device = Literal["auto", "cuda", "cpu"]


def option(default: Any, text: str, *, metavar: str | None = None) -> Any:
    """Return a dataclass field that `server/options.py` shows as a command-line option with this help text."""
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked for. "auto" and None are decided once, in `engine/loop.py: load_engine`, and logged."""

    model: str = option("demo", "local folder, hub name, or `demo` for the model in the package")
    revision: str | None = option(None, "branch, tag or commit, for a hub name")
    model_format: ModelFormat = option("auto", "weight format; auto reads it from config.json")
    dtype: Dtype = option("auto", "compute type; auto: the checkpoint's on a GPU, float32 on a CPU")
    device: Device = option("auto", "where to run; auto: a GPU when there is one")
    tp: int = option(1, "number of GPUs to split the model over (only 1 so far)")
    quant_policy: QuantPolicy = option(0, "KV cache bits: 0 as computed, 8 or 4 quantized per token and head")
    session_len: int | None = option(None, "longest prompt plus answer, tokens; default: the model's context length")
    max_batch_size: int = option(64, "most sequences that run at once")
    max_prefill_token_num: int = option(2048, "most prompt tokens computed in one step; longer prompts take several")
    max_queue_size: int = option(512, "most requests that wait; one more is refused with 429")
    cache_max_entry_count: float = option(
        0.8, "share of free memory for the KV cache when below 1, number of KV blocks when above"
    )
    cache_block_seq_len: int = option(64, "tokens in one KV block")
    enable_prefix_caching: bool = option(True, "reuse the KV blocks of equal prompt beginnings")
