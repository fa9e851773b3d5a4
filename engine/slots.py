"""What the device knows of each slot, kept in step with the sequences: block tables, RoPE frequencies, sampling state.

Owns the contents of `SlotTables` and the host's record of what was sent there. All writes are enqueued on the current
stream, behind the steps that still read the old contents.
"""

from array import array
from collections.abc import Sequence as SequenceOf
from functools import lru_cache, partial

import torch

from .device_sampler import DeviceSampler
from .layers import rotary_frequencies
from .model_config import ModelConfig
from .sequence import Sequence
from .step import Chunk
from .step_buffers import SlotTables

# Dynamic NTK gives every long prompt its own base; this many sets of frequencies (head_dim / 2 floats) are kept.
_KEPT_ROPE_BASES = 256


class SlotWriter:
    """Brings the tables up to date before a step is launched."""

    def __init__(self, config: ModelConfig, tables: SlotTables, sampler: DeviceSampler) -> None:
        self._tables = tables
        self._sampler = sampler
        self._num_columns = tables.block_tables.shape[1]
        # A sequence that lost its blocks gets a new list with the next ones, so the list itself tells who is who.
        self._known: list[array[int] | None] = [None] * len(tables.block_tables)
        self._num_sent = [0] * len(tables.block_tables)
        frequencies = partial(_frequencies_on, config, tables.frequencies.device)  # not a method: that would be a cycle
        self._frequencies = lru_cache(maxsize=_KEPT_ROPE_BASES)(frequencies)

    def update(self, chunks: SequenceOf[Chunk]) -> None:
        """Send what is new about the chunks' sequences: everything of a newcomer, else the blocks added."""
        places, block_ids = array("q"), array("q")
        for chunk in chunks:
            sequence, slot = chunk.sequence, chunk.sequence.slot
            if self._known[slot] is not sequence.block_ids:
                self._welcome(sequence)
            sent, count = self._num_sent[slot], len(sequence.block_ids)
            if sent < count:
                first = slot * self._num_columns
                places.extend(range(first + sent, first + count))
                block_ids.extend(sequence.block_ids[sent:])
                self._num_sent[slot] = count
        if places:
            self._write_blocks(places, block_ids)

    def _welcome(self, sequence: Sequence) -> None:
        self._known[sequence.slot] = sequence.block_ids
        self._num_sent[sequence.slot] = 0
        self._tables.frequencies[sequence.slot].copy_(self._frequencies(sequence.rope_base))
        self._sampler.admit(sequence)

    def _write_blocks(self, places: "array[int]", block_ids: "array[int]") -> None:
        packed = torch.frombuffer(places + block_ids, dtype=torch.int64)
        table = self._tables.block_tables.view(-1)
        if table.is_cuda:
            packed = packed.pin_memory().to(table.device, non_blocking=True)
        where, values = torch.split(packed, len(places))
        table.index_copy_(0, where, values.to(torch.int32))


def _frequencies_on(config: ModelConfig, device: torch.device, base: float) -> torch.Tensor:
    return rotary_frequencies(config.rope, base, config.head_dim).to(device)
