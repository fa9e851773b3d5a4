"""The quality that a checkpoint must have before it serves anybody, held against its own report."""

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize.quality import with_error
from lmdserve.engine.quantize.report import REPORT_NAME, read_report

from .admin_errors import GateError, NoReportError


class Gate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on what quantization may have cost, against the 16-bit model on held-out text."""

    max_kl: Annotated[float, Meta(ge=0, description="most KL divergence, nats a token")] | None = None
    max_ppl_increase: (
        Annotated[float, Meta(ge=0, description="most increase of perplexity, as a share: 0.02 is 2 %")] | None
    ) = None

    @property
    def is_open(self) -> bool:
        """Whether it lets everything pass."""
        return self.max_kl is None and self.max_ppl_increase is None


def measured_quality(folder: Path, kv_bits: int) -> dict[str, Any] | None:
    """Return what the report in `folder` says of its weights with a KV cache of these bits; None if nothing.

    Raises NoReportError for a report that cannot be read.
    """
    if not (folder / REPORT_NAME).is_file():
        return None
    try:
        report = read_report(folder)
    except ConfigError as error:
        raise NoReportError(str(error), param="gate") from error
    rows = [] if report.quality is None else report.quality.rows
    wanted = [row for row in rows if row.weights != "16-bit" and row.kv_bits == kv_bits]
    return to_builtins(wanted[0]) if wanted else None


def check_gate(gate: Gate | None, quality: dict[str, Any] | None) -> None:
    """Return when the measured quality passes; raise GateError with the numbers, NoReportError without any."""
    if gate is None or gate.is_open:
        return
    if quality is None:
        raise NoReportError(
            f"gate: the checkpoint has no {REPORT_NAME} with a measurement for this server's KV cache; quantize it "
            "with an evaluation, or leave the gate out",
            param="gate",
        )
    limits = (
        ("the KL divergence", "kl_divergence", gate.max_kl),
        ("the increase of perplexity", "perplexity_increase", gate.max_ppl_increase),
    )
    failures = [
        f"{what} is {with_error(quality[name], quality[f'{name}_error'], '.4g', '.1g')} and may be {limit:g}"
        for what, name, limit in limits
        if limit is not None and (quality[name] is None or quality[name] > limit)
    ]
    if failures:
        raise GateError(f"gate: {' and '.join(failures)}; the checkpoint does not serve", param="gate")
