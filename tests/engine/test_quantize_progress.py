"""The bar never goes back, and the time left is what the work done so far has taken, layers of an earlier run aside."""

import pytest

from lmdserve.engine.quantize import progress as progress_module
from lmdserve.engine.quantize.progress import Progress, ProgressMeter


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def run_layers(meter: ProgressMeter, clock: Clock, layers: range, seconds: float) -> None:
    for layer in layers:
        meter.layer(layer)
        clock.now_s += seconds


def test_a_run_from_its_beginning(clock: Clock) -> None:
    reports: list[Progress] = []
    meter = ProgressMeter(10, reports.append, evaluation_share=0.2)
    meter.begin("read")
    meter.begin("search")
    run_layers(meter, clock, range(10), 7.0)
    assert reports[-1].layer == 9
    done = 0.8 * (0.02 + 0.90 * 0.9)
    assert reports[-1].percent == pytest.approx(100 * done)
    assert reports[-1].seconds_left == pytest.approx(63 / done * (1 - done))
    meter.begin("write")
    meter.part(0.5)
    meter.begin("evaluate")
    meter.end()
    meter.finish()
    percents = [report.percent for report in reports]
    assert percents == sorted(percents)
    assert reports[-1] == Progress("done", None, 10, 100.0, 0.0)
    assert meter.seconds == {"read": 0.0, "search": 70.0, "write": 0.0, "evaluate": 0.0}


def test_layers_of_an_earlier_run_took_this_one_no_time(clock: Clock) -> None:
    reports: list[Progress] = []
    meter = ProgressMeter(10, reports.append, evaluation_share=0.0)
    meter.begin("read")
    meter.begin("search")
    meter.skip_layers(8)
    run_layers(meter, clock, range(8), 0.1)
    assert all(report.seconds_left is None for report in reports), "nothing of its own is done yet"
    run_layers(meter, clock, range(8, 10), 7.0)
    done = 0.02 + 0.90 * 0.9
    assert reports[-1].percent == pytest.approx(100 * done)
    assert reports[-1].seconds_left == pytest.approx(7.8 / (done - 0.90 * 0.8) * (1 - done))
