"""The options of `lmdserve evaluate`, each with its name, default and help in one place. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import Device, Dtype, QuantPolicy, check_bounds, option

_POLICY_OF_BITS: dict[str, QuantPolicy] = {"16": 0, "8": 8, "4": 4}


class KVBits(tuple[QuantPolicy, ...]):
    """KV policies, read from bits with commas between them, such as `16,8,4`."""

    __slots__ = ()

    def __new__(cls, value: "str | Iterable[QuantPolicy]") -> "KVBits":
        """Raise ValueError for text that names no cache there is."""
        if not isinstance(value, str):
            return super().__new__(cls, value)
        words = [word.strip() for word in value.split(",")]
        if not set(words) <= _POLICY_OF_BITS.keys():
            raise ValueError(f"{value!r} is no list of KV bits; write 16, 8 and 4, or some of them: 16,4")
        return super().__new__(cls, (_POLICY_OF_BITS[word] for word in dict.fromkeys(words)))

    def __str__(self) -> str:
        """Return the text that reads as the same."""
        return ",".join(str(policy or 16) for policy in self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What to measure, and on what."""

    against: str | None = option(
        None, "checkpoint to compare with, best the 16-bit one: folder, hub name or `demo`; default: perplexity alone"
    )
    text: str = option("builtin", "builtin, wikitext2, c4, ptb, ptb_new, or a .txt, .jsonl, .json or .parquet file")
    data_dir: str | None = option(None, "where the named data sets lie; default: the hub's cache")
    max_tokens: int | None = option(
        None, "most tokens to measure on, from the text's beginning; default: all", at_least=2
    )
    window_tokens: int | None = option(
        None,
        "tokens of a window, of which each is predicted from those before it; default: 2048, or the model's context",
        at_least=2,
    )
    kv_bits: KVBits = option(KVBits("16,8,4"), "KV caches to measure with, commas between them")
    dtype: Dtype = option("auto", "compute type; auto: the checkpoint's on a GPU, float32 on a CPU")
    device: Device = option("auto", "where to compute; auto: a GPU when there is one")

    def __post_init__(self) -> None:
        check_bounds(self)
