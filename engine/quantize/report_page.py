"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Owns the look. Every name and reason is escaped. Takes the report as plain dictionaries, as report.json has it.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .quality import QUALITY_HEAD, Quality, quality_cells

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#3b78c4;--muted:#777}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem;margin-bottom:0}h2{font-size:1.1rem;margin-top:2rem}p.sub{color:var(--muted);margin-top:.2rem}
table{border-collapse:collapse}th,td{padding:.25rem .8rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}th{font-weight:600}td.text{text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:var(--muted)}dd{margin:0}
td.heat{font-variant-numeric:tabular-nums;font-size:13px}code{font-size:.95em;overflow-wrap:anywhere}
"""


def report_page(report: Mapping[str, Any], quality: Quality | None) -> str:
    """Return the page; `quality` is the report's."""
    kind, size = report["format"], report["size_bytes"]
    groups = "one group a row" if kind["group_size"] == -1 else f"groups of {kind['group_size']}"
    symmetry = "symmetric" if kind["symmetric"] else "asymmetric"
    facts = [
        ("Source", f"<code>{escape(report['source'])}</code>"),
        ("Output", f"<code>{escape(report['output'])}</code>"),
        ("Format", escape(f"{kind['method']}, {kind['bits']} bits, {groups}, {symmetry}")),
        ("Size", f"{_size(size['before'])} before, {_size(size['after'])} after"),
        ("Time", ", ".join(f"{escape(phase)} {seconds:.1f} s" for phase, seconds in report["time_s"].items())),
        ("Peak memory", ", ".join(f"{escape(k)} {_size(v)}" for k, v in report["peak_memory_bytes"].items())),
    ]
    name = report["output"].rstrip("/").rsplit("/", 1)[-1]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(name)}: quantization report</title><style>{_STYLE}</style></head><body>",
        f'<h1>{escape(name)}</h1><p class="sub">Quantization report, {escape(report["created"])}</p>',
        "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>",
    ]
    if quality is not None:
        parts += _quality(quality)
    if report["layers"]:
        parts += _layers(report["layers"])
    return "\n".join([*parts, "</body></html>", ""])


def _quality(quality: Quality) -> list[str]:
    return [
        f"<h2>Quality</h2><p>On {quality.num_tokens} tokens of <code>{escape(quality.text)}</code>, against the "
        "16-bit model with a 16-bit KV cache.</p>",
        _table(QUALITY_HEAD, (_cells(map(escape, quality_cells(row))) for row in quality.rows)),
    ]


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of layers by linears, darker where the error is larger, and what was kept in more bits."""
    linears = list(dict.fromkeys(row["linear"] for row in layers))
    errors = {(row["layer"], row["linear"]): row for row in layers}
    largest = max((row["relative_error"] or 0.0 for row in layers), default=0.0)
    body = (
        f"<td>{layer}</td>" + "".join(_heat(errors.get((layer, linear)), largest) for linear in linears)
        for layer in sorted({row["layer"] for row in layers})
    )
    parts = [
        "<h2>Error by layer</h2><p>Error of each linear's output relative to that output.</p>",
        _table(("Layer", *linears), body),
    ]
    kept = [row for row in layers if row["reason"]]
    if kept:
        rows = ((str(row["layer"]), escape(row["linear"]), str(row["bits"]), escape(row["reason"])) for row in kept)
        parts += ["<h2>Kept in more bits</h2>", _table(("Layer", "Linear", "Bits", "Reason"), map(_cells, rows))]
    return parts


def _heat(row: Mapping[str, Any] | None, largest: float) -> str:
    if row is None:
        return "<td></td>"
    if row["relative_error"] is None:
        return f'<td class="heat">{row["bits"]}-bit</td>'
    strength = row["relative_error"] / largest if largest > 0 else 0.0
    shade = f"background:color-mix(in srgb,var(--bar) {60 * strength:.0f}%,transparent)"
    return f'<td class="heat" style="{shade}">{row["relative_error"]:.1e}</td>'


def _cells(row: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in row)


def _table(head: Iterable[str], body: Iterable[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    rows = "".join(f"<tr>{cells}</tr>\n" for cells in body)
    return f"<table><thead><tr>{names}</tr></thead><tbody>\n{rows}</tbody></table>"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
