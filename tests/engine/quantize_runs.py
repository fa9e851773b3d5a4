"""Runs of the quantizer for tests: without a tokenizer, interrupted where a test wants it, and what came of them."""

import hashlib
from pathlib import Path
from typing import Any

import lmdserve
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.engine.quantize.progress import Progress
from lmdserve.engine.quantize.report import read_report
from lmdserve.engine.quantize.run import TextSide, quantize

DEMO = Path(lmdserve.__file__).parent / "demo" / "model"


class Interrupted(Exception):
    """What a test ends a run with."""


def encode(text: str) -> list[int]:
    """Give each character an id that the smallest test model has."""
    return [3 + ord(character) % 128 for character in text]


def quantize_folder(source: Path, output: Path, *, interrupt_at_layer: int | None = None, **options: Any) -> Path:
    """Quantize with these options; with `interrupt_at_layer`, Interrupted is raised when that layer begins."""

    def on_progress(progress: Progress) -> None:
        if progress.layer is not None and progress.layer == interrupt_at_layer:
            raise Interrupted

    return quantize(source, QuantizeOptions(work_dir=str(output), **options), TextSide(encode, None), on_progress)


def weight_files(folder: Path) -> dict[str, str]:
    """Return a digest of every file but the report, which tells times."""
    files = [path for path in folder.iterdir() if path.stem != "report"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def relative_errors(folder: Path) -> dict[tuple[int, str], float]:
    """Return the error of each linear of each layer, from the report."""
    return {(row.layer, row.linear): row.relative_error or 0.0 for row in read_report(folder).layers}
