"""The memory table of LMDeploy's documentation, with ours beside it: one sequence, 16-bit and 4-bit weights.

    python benchmarks/memory_table.py                  # from the plan; needs no GPU and no weights
    python benchmarks/memory_table.py --measure DIR    # and measured: writes random models below DIR, one at a time

Theirs is from docs/en/w4a16.md of github.com/InternLM/lmdeploy (TurboMind, 16-bit KV cache, GeForce RTX 4090 with
24 GB). Ours is one sequence of the whole context with the KV cache allocated, everything the process takes, in units of
10^9 bytes: the larger number, should theirs be 2^30.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from random_model import SHAPES, config_json, write_json, write_model

from lmdserve.engine.config import EngineConfig, QuantPolicy
from lmdserve.engine.memory import plan_memory
from lmdserve.engine.memory_device import MemoryDevice
from lmdserve.engine.model_config import ModelConfig

# GB by (shape, format, context); None: out of memory on their 24 GB.
LMDEPLOY_GB = {
    ("llama-2-7b", "fp16", 2048): 15.1,
    ("llama-2-7b", "awq", 2048): 6.3,
    ("llama-2-7b", "fp16", 4096): 16.2,
    ("llama-2-7b", "awq", 4096): 7.5,
    ("llama-2-13b", "fp16", 2048): None,
    ("llama-2-13b", "awq", 2048): 10.3,
    ("llama-2-13b", "fp16", 4096): None,
    ("llama-2-13b", "awq", 4096): 12.0,
}
POLICIES: tuple[QuantPolicy, ...] = (0, 8, 4)
PREFILL_TOKENS = 2048
BLOCK_TOKENS = 64
# Their GPU's compute capability and more memory than anything here needs.
PLANNED_GPU = MemoryDevice("cuda", "GeForce RTX 4090", 80 * 2**30, 80 * 2**30, (8, 9))
MEMORY_PEAK = Path(__file__).parent / "memory_peak.py"


class Cell(NamedTuple):
    """One model, one format, one context."""

    shape: str
    weight_format: str
    context: int

    def config(self, folder: Path, quant_policy: QuantPolicy) -> EngineConfig:
        """Return the options of a server for exactly one such sequence."""
        return EngineConfig(
            model=str(folder),
            quant_policy=quant_policy,
            session_len=self.context,
            max_batch_size=1,
            max_prefill_token_num=PREFILL_TOKENS,
            cache_max_entry_count=self.context // BLOCK_TOKENS,
            cache_block_seq_len=BLOCK_TOKENS,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="DIR", help="where there is room for the largest model, 26 GB")
    arguments = parser.parse_args()
    print("| model | weights | context | LMDeploy, GB | ours, KV 16 bits | KV 8 bits | KV 4 bits |")
    print("|---|---|---|---|---|---|---|")
    for shape, weight_format in dict.fromkeys((shape, weight_format) for shape, weight_format, _ in LMDEPLOY_GB):
        with folder_for(shape, weight_format, arguments.measure) as folder:
            for cell in (Cell(*key) for key in LMDEPLOY_GB if key[:2] == (shape, weight_format)):
                print_row(cell, Path(folder), is_measured=arguments.measure is not None)
    return 0


def folder_for(shape: str, weight_format: str, where: Path | None) -> "tempfile.TemporaryDirectory[str]":
    """Return a folder with config.json, and with weights when there is a place for them; gone after use."""
    folder = tempfile.TemporaryDirectory(dir=where)
    if where is None:
        write_json(Path(folder.name) / "config.json", config_json(SHAPES[shape], weight_format))
    else:
        write_model(SHAPES[shape], weight_format, Path(folder.name))
    return folder


def print_row(cell: Cell, folder: Path, *, is_measured: bool) -> None:
    theirs = LMDEPLOY_GB[cell]
    ours = [f"{planned_gb(cell, folder, policy):.1f}" for policy in POLICIES]
    if is_measured:
        taken = [measured_gb(cell, folder, policy) for policy in POLICIES]
        ours = [f"{plan} planned, {real:.1f} measured" for plan, real in zip(ours, taken, strict=True)]
    name = f"{cell.shape} | {cell.weight_format} | {cell.context}"
    print(f"| {name} | {'out of 24' if theirs is None else theirs} | {' | '.join(ours)} |", flush=True)


def planned_gb(cell: Cell, folder: Path, quant_policy: QuantPolicy) -> float:
    config = cell.config(folder, quant_policy)
    return plan_memory(config, ModelConfig.from_folder(folder), PLANNED_GPU).peak_bytes / 1e9


def measured_gb(cell: Cell, folder: Path, quant_policy: QuantPolicy) -> float:
    config = cell.config(folder, quant_policy)
    options = [
        f"--{name.replace('_', '-')}={getattr(config, name):g}"
        for name in ("quant_policy", "session_len", "max_batch_size", "max_prefill_token_num", "cache_max_entry_count")
    ]
    command = [sys.executable, str(MEMORY_PEAK), "--model", str(folder), *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(printed.splitlines()[-1])["peak_mib"]) * 2**20 / 1e9


if __name__ == "__main__":
    sys.exit(main())
