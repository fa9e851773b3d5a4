"""The quantizer's options, each with its name, default and help in one place; names that LMDeploy has keep its names.

No torch here: `lmdserve quantize --help` and the admin endpoint are built from this file.
"""

from dataclasses import dataclass
from typing import Literal

from ..config import Device, check_bounds, option

GroupSize = Literal[32, 64, 128, -1]
StoredDtype = Literal["auto", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What the user asked for. "auto" and None are decided when the model is known."""

    work_dir: str = option("./work_dir", "folder that the quantized checkpoint is written to")
    calib_dataset: str = option(
        "builtin",
        "text to calibrate on: builtin, wikitext2, c4, ptb, ptb_new, pileval, or a .txt, .jsonl, .json or .parquet",
    )
    calib_data_dir: str | None = option(None, "where the named data sets lie; default: the hub's cache")
    calib_samples: int = option(128, "windows of text to calibrate on; 0 only rounds to nearest", at_least=0)
    calib_seqlen: int = option(2048, "tokens in a window", at_least=2)
    batch_size: int | None = option(
        None, "windows computed at once; default: 8192 tokens of them on a GPU, one on a CPU", at_least=1
    )
    w_bits: Literal[4] = option(4, "bits of a weight")
    w_group_size: GroupSize = option(128, "inputs that share a scale; -1: all of a row")
    w_sym: bool = option(False, "one zero point, 8, for all groups")
    search_scale: bool = option(True, "search the scale of each input channel")
    search_clip: bool = option(True, "search the range of each group")
    dtype: StoredDtype = option(
        "auto", "type of scales and of what is not quantized; auto: float16, or bfloat16 for a model past its range"
    )
    device: Device = option("auto", "where to compute; auto: a GPU when there is one")
    seed: int = option(0, "of the choice of windows", at_least=0)
    resume: bool = option(False, "go on with a run that was interrupted in the same folder, if there is one")
    overwrite: bool = option(False, "replace a checkpoint that lies in the folder")
    eval_dataset: str | None = option(None, "text to measure the result on; default: the calibration text's other part")
    eval_tokens: int | None = option(
        None, "most tokens to measure on; default: 16384 on a GPU, 8192 on a CPU", at_least=2
    )
    skip_evaluation: bool = option(False, "write the report without measuring the result")

    def __post_init__(self) -> None:
        check_bounds(self)
