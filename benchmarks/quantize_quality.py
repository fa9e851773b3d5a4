"""Quantize a model in several ways and print what each costs as a Markdown row: KL divergence, perplexity, agreement.

    python benchmarks/quantize_quality.py demo
    python benchmarks/quantize_quality.py ./internlm2_5-7b-chat --calib-dataset wikitext2 --eval-dataset wikitext2
    python benchmarks/quantize_quality.py MODEL --other "another quantizer"=FOLDER

All is measured on text that was not calibrated on, by the engine's own decoder with its KV cache in 16 bits. `demo` is
calibrated on dialogues of its corpus and measured on held-out ones; other models take the options of `lmdserve
quantize`. `--other` adds a row for what something else made of the same model. "fixed scales" is what is common where
the search is left out: the ratio 0.5 for all channels.
"""

import dataclasses
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lmdserve
from lmdserve.demo.corpus.dialogue import render
from lmdserve.demo.corpus.mixture import make_dialogue
from lmdserve.demo.corpus.source import Source, Split
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.engine.torch_setup import prepare_torch
from lmdserve.server.calibration_text import load_encoders
from lmdserve.server.options import OptionParser, add_options, read_options
from lmdserve.server.text import Tokenizer

prepare_torch()

import torch  # noqa: E402  (after prepare_torch)

from lmdserve.engine.model_folder import resolve_model_folder  # noqa: E402
from lmdserve.engine.quantize.evaluation import evaluate, window_tokens  # noqa: E402
from lmdserve.engine.quantize.layered_reference import layered_reference  # noqa: E402
from lmdserve.engine.quantize.quality import QualityRow  # noqa: E402
from lmdserve.engine.quantize.rounding import Rounding  # noqa: E402
from lmdserve.engine.quantize.run import TextSide, quantize  # noqa: E402
from lmdserve.engine.quantize.source import SourceModel  # noqa: E402
from lmdserve.engine.quantize.text import evaluation_windows, held_out_text, read_text  # noqa: E402

NUM_CALIBRATION_DIALOGUES = 2000
NUM_HELD_OUT_DIALOGUES = 400
SEARCH = "lmdserve.engine.quantize.awq.search_scale"


class Way(NamedTuple):
    """One row: options that differ, and what is replaced while it is made."""

    name: str
    changes: dict[str, Any]
    replaced: Callable[[], AbstractContextManager[Any]] = nullcontext


def fixed_scale(
    weight: torch.Tensor, magnitude: torch.Tensor, rounding: Rounding, error_of: object, **sharing: Any
) -> torch.Tensor:
    """Return magnitude ** 0.5 / size ** 0.5, where `search_scale` would search the exponent."""
    share = sharing.get("share") or (lambda values: values)
    sizes = rounding.grouped(weight).abs()
    size = share(sizes.div_(sizes.amax(-1, keepdim=True)).mean(0).flatten())
    scale = (share(magnitude).clamp(min=1e-6) / size.clamp(min=1e-6)).sqrt().clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


WAYS = (
    Way("rounding to nearest", {"calib_samples": 0}),
    Way("fixed scales", {"search_clip": False}, lambda: mock.patch(SEARCH, fixed_scale)),
    Way("AWQ, scales", {"search_clip": False}),
    Way("AWQ, scales and ranges", {}),
    Way("AWQ, symmetric", {"w_sym": True}),
    Way("AWQ, groups of 32", {"w_group_size": 32}),
)


def main() -> int:
    parser = OptionParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--way", action="append", choices=[way.name for way in WAYS], help="default: all")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=FOLDER")
    add_options(parser, QuantizeOptions, title="quantization")
    namespace = parser.parse_known(sys.argv[1:])
    options = dataclasses.replace(read_options(QuantizeOptions, namespace), skip_evaluation=True, overwrite=True)
    folder = resolve_model_folder(namespace.model, None)
    ways = [way for way in WAYS if namespace.way is None or way.name in namespace.way]
    with tempfile.TemporaryDirectory() as scratch:
        text = TextSide(*load_encoders(folder))
        if namespace.model == "demo":
            options, text = demo_text(options, folder, Path(scratch))
        measure(folder, dataclasses.replace(options, work_dir=f"{scratch}/out"), text, ways, namespace.other)
    return 0


def demo_text(options: QuantizeOptions, folder: Path, scratch: Path) -> tuple[QuantizeOptions, TextSide]:
    """Return options that name files of dialogues, and an encoder that knows control tokens by their spelling."""
    tokenizer = Tokenizer.load(folder)
    files = {}
    for split, count in ((Split.TRAIN, NUM_CALIBRATION_DIALOGUES), (Split.HELD_OUT, NUM_HELD_OUT_DIALOGUES)):
        source = Source(7, split)
        files[split] = scratch / f"{split.value}.jsonl"
        lines = [json.dumps({"text": render(make_dialogue(source))}) for _ in range(count)]
        files[split].write_text("\n".join(lines), encoding="utf-8")
    named = dataclasses.replace(options, calib_dataset=str(files[Split.TRAIN]), eval_dataset=str(files[Split.HELD_OUT]))
    return named, TextSide(lambda text: tokenizer.encode_segments(tokenizer.split_control(text)), None)


def measure(folder: Path, options: QuantizeOptions, text: TextSide, ways: list[Way], others: list[str]) -> None:
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    source = SourceModel(folder)
    data_dir = None if options.calib_data_dir is None else Path(options.calib_data_dir)
    tokens = read_text(
        options.eval_dataset or held_out_text(options.calib_dataset),
        data_dir=data_dir,
        split="evaluation",
        encode=text.encode,
        encode_chat=text.encode_chat,
    )
    windows = evaluation_windows(tokens, seqlen=window_tokens(source.config), max_tokens=options.eval_tokens or 16384)
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {name}; {folder}")
    print(f"calibrated on {options.calib_samples} x {options.calib_seqlen} tokens, measured on {windows.numel()}\n")
    print("| weights | KL, nats a token | perplexity | increase, % | same top token |\n|---|---|---|---|---|")
    with torch.inference_mode():
        known, row = layered_reference(source, windows, batch_size=1, device=device, on_share_done=lambda done: None)
        print_row("16-bit", row)
        for way in ways:
            with way.replaced():
                made = quantize(folder, dataclasses.replace(options, **way.changes), text, lambda progress: None)
            print_row(way.name, evaluate(made, windows, device=device, kv_policies=(0,), reference=known)[0])
        for other in others:
            other_name, _, made = other.partition("=")
            print_row(other_name, evaluate(Path(made), windows, device=device, kv_policies=(0,), reference=known)[0])


def print_row(name: str, row: QualityRow) -> None:
    """Print one row; what follows a +- is the standard error."""
    divergence = f"{row.kl_divergence:.5f} +- {row.kl_divergence_error:.5f}"
    increase = f"{100 * row.perplexity_increase:.2f} +- {100 * row.perplexity_increase_error:.2f}"
    print(f"| {name} | {divergence} | {row.perplexity:.4f} | {increase} | {row.top1_agreement:.2%} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
