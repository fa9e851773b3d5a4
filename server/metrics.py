"""What /metrics shows: counters and histograms of the HTTP side, and the engines' own counters at scrape time.

Everything is counted on the event loop, so plain numbers do: no locks on the path of a token (prometheus_client's own
histogram takes one for each observation). prometheus_client does the naming rules and the text.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from lmdserve.engine.api import EngineStats

from .choices import ChoiceStream
from .serving import Servings

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
QUEUE_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
LAG_PROBE_INTERVAL_S = 0.5


class LoopHistogram:
    """A histogram that only the event loop touches."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self) -> HistogramMetricFamily:
        """Return the histogram as prometheus_client prints it: with cumulative counts."""
        names = [str(bound) for bound in self._bounds] + ["+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        return HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class ServerMetrics:
    """The HTTP side's numbers since start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()  # by route and outcome
        self.num_active = 0
        self.first_token = LoopHistogram(
            "lmdserve_time_to_first_token_seconds",
            "From a request's arrival to its first output",
            FIRST_TOKEN_BUCKETS_S,
        )
        self.inter_token = LoopHistogram(
            "lmdserve_inter_token_latency_seconds", "Between two outputs of one request", TOKEN_BUCKETS_S
        )
        self.queue = LoopHistogram(
            "lmdserve_queue_time_seconds", "From a sequence's submission to its first step", QUEUE_BUCKETS_S
        )
        self.request = LoopHistogram(
            "lmdserve_request_latency_seconds", "From arrival to the end of requests that succeeded", REQUEST_BUCKETS_S
        )
        self.loop_lag = LoopHistogram(
            "lmdserve_event_loop_lag_seconds", "How late the event loop ran a timer", LAG_BUCKETS_S
        )

    def output_clock(self, arrived_s: float, choices: Sequence[ChoiceStream]) -> Callable[[], None]:
        """Return what observes a request's outputs when it is called at each; `arrived_s` is time.perf_counter's."""
        previous_s = None
        queued = list(choices)

        def observe() -> None:
            nonlocal previous_s, queued
            now_s = time.perf_counter()
            if previous_s is None:
                self.first_token.observe(now_s - arrived_s)
            else:
                self.inter_token.observe(now_s - previous_s)
            previous_s = now_s
            if queued:
                queued = [choice for choice in queued if not self._observe_queue_time(choice)]

        return observe

    def _observe_queue_time(self, choice: ChoiceStream) -> bool:
        """Observe it if it is known; return whether it is."""
        if choice.queued_s is None:
            return False
        self.queue.observe(choice.queued_s)
        return True

    async def watch_loop_lag(self) -> None:
        """Observe for ever how late timers run: what blocks the loop delays every client."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LAG_PROBE_INTERVAL_S
            await asyncio.sleep(LAG_PROBE_INTERVAL_S)
            self.loop_lag.observe(max(0.0, loop.time() - due_s))

    def families(self) -> Iterator[Metric]:
        """Yield the metrics in prometheus_client's terms."""
        requests = CounterMetricFamily(
            "lmdserve_requests", "Requests by route and outcome", labels=["route", "outcome"]
        )
        for labels, count in self.requests.items():
            requests.add_metric(labels, count)
        yield requests
        yield GaugeMetricFamily("lmdserve_http_requests_active", "Requests being answered now", self.num_active)
        histograms = (self.first_token, self.inter_token, self.queue, self.request, self.loop_lag)
        yield from (histogram.family() for histogram in histograms)


def engine_families(stats: EngineStats) -> Iterator[Metric]:
    """Yield the engine's counters in prometheus_client's terms."""
    num_blocks = max(1, stats.num_total_blocks)
    gauges = (
        ("requests_running", "Sequences in the current batch", stats.num_running),
        ("requests_waiting", "Sequences that wait for a place in the batch", stats.num_waiting),
        ("kv_blocks", "KV blocks in all", stats.num_total_blocks),
        ("kv_blocks_used", "KV blocks held by running sequences", stats.num_used_blocks),
        ("kv_blocks_cached", "KV blocks that are free for use and hold a reusable prefix", stats.num_cached_blocks),
        ("kv_usage_ratio", "Share of the KV blocks held by running sequences", stats.num_used_blocks / num_blocks),
        ("engine_heartbeat_age_seconds", "Time since the engine last moved", stats.heartbeat_age_s),
        ("device_memory_bytes", "GPU memory that the engine holds, without the driver's", stats.device_memory_bytes),
    )
    counters = (
        ("prompt_tokens", "Prompt tokens of all requests", stats.prompt_tokens_total),
        ("generation_tokens", "Tokens generated", stats.generation_tokens_total),
        ("cached_tokens", "Prompt tokens that came from the prefix cache", stats.cached_tokens_total),
        ("preemptions", "Sequences that gave up their blocks and were computed again", stats.preemptions_total),
        ("engine_steps", "Steps of the engine", stats.steps_total),
        ("drafted_tokens", "Guessed tokens that steps checked", stats.drafted_tokens_total),
        ("accepted_tokens", "Guessed tokens that were right", stats.accepted_tokens_total),
        ("device_busy_seconds", "Time the GPU spent in steps", stats.device_busy_s_total),
        ("device_idle_seconds", "Time the GPU waited between steps, one being ready", stats.device_idle_s_total),
    )
    yield from (GaugeMetricFamily(f"lmdserve_{name}", text, value) for name, text, value in gauges)
    yield from (CounterMetricFamily(f"lmdserve_{name}", text, value) for name, text, value in counters)


def plan_family(planned_bytes: Mapping[str, int]) -> Metric:
    """Return the memory plan, a gauge for each part."""
    family = GaugeMetricFamily("lmdserve_planned_memory_bytes", "Memory as planned before loading", labels=["part"])
    for part, num_bytes in planned_bytes.items():
        family.add_metric([part], num_bytes)
    return family


class _ScrapeCollector(Collector):
    """Reads everything at scrape time."""

    def __init__(self, metrics: ServerMetrics, servings: Servings) -> None:
        self._metrics = metrics
        self._servings = servings

    def collect(self) -> Iterable[Metric]:
        yield from self._metrics.families()
        yield from engine_families(self._servings.stats())
        yield plan_family(self._servings.current.engine.info.planned_bytes)


def scrape(metrics: ServerMetrics, servings: Servings, accept: str) -> tuple[bytes, str]:
    """Return the page and its content type, in the format that the Accept header asks for."""
    registry = CollectorRegistry()
    registry.register(_ScrapeCollector(metrics, servings))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
