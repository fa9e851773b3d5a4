"""Decode steps as CUDA graphs: captured once for a few numbers of rows, replayed with one call each.

Owns the graphs and which numbers of rows there are. A replay reads its rows from the addresses the capture saw: the
beginning of the runner's input tensor. Rows that only fill up a graph have no context, so they change nothing.
"""

from bisect import bisect_left

import torch

from .models.fused_decoder import FusedDecoder, FusedStep, StepMemory
from .step_inputs import NO_POSITION, aligned_count

# Few enough to capture in a second, close enough that padding stays below a third; beyond 64 rows the products' tiles
# have 64 columns or more, so padding within a tile is free.
_ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_INPUTS_PER_ROW = 4


class DecodeGraphs:
    """The graphs of one decoder. Captures and replays happen on the current stream's device, one at a time."""

    def __init__(self, decoder: FusedDecoder, memory: StepMemory, inputs: torch.Tensor, *, max_rows: int) -> None:
        self._decoder = decoder
        self._memory = memory
        self._inputs = inputs  # int32, at least 4 * max_rows: token ids, positions, slots, context lengths
        self._row_counts = graph_row_counts(max_rows)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def capture_all(self, *, max_draft_rows: int) -> None:
        """Capture all graphs, largest first, so that the smaller ones reuse its memory.

        Steps with drafts have graphs of their own, for up to `max_draft_rows` rows.
        """
        for num_rows in reversed(self._row_counts):
            self._capture_padding(num_rows, has_drafts=False)
        num_counts = bisect_left(self._row_counts, max_draft_rows) + 1 if max_draft_rows else 0
        for num_rows in reversed(self._row_counts[:num_counts]):
            self._capture_padding(num_rows, has_drafts=True)

    def padded_rows(self, num_rows: int) -> int | None:
        """Return the rows of the smallest graph that takes `num_rows`, None when there is none."""
        index = bisect_left(self._row_counts, num_rows)
        return self._row_counts[index] if index < len(self._row_counts) else None

    def replay(self, num_rows: int, *, has_drafts: bool) -> torch.Tensor:
        """Compute the step whose rows lie in the input tensor; return all its logits."""
        self._graph(num_rows, has_drafts=has_drafts).replay()
        return self._memory.buffers.logits[:num_rows]

    def _capture_padding(self, num_rows: int, *, has_drafts: bool) -> None:
        """Capture a graph on rows that are nobody's, laid out for this number of rows."""
        step = self._step(num_rows, has_drafts=has_drafts)
        self._inputs.zero_()
        step.positions.fill_(NO_POSITION)
        self._graph(num_rows, has_drafts=has_drafts)

    def _graph(self, num_rows: int, *, has_drafts: bool) -> torch.cuda.CUDAGraph:
        graph = self._graphs.get((num_rows, has_drafts))
        if graph is None:
            graph = self._graphs[num_rows, has_drafts] = self._capture(num_rows, has_drafts=has_drafts)
        return graph

    def _capture(self, num_rows: int, *, has_drafts: bool) -> torch.cuda.CUDAGraph:
        """Capture with the input tensor as it is, after a run that compiles what is new.

        The run before the capture appends where the inputs say, as the replay that follows will.
        """
        step = self._step(num_rows, has_drafts=has_drafts)
        self._compute(step)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        # "thread_local": another engine of this process may compute on its own thread meanwhile.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            self._compute(step)
        return graph

    def _compute(self, step: FusedStep) -> None:
        self._decoder.forward(step, self._memory)
        self._decoder.logits(step, None, self._memory)

    def _step(self, num_rows: int, *, has_drafts: bool) -> FusedStep:
        stride = aligned_count(num_rows)
        parts = torch.split(self._inputs[: _INPUTS_PER_ROW * stride], stride)
        token_ids, positions, slots, context_lens = (part[:num_rows] for part in parts)
        return FusedStep(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            context_lens=context_lens,
            has_drafts=has_drafts,
            is_deterministic=False,
            prefill=None,
        )


def graph_row_counts(max_rows: int) -> list[int]:
    """Return the numbers of rows that graphs are captured for; the last is `max_rows`, or 256 when that is less."""
    largest = min(max_rows, _ROW_COUNTS[-1])
    return [count for count in _ROW_COUNTS if count < largest] + [largest]
