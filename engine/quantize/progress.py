"""How far a run is and how long it will go on. No torch.

The shares of phases are what they took of a run at a 7B model's size on an H200; that of the evaluation, which differs
most, is the caller's to tell. The time left follows from the time that the work done so far has taken, and is unknown
before there is any.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["read", "search", "write", "evaluate", "done"]

_SHARES: dict[Phase, float] = {"read": 0.02, "search": 0.90, "write": 0.08}  # of a run without evaluation


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. `layer` is the one being worked on, from 0; None outside of the search."""

    phase: Phase
    layer: int | None
    num_layers: int
    percent: float
    seconds_left: float | None


class ProgressMeter:
    """Turns what a run has done into reports, and keeps the seconds that each phase took."""

    def __init__(self, num_layers: int, on_progress: Callable[[Progress], None], *, evaluation_share: float) -> None:
        """`evaluation_share` is what evaluating takes of the whole, 0 to 1."""
        self._num_layers = num_layers
        self._on_progress = on_progress
        self._shares = {phase: share * (1 - evaluation_share) for phase, share in _SHARES.items()}
        self._shares["evaluate"] = evaluation_share
        self._done_before = 0.0  # share of the phases that are over
        self._known_done = 0.0  # share that an earlier run did, which took this one no time
        self._phase: Phase | None = None
        self._started_s = self._phase_started_s = time.monotonic()
        self.seconds: dict[str, float] = {}

    def begin(self, phase: Phase) -> None:
        """Enter the next phase."""
        self.end()
        self._phase, self._phase_started_s = phase, time.monotonic()
        self._report(None, 0.0)

    def layer(self, layer: int, share_done: float = 0.0) -> None:
        """Report that `layer` is being worked on, and how much of it is done (0 to 1)."""
        self._report(layer, (layer + share_done) / self._num_layers)

    def skip_layers(self, num_layers: int) -> None:
        """Count layers as done that an earlier run did."""
        self._known_done = self._shares["search"] * num_layers / self._num_layers

    def part(self, share_done: float) -> None:
        """Report how much of a phase without layers is done (0 to 1)."""
        self._report(None, share_done)

    def finish(self) -> None:
        """Report that all is done."""
        self.end()
        self._on_progress(Progress("done", None, self._num_layers, 100.0, 0.0))

    def end(self) -> None:
        """Leave the phase, so that `seconds` has it."""
        if self._phase is not None:
            self.seconds[self._phase] = time.monotonic() - self._phase_started_s
            self._done_before += self._shares[self._phase]
        self._phase = None

    def _report(self, layer: int | None, share_of_phase: float) -> None:
        assert self._phase is not None
        done = self._done_before + self._shares[self._phase] * share_of_phase
        ours = done - min(self._known_done, done)
        elapsed_s = time.monotonic() - self._started_s
        seconds_left = elapsed_s / ours * (1 - done) if ours > self._shares["read"] else None
        self._on_progress(Progress(self._phase, layer, self._num_layers, min(100 * done, 99.9), seconds_left))
