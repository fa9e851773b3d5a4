"""The hidden states of the whole calibration text between two layers, on the device or in host memory.

Owns that memory and nothing else: what is done with a batch is the caller's business. They are replaced in place while
the text passes a layer, so they exist once.
"""

from collections.abc import Iterator

import torch

from .memory import LARGEST_TEXT_SHARE


class HiddenStates:
    """Windows of hidden states, [num_windows, seqlen, hidden_size], worked on in batches of windows."""

    def __init__(
        self, windows: torch.Tensor, embedding: torch.Tensor, *, batch_size: int, device: torch.device
    ) -> None:
        """windows int64 [num_windows, seqlen]; embedding [vocab_size, hidden_size] on the CPU, in the compute type."""
        self.seqlen = windows.shape[1]
        self.batch_size = batch_size
        self._device = device
        shape = (*windows.shape, embedding.shape[1])
        where = _choose_place(windows.numel() * embedding.shape[1] * embedding.itemsize, device)
        is_pinned = where.type == "cpu" and device.type == "cuda"
        self._states = torch.empty(shape, dtype=embedding.dtype, device=where, pin_memory=is_pinned)
        for states, batch in zip(torch.split(self._states, batch_size), torch.split(windows, batch_size), strict=True):
            states.copy_(embedding.index_select(0, batch.flatten()).view(states.shape))

    def batches(self) -> Iterator[torch.Tensor]:
        """Yield each batch on the device; `replace` stores what becomes of it."""
        for batch in torch.split(self._states, self.batch_size):
            yield batch.to(self._device, non_blocking=True)

    @property
    def num_batches(self) -> int:
        return -(-len(self._states) // self.batch_size)

    def batch_rows(self) -> list[int]:
        """Return how many tokens each batch has."""
        return [len(batch) * self.seqlen for batch in torch.split(self._states, self.batch_size)]

    def replace(self, index: int, states: torch.Tensor) -> None:
        """Store the states of batch `index`."""
        self._states[index * self.batch_size :][: self.batch_size].copy_(states)

    def beginnings(self, num_windows: int, num_tokens: int) -> torch.Tensor:
        """Return the first tokens of windows spread over the text, on the device."""
        picked = torch.linspace(0, len(self._states) - 1, min(num_windows, len(self._states))).round().long()
        return self._states[picked.to(self._states.device), :num_tokens].to(self._device)


def _choose_place(num_bytes: int, device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device.index) * total
    return device if num_bytes <= LARGEST_TEXT_SHARE * min(free, allowed) else torch.device("cpu")
