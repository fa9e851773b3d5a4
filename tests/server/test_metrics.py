"""/metrics as Prometheus reads it: parsed by prometheus_client's own parser, compared with what was done."""

import asyncio
import time
from typing import Any

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import FakeEngine, answer, chat_body

from lmdserve.engine.api import QueueFullError
from lmdserve.server.metrics import LoopHistogram, ServerMetrics

CHAT = "/v1/chat/completions"


async def scrape(session: aiohttp.ClientSession, url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample by name and sorted labels."""
    async with session.get(url + "/metrics") as reply:
        assert reply.status == 200
        assert reply.content_type == "text/plain"
        families = text_string_to_metric_families(await reply.text())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def requests(outcome: str, route: str = CHAT) -> tuple[str, tuple[tuple[str, str], ...]]:
    return "lmdserve_requests_total", (("outcome", outcome), ("route", route))


async def test_the_engines_numbers_are_shown(session: aiohttp.ClientSession, url: str) -> None:
    samples = await scrape(session, url)
    expected = {
        "lmdserve_requests_running": 0, "lmdserve_requests_waiting": 2, "lmdserve_kv_blocks": 100,
        "lmdserve_kv_blocks_used": 25, "lmdserve_kv_blocks_cached": 10, "lmdserve_kv_usage_ratio": 0.25,
        "lmdserve_engine_heartbeat_age_seconds": 0.25, "lmdserve_prompt_tokens_total": 1000,
        "lmdserve_generation_tokens_total": 500, "lmdserve_cached_tokens_total": 300,
        "lmdserve_preemptions_total": 1, "lmdserve_engine_steps_total": 77, "lmdserve_drafted_tokens_total": 40,
        "lmdserve_accepted_tokens_total": 30, "lmdserve_device_busy_seconds_total": 9.5,
        "lmdserve_device_idle_seconds_total": 0.5, "lmdserve_device_memory_bytes": 5e9,
    }  # fmt: skip
    assert {name: samples[name, ()] for name in expected} == expected
    assert samples["process_resident_memory_bytes", ()] > 2**20
    assert samples["lmdserve_planned_memory_bytes", (("part", "KV cache"),)] == 2e9


async def test_outcomes_and_latencies_are_counted(session: aiohttp.ClientSession, url: str, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("abc", pause_s=0.02)
    for stream in (True, False):
        async with session.post(url + CHAT, json=chat_body(stream=stream)) as reply:
            await reply.read()
    for script in ([QueueFullError("full", 1.0)], [ZeroDivisionError()]):
        engine.script = lambda request, script=script: script
        async with session.post(url + CHAT, json=chat_body()) as reply:
            assert reply.status in (429, 500)
    async with session.post(url + CHAT, json={}) as reply:
        assert reply.status == 400
    async with session.get(url + "/nowhere") as reply:
        assert reply.status == 404
    samples = await scrape(session, url)
    assert samples[requests("succeeded")] == 2
    assert samples[requests("refused")] == 1
    assert samples[requests("failed")] == 1
    assert samples[requests("invalid")] == 1
    assert samples[requests("invalid", "unknown")] == 1
    assert samples["lmdserve_time_to_first_token_seconds_count", ()] == 2
    assert 2 * 0.02 <= samples["lmdserve_time_to_first_token_seconds_sum", ()] < 0.5
    assert samples["lmdserve_inter_token_latency_seconds_count", ()] == 2 * 3
    assert 6 * 0.02 <= samples["lmdserve_inter_token_latency_seconds_sum", ()] < 1.0
    assert samples["lmdserve_request_latency_seconds_count", ()] == 2
    assert samples["lmdserve_queue_time_seconds_count", ()] == 2
    assert samples["lmdserve_queue_time_seconds_sum", ()] == pytest.approx(2 * 0.125)
    assert samples["lmdserve_http_requests_active", ()] == 1  # this scrape


async def test_openmetrics_for_those_who_ask(session: aiohttp.ClientSession, url: str) -> None:
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with session.get(url + "/metrics", headers=headers) as reply:
        assert reply.content_type == "application/openmetrics-text"
        names = {family.name for family in parse_openmetrics(await reply.text())}
    assert {"lmdserve_requests_running", "lmdserve_event_loop_lag_seconds"} <= names
    async with session.head(url + "/metrics") as reply:
        assert reply.status == 200


def test_a_histogram_counts_values_up_to_and_with_each_bound() -> None:
    histogram = LoopHistogram("seconds", "Some time", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.observe(value)
    samples: dict[str, Any] = {
        sample.labels.get("le", sample.name): sample.value for sample in histogram.family().samples
    }
    assert samples["0.1"] == 2
    assert samples["1.0"] == 4
    assert samples["+Inf"] == 5
    assert samples["seconds_sum"] == pytest.approx(8.65)
    assert samples["seconds_count"] == 5


async def test_a_blocked_loop_shows_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdserve.server.metrics.LAG_PROBE_INTERVAL_S", 0.01)
    metrics = ServerMetrics()
    task = asyncio.create_task(metrics.watch_loop_lag())
    await asyncio.sleep(0.005)
    time.sleep(0.15)  # noqa: ASYNC251  # blocking the loop is the point
    await asyncio.sleep(0.005)
    task.cancel()
    samples = {sample.labels.get("le"): sample.value for sample in metrics.loop_lag.family().samples}
    assert samples["+Inf"] - samples["0.1"] == 1
