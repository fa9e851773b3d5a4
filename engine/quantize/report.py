"""What a quantized checkpoint cost, as report.json and report.html beside its weights, and as a table for a terminal.

Owns the shape of the report. Who measures is `evaluation.py` and the run itself. No torch: a server reads reports too.
"""

from pathlib import Path

import msgspec

from ..api import ConfigError
from .quality import QUALITY_HEAD, Quality, quality_cells
from .report_page import report_page

REPORT_NAME = "report.json"
PAGE_NAME = "report.html"


class FormatOfWeights(msgspec.Struct, frozen=True, kw_only=True):
    """How the weights are stored."""

    method: str
    bits: int
    group_size: int
    symmetric: bool


class SizeBytes(msgspec.Struct, frozen=True, kw_only=True):
    """All weight files together."""

    before: int
    after: int


class LayerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One linear: the error of its output relative to that output, and why it has other bits, if it has."""

    layer: int
    linear: str
    relative_error: float | None
    bits: int
    reason: str | None = None


class PeakMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The most memory that the run took; device is 0 on a CPU."""

    device: int
    host: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the quantizer; `quality` is null when it was not asked for."""

    source: str
    output: str
    created: str  # ISO 8601, UTC
    format: FormatOfWeights
    size_bytes: SizeBytes
    layers: list[LayerRow]
    quality: Quality | None
    time_s: dict[str, float]
    peak_memory_bytes: PeakMemory


def write_report(folder: Path, report: Report) -> Path:
    """Write report.json and report.html into a checkpoint's folder; return the path of the first."""
    path = folder / REPORT_NAME
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    (folder / PAGE_NAME).write_text(report_page(msgspec.to_builtins(report), report.quality), encoding="utf-8")
    return path


def read_report(folder: Path) -> Report:
    """Return the report of a checkpoint folder; ConfigError when there is none, or none of ours."""
    path = folder / REPORT_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no {REPORT_NAME}; `lmdserve quantize` writes one with every checkpoint, and "
            "`lmdserve evaluate` measures any two"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no report of lmdserve ({error}); quantize the model again") from None


def report_table(report: Report) -> str:
    """Return the report as lines of text: size, quality, the layers with the largest error, time and memory."""
    before, after = report.size_bytes.before, report.size_bytes.after
    kind = report.format
    parts = [
        f"{report.source} -> {report.output}",
        f"{kind.method}, {kind.bits} bits, {_groups(kind.group_size)}, "
        f"{'symmetric' if kind.symmetric else 'asymmetric'}: {_size(before)} -> {_size(after)} "
        f"({after / max(1, before):.0%})",
    ]
    if report.quality is not None:
        parts += ["", quality_table(report.quality)]
    worst = sorted(report.layers, key=lambda row: -(row.relative_error or 0.0))[:_NUM_LAYERS_SHOWN]
    errors = [(f"layer {row.layer} {row.linear}", _scientific(row.relative_error)) for row in worst]
    if errors:
        parts += ["", "largest errors of a linear's output:", aligned([("linear", "relative error"), *errors])]
    kept = [row for row in report.layers if row.reason]
    if kept:
        parts += ["", *(f"layer {row.layer} {row.linear} has {row.bits} bits: {row.reason}" for row in kept)]
    times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.time_s.items())
    peak = report.peak_memory_bytes
    parts += ["", f"time: {times}", f"peak memory: device {_size(peak.device)}, host {_size(peak.host)}"]
    return "\n".join(parts)


def quality_table(quality: Quality) -> str:
    """Return the rows of a measurement as a table, with what was measured above it."""
    table = aligned([QUALITY_HEAD, *map(quality_cells, quality.rows)])
    return f"measured on {quality.num_tokens} tokens of {quality.text}:\n{table}"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Return rows of cells as lines, columns two spaces apart, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


_NUM_LAYERS_SHOWN = 5


def _groups(group_size: int) -> str:
    return "one group a row" if group_size == -1 else f"groups of {group_size}"


def _scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
