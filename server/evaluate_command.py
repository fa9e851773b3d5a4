"""`lmdserve evaluate A [--against B]`: what a checkpoint answers, measured by the kernels that would serve it.

Owns the command's options, checks and output. How it is measured is `engine/quantize/evaluation.py`'s business.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import to_builtins

from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize.evaluate_options import EvaluateOptions
from lmdserve.engine.quantize.quality import NUM_OWN_CELLS, QUALITY_HEAD, QualityRow, quality_cells
from lmdserve.engine.quantize.report import aligned
from lmdserve.engine.torch_setup import prepare_torch

from .options import OptionParser, add_options, read_options

if TYPE_CHECKING:
    import torch

Encode = Callable[[str], list[int]]


def evaluate(arguments: Sequence[str]) -> int:
    """`lmdserve evaluate A [--against B] [--text T]`."""
    parser = OptionParser(prog="lmdserve evaluate", usage="lmdserve evaluate A [--against B] [--text T] [options]")
    parser.add_argument("model", metavar="A", help="local folder, hub name, or `demo` for the model in the package")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    add_options(parser, EvaluateOptions, title="evaluation")
    namespace = parser.parse_known(arguments)
    options = read_options(EvaluateOptions, namespace)
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s")
    prepare_torch()
    from lmdserve.engine.model_folder import resolve_model_folder

    folder = resolve_model_folder(namespace.model, None)
    against = None if options.against is None else resolve_model_folder(options.against, None)
    windows = _windows(folder, against, options)
    measured = _measure(folder, against, windows, options, shows_progress=not namespace.json and sys.stderr.isatty())
    print(_as_json(measured, windows, options) if namespace.json else _as_table(measured, windows, options))
    return 0


def _windows(folder: Path, against: Path | None, options: EvaluateOptions) -> "torch.Tensor":
    """Return the text as windows, after what can be checked before any weights are read."""
    from lmdserve.engine.model_config import ModelConfig
    from lmdserve.engine.quantize.evaluation import window_tokens
    from lmdserve.engine.quantize.text import evaluation_windows, read_text

    from .calibration_text import load_encoders

    config, encoders = ModelConfig.from_folder(folder), load_encoders(folder)
    seqlen, encode = window_tokens(config), encoders.encode
    if against is not None:
        other = ModelConfig.from_folder(against)
        if other.vocab_size != config.vocab_size:
            raise ConfigError(
                f"{folder} has {config.vocab_size} tokens and {against} has {other.vocab_size}; only models of one "
                "vocabulary can be compared"
            )
        seqlen = min(seqlen, window_tokens(other))
        encode = _agreed(encode, load_encoders(against).encode, f"the tokenizers of {folder} and {against}")
    source = read_text(
        options.text,
        data_dir=None if options.data_dir is None else Path(options.data_dir).expanduser(),
        split="evaluation",
        encode=encode,
        encode_chat=encoders.encode_chat,
    )
    return evaluation_windows(source, seqlen=options.window_tokens or seqlen, max_tokens=options.max_tokens)


def _agreed(encode: Encode, other: Encode, whose: str) -> Encode:
    """Return a function that encodes with both tokenizers and raises ConfigError where they differ."""

    def agreed(text: str) -> list[int]:
        token_ids = encode(text)
        if token_ids != other(text):
            raise ConfigError(
                f"{whose} turn this text into different tokens; only models of one tokenizer can be compared"
            )
        return token_ids

    return agreed


def _measure(
    folder: Path, against: Path | None, windows: "torch.Tensor", options: EvaluateOptions, *, shows_progress: bool
) -> "list[tuple[str, QualityRow]]":
    """Return the name of each measured model and its row, those of the model compared with first."""
    import torch

    from lmdserve.engine.quantize.comparison import compare
    from lmdserve.engine.quantize.evaluation import evaluate as run

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda and torch finds no CUDA device; use --device cpu, or install CUDA's torch")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    on_progress = _print_percent if shows_progress else None
    if against is None:
        rows = run(
            folder, windows, device=device, dtype=options.dtype, kv_policies=options.kv_bits, on_progress=on_progress
        )
        return [(_name(folder), row) for row in rows]
    rows = compare(
        against,
        folder,
        windows,
        device=device,
        dtype=options.dtype,
        kv_policies=options.kv_bits,
        on_progress=on_progress,
    )
    num_own = len(options.kv_bits)
    return [(_name(against), row) for row in rows[:-num_own]] + [(_name(folder), row) for row in rows[-num_own:]]


def _name(folder: Path) -> str:
    return folder.resolve().name


def _print_percent(share: float) -> None:
    print(f"\r{share:4.0%}", end="" if share < 1 else "\r    \r", file=sys.stderr, flush=True)


def _as_json(measured: "list[tuple[str, QualityRow]]", windows: "torch.Tensor", options: EvaluateOptions) -> str:
    """Return an object with a row for each model and KV cache; a number that was not finite is null."""
    return json.dumps(
        {
            "text": options.text,
            "num_tokens": windows.numel(),
            "window_tokens": windows.shape[1],
            "rows": [{"model": name} | to_builtins(row) for name, row in measured],
        },
        ensure_ascii=False,
        indent=1,
    )


def _as_table(measured: "list[tuple[str, QualityRow]]", windows: "torch.Tensor", options: EvaluateOptions) -> str:
    rows = [("model", *QUALITY_HEAD), *((name, *quality_cells(row)) for name, row in measured)]
    if options.against is None:
        rows = [row[: 1 + NUM_OWN_CELLS] for row in rows]
    what = f"{windows.numel()} tokens of {options.text}, in windows of {windows.shape[1]}"
    return f"{what}:\n{aligned(rows)}"
