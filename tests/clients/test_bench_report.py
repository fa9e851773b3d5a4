"""Statistics against numbers worked out by hand, and against numpy."""

import json
import random

import numpy as np
import pytest

from lmdserve.clients.bench_report import Spread, as_json, comparison, percentile, summarize, table
from lmdserve.clients.bench_run import LevelResult, Outcome, Record
from lmdserve.clients.wire import Usage


def success(started_s: float, first_s: float, gaps_s: list[float], *, num_tokens: int, num_prompt: int) -> Record:
    return Record(
        started_s=started_s,
        outcome=Outcome.SUCCESS,
        first_token_s=started_s + first_s,
        last_token_s=started_s + first_s + sum(gaps_s),
        ended_s=started_s + first_s + sum(gaps_s) + 0.1,
        gaps_s=gaps_s,
        usage=Usage(num_prompt, num_tokens, cached_tokens=1),
    )


# TTFT 100 200 400 ms; ITL 100 100 300 ms; E2EL 400 600 500 and 1300 ms; TPOT 200/2=100, 300/3=100, none for one token.
RESULT = LevelResult(
    concurrency=4,
    records=[
        success(10.0, 0.1, [0.1, 0.1], num_tokens=3, num_prompt=5),
        success(10.5, 0.2, [0.3], num_tokens=4, num_prompt=7),
        success(11.0, 0.4, [], num_tokens=1, num_prompt=9),
        Record(10.0, outcome=Outcome.SUCCESS, ended_s=11.3, usage=Usage(4, 6)),
        Record(10.0, error="HTTP 429: queue full", first_token_s=10.1, last_token_s=99.0, usage=Usage(100, 100)),
        Record(10.0, error="the engine died"),
        Record(10.0, error="the engine died"),
        Record(10.0, outcome=Outcome.LEFT, first_token_s=10.1, last_token_s=99.0),
    ],
    num_not_sent=2,
    duration_s=2.0,
)

EXPECTED = """\
============ Serving Benchmark Result ============
Successful requests:                     4
Failed requests:                         3
Successful, but without text:            1
Disconnected on purpose:                 1
Not sent in time:                        2
Maximum request concurrency:             4
Request rate configured (RPS):           2.50
Benchmark duration (s):                  2.00
Total input tokens:                      25
Total cached input tokens:               3
Total generated tokens:                  14
Request throughput (req/s):              2.00
Output token throughput (tok/s):         7.00
Total token throughput (tok/s):          19.50
---------------Time to First Token----------------
Mean TTFT (ms):                          233.33
Median TTFT (ms):                        200.00
P99 TTFT (ms):                           396.00
------Time per Output Token (excl. 1st token)-----
Mean TPOT (ms):                          100.00
Median TPOT (ms):                        100.00
P99 TPOT (ms):                           100.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           166.67
Median ITL (ms):                         100.00
P99 ITL (ms):                            296.00
----------------End-to-end Latency----------------
Mean E2EL (ms):                          700.00
Median E2EL (ms):                        550.00
P99 E2EL (ms):                           1279.00
=================================================="""


def test_the_table_holds_the_numbers_worked_out_by_hand() -> None:
    printed = table(summarize(RESULT, request_rate=2.5))
    assert [line.rstrip().strip("-") for line in printed.splitlines()] == [
        line.strip("-") for line in EXPECTED.splitlines()
    ]
    assert {len(line) for line in printed.splitlines() if line.startswith(("-", "="))} == {50}


def test_a_level_where_all_went_well_shows_no_rows_for_what_did_not_happen() -> None:
    report = summarize(LevelResult(1, RESULT.records[:1], 0, 1.0), request_rate=float("inf"))
    printed = table(report)
    assert report.is_complete
    assert all(row not in printed for row in ("without text", "on purpose", "Not sent", "rate configured"))


def test_a_level_without_a_success_says_so_instead_of_zero() -> None:
    report = summarize(LevelResult(1, [Record(0.0, error="x")], 0, 1.0), request_rate=float("inf"))
    assert "Mean TTFT (ms):                          n/a" in table(report)
    assert as_json(report)["mean_ttft_ms"] is None
    assert "n/a" in comparison([report])
    assert not report.is_complete


def test_json_has_the_same_numbers_and_the_errors() -> None:
    record = json.loads(json.dumps(as_json(summarize(RESULT, request_rate=float("inf")))))
    assert record["request_rate"] is None
    assert record["errors"] == {"the engine died": 2, "HTTP 429: queue full": 1}
    assert (record["successful_requests"], record["failed_requests"]) == (4, 3)
    assert (record["disconnected_requests"], record["not_sent_requests"]) == (1, 2)
    assert record["output_token_throughput_per_s"] == 7.0
    assert record["p99_itl_ms"] == pytest.approx(296.0)
    assert record["median_e2el_ms"] == pytest.approx(550.0)


def test_the_comparison_has_a_line_for_each_level() -> None:
    report = summarize(RESULT, request_rate=float("inf"))
    lines = comparison([report, report]).splitlines()
    assert lines[1].split() == ["4", "4", "3", "2.00", "7.00", "200.00", "396.00", "100.00", "296.00"]
    assert len(lines) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 63, 100, 1000])
def test_percentiles_are_numpys(size: int) -> None:
    rng = random.Random(size)
    values = [rng.expovariate(1.0) for _ in range(size)]
    for percent in (0, 1, 25, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-12)


def test_a_spread_is_in_milliseconds() -> None:
    assert Spread.of([0.001, 0.002, 0.006]) == Spread(pytest.approx(3.0), pytest.approx(2.0), pytest.approx(5.92))
    assert Spread.of([]) == Spread(None, None, None)
