"""Quantize a checkpoint in several ways and print a Markdown table of what each answers, against the 16-bit model.

    python benchmarks/quantize_quality.py demo
    python benchmarks/quantize_quality.py MODEL --calib-dataset TRAIN.txt --text HELD_OUT.txt --other NAME=FOLDER

`--other NAME=FOLDER` adds a checkpoint that something else made of the same model. KV caches of 8 and 4 bits are
measured with the 16-bit weights and with the default way; all rows are of the same tokens.
"""

import argparse
import dataclasses
import datetime
import platform
import sys
import tempfile
from pathlib import Path

import lmdserve
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.engine.quantize.report import QualityRow
from lmdserve.engine.torch_setup import prepare_torch
from lmdserve.server.calibration_text import load_encoders

prepare_torch()

import torch  # noqa: E402, after it was prepared

from lmdserve.engine.model_folder import resolve_model_folder  # noqa: E402
from lmdserve.engine.quantize.evaluation import LoadedModel, Reference, window_tokens  # noqa: E402
from lmdserve.engine.quantize.run import TextSide, quantize  # noqa: E402
from lmdserve.engine.quantize.text import evaluation_windows, read_text  # noqa: E402

BEST = "AWQ: scale and clip search"
WAYS = {
    "round to nearest": {"calib_samples": 0},
    "AWQ: scale search": {"search_clip": False},
    BEST: {},
}


def main() -> int:
    options = parse_arguments()
    folder = resolve_model_folder(options.model, None)
    text = TextSide(*load_encoders(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LoadedModel(folder, device=device)
    source = read_text(
        options.text, data_dir=None, split="evaluation", encode=text.encode, encode_chat=text.encode_chat
    )
    windows = evaluation_windows(source, seqlen=window_tokens(model.config), max_tokens=options.max_tokens)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {hardware}; ", end="")
    print(f"{windows.numel()} tokens of {Path(options.text).name} in windows of {windows.shape[1]}, ", end="")
    print(f"calibrated on {options.calib_samples} x {options.calib_seqlen} of {Path(options.calib_dataset).name}\n")
    print(
        "| weights | KV bits | perplexity | increase | KL divergence, nats/token | same top token |\n"
        + "|---" * 6
        + "|"
    )
    reference, row = model.reference(windows)
    show("16 bits", row)
    for policy in (8, 4):
        show("16 bits", model.measure(windows, policy, reference))
    del model
    base = QuantizeOptions(
        calib_dataset=options.calib_dataset,
        calib_samples=options.calib_samples,
        calib_seqlen=options.calib_seqlen,
        w_group_size=options.w_group_size,
        skip_evaluation=True,
        overwrite=True,
    )
    for name, changes in WAYS.items():
        with tempfile.TemporaryDirectory() as output:
            way = dataclasses.replace(base, work_dir=output, **changes)
            quantize(folder, way, text, lambda progress: None)
            show_checkpoint(name, Path(output), windows, reference, device)
    for name, other in options.other:
        show_checkpoint(name, Path(other), windows, reference, device)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a 16-bit checkpoint, or `demo`")
    parser.add_argument("--text", default="builtin", help="text to measure on")
    parser.add_argument("--max-tokens", type=int, help="default: the whole text")
    parser.add_argument("--calib-dataset", default="builtin")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--calib-seqlen", type=int, default=512)
    parser.add_argument("--w-group-size", type=int, default=128)
    parser.add_argument(
        "--other", type=lambda text: text.split("=", 1), action="append", default=[], metavar="NAME=FOLDER"
    )
    return parser.parse_args()


def show_checkpoint(name: str, folder: Path, windows: torch.Tensor, reference: Reference, device: torch.device) -> None:
    """Print the rows of a quantized checkpoint."""
    model = LoadedModel(folder, device=device)
    for policy in (0, 8, 4) if name == BEST else (0,):
        show(name, model.measure(windows, policy, reference))


def show(name: str, row: QualityRow) -> None:
    """Print a row; a number that is not finite is shown as nan."""
    perplexity, increase, divergence, agreement = (
        float("nan") if value is None else value
        for value in (row.perplexity, row.perplexity_increase, row.kl_divergence, row.top1_agreement)
    )
    print(
        f"| {name} | {row.kv_bits} | {perplexity:.3f} | {increase:+.2%} | {divergence:.5f} | {agreement:.2%} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
