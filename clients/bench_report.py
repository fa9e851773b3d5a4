"""From the records of a benchmark to numbers, the table that vLLM's users know, and JSON.

TTFT is the time to the first token; TPOT the time per token after the first, by the server's count; ITL the gaps
between chunks that carried tokens; E2EL the whole answer. All of them are over successful requests.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .bench_run import LevelResult, Outcome, Record
from .wire import Json

_TABLE_WIDTH = 50
_SECTIONS = {
    "TTFT": "Time to First Token",
    "TPOT": "Time per Output Token (excl. 1st token)",
    "ITL": "Inter-token Latency",
    "E2EL": "End-to-end Latency",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median and 99th percentile, in milliseconds; None when there was nothing to measure."""

    mean_ms: float | None
    median_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, values_s: Sequence[float]) -> "Spread":
        """Summarize durations in seconds."""
        if not values_s:
            return cls(None, None, None)
        return cls(statistics.fmean(values_s) * 1000, percentile(values_s, 50) * 1000, percentile(values_s, 99) * 1000)


@dataclass(frozen=True, slots=True)
class LevelReport:
    """The numbers of one level of concurrency."""

    concurrency: int
    request_rate: float
    num_successes: int
    num_failures: int
    num_without_text: int  # successes whose tokens all had no text: no TTFT, no TPOT
    num_left: int
    num_not_sent: int
    duration_s: float
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    latencies: dict[str, Spread]  # by the keys of _SECTIONS
    errors: dict[str, int]  # message -> how often, most frequent first

    @property
    def is_complete(self) -> bool:
        """Whether every request went as planned."""
        return self.num_failures == 0 and self.num_not_sent == 0

    def per_second(self, count: int) -> float:
        """Return a rate over the whole level."""
        return count / self.duration_s if self.duration_s > 0 else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile with linear interpolation between the two nearest ranks (numpy's default)."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summarize(result: LevelResult, *, request_rate: float) -> LevelReport:
    """Return the numbers of one level. Tokens are those of successful requests."""
    successes = [record for record in result.records if record.outcome is Outcome.SUCCESS]
    failures = [record for record in result.records if record.outcome is Outcome.FAILURE]
    usages = [record.usage for record in successes if record.usage is not None]
    return LevelReport(
        concurrency=result.concurrency,
        request_rate=request_rate,
        num_successes=len(successes),
        num_failures=len(failures),
        num_without_text=sum(record.first_token_s is None for record in successes),
        num_left=len(result.records) - len(successes) - len(failures),
        num_not_sent=result.num_not_sent,
        duration_s=result.duration_s,
        num_input_tokens=sum(usage.prompt_tokens for usage in usages),
        num_cached_tokens=sum(usage.cached_tokens for usage in usages),
        num_output_tokens=sum(usage.completion_tokens for usage in usages),
        latencies=_latencies(successes),
        errors=dict(Counter(str(record.error) for record in failures).most_common()),
    )


def _latencies(successes: Iterable[Record]) -> dict[str, Spread]:
    values_s: dict[str, list[float]] = {name: [] for name in _SECTIONS}
    for record in successes:
        assert record.usage is not None
        assert record.ended_s is not None
        values_s["E2EL"].append(record.ended_s - record.started_s)
        values_s["ITL"] += record.gaps_s
        if record.first_token_s is None or record.last_token_s is None:
            continue
        values_s["TTFT"].append(record.first_token_s - record.started_s)
        if record.usage.completion_tokens > 1:
            decode_s = record.last_token_s - record.first_token_s
            values_s["TPOT"].append(decode_s / (record.usage.completion_tokens - 1))
    return {name: Spread.of(values) for name, values in values_s.items()}


def table(report: LevelReport) -> str:
    """Return the level as vLLM's "Serving Benchmark Result"."""
    lines = [
        f"{' Serving Benchmark Result ':=^{_TABLE_WIDTH}}",
        _row("Successful requests:", report.num_successes),
        _row("Failed requests:", report.num_failures),
    ]
    if report.num_without_text:
        lines.append(_row("Successful, but without text:", report.num_without_text))
    if report.num_left:
        lines.append(_row("Disconnected on purpose:", report.num_left))
    if report.num_not_sent:
        lines.append(_row("Not sent in time:", report.num_not_sent))
    lines.append(_row("Maximum request concurrency:", report.concurrency))
    if report.request_rate < math.inf:
        lines.append(_row("Request rate configured (RPS):", report.request_rate))
    lines += [
        _row("Benchmark duration (s):", report.duration_s),
        _row("Total input tokens:", report.num_input_tokens),
        _row("Total cached input tokens:", report.num_cached_tokens),
        _row("Total generated tokens:", report.num_output_tokens),
        _row("Request throughput (req/s):", report.per_second(report.num_successes)),
        _row("Output token throughput (tok/s):", report.per_second(report.num_output_tokens)),
        _row(
            "Total token throughput (tok/s):",
            report.per_second(report.num_input_tokens + report.num_output_tokens),
        ),
    ]
    for name, title in _SECTIONS.items():
        spread = report.latencies[name]
        lines += [
            f"{title:-^{_TABLE_WIDTH}}",
            _row(f"Mean {name} (ms):", spread.mean_ms),
            _row(f"Median {name} (ms):", spread.median_ms),
            _row(f"P99 {name} (ms):", spread.p99_ms),
        ]
    return "\n".join([*lines, "=" * _TABLE_WIDTH])


def comparison(reports: Sequence[LevelReport]) -> str:
    """Return one line a level, to see how the server scales."""
    lines = [
        f"{'concurrency':>11} {'ok':>6} {'failed':>6} {'req/s':>8} {'out tok/s':>10} {'TTFT p50':>9} {'TTFT p99':>9} "
        f"{'TPOT p50':>9} {'ITL p99':>9}  (ms)"
    ]
    for report in reports:
        ttft, tpot, itl = (report.latencies[name] for name in ("TTFT", "TPOT", "ITL"))
        lines.append(
            f"{report.concurrency:>11} {report.num_successes:>6} {report.num_failures:>6} "
            f"{report.per_second(report.num_successes):>8.2f} {report.per_second(report.num_output_tokens):>10.2f} "
            f"{_number(ttft.median_ms):>9} {_number(ttft.p99_ms):>9} "
            f"{_number(tpot.median_ms):>9} {_number(itl.p99_ms):>9}"
        )
    return "\n".join(lines)


def as_json(report: LevelReport) -> Json:
    """Return the level for a file; names carry their units."""
    latencies = {
        f"{statistic}_{name.lower()}_ms": value
        for name, spread in report.latencies.items()
        for statistic, value in (("mean", spread.mean_ms), ("median", spread.median_ms), ("p99", spread.p99_ms))
    }
    return {
        "concurrency": report.concurrency,
        "request_rate": report.request_rate if report.request_rate < math.inf else None,
        "successful_requests": report.num_successes,
        "requests_without_text": report.num_without_text,
        "failed_requests": report.num_failures,
        "disconnected_requests": report.num_left,
        "not_sent_requests": report.num_not_sent,
        "duration_s": report.duration_s,
        "total_input_tokens": report.num_input_tokens,
        "total_cached_input_tokens": report.num_cached_tokens,
        "total_generated_tokens": report.num_output_tokens,
        "request_throughput_per_s": report.per_second(report.num_successes),
        "output_token_throughput_per_s": report.per_second(report.num_output_tokens),
        "total_token_throughput_per_s": report.per_second(report.num_input_tokens + report.num_output_tokens),
        **latencies,
        "errors": report.errors,
    }


def _row(label: str, value: float | None) -> str:
    return f"{label:<40} {value if isinstance(value, int) else _number(value):<10}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
