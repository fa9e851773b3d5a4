"""The options of `lmdserve convert`, each with its name, default and help in one place. No torch here."""

from dataclasses import dataclass
from typing import Literal

from .config import Dtype, option

WeightFormat = Literal["awq", "gptq", "compressed-tensors", "hf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to make of a checkpoint."""

    to: WeightFormat | None = option(
        None, "format to write: 4-bit codes as they are in another format, or hf for the 16-bit weights they stand for"
    )
    dtype: Dtype = option("auto", "type of all weights with --to hf; auto: what config.json says, other tensors kept")
