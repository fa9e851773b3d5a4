"""Results on their way from the device to the host: copies that are begun with a step and read when it is done.

Owns the pinned memory that they arrive in. Nothing here waits; whoever reads has waited for the step's end.
"""

from collections.abc import Sequence as SequenceOf

import torch

from .api import TokenLogprob


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Begin to copy a device tensor to pinned memory, behind the work that makes it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Begin to copy a host tensor to the device."""
    return values.pin_memory().to(device, non_blocking=True)


class LogprobReadback:
    """The logprobs of some rows' tokens and of each row's most likely ones.

    logits fp32 [num_rows, vocab_size]; token_ids int64 [num_rows]; num_top says how many of the most likely each wants.
    """

    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: SequenceOf[int]) -> None:
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(max(num_top), dim=-1)
        self._num_top = num_top
        self._token_ids = to_host(token_ids)
        self._chosen = to_host(logprobs.gather(-1, token_ids[:, None]).squeeze(-1))
        self._top_ids, self._top_values = to_host(top.indices), to_host(top.values)

    def read(self) -> list[TokenLogprob]:
        """Return one entry a row, in order."""
        rows = zip(
            self._token_ids.tolist(),
            self._chosen.tolist(),
            self._top_ids.tolist(),
            self._top_values.tolist(),
            self._num_top,
            strict=True,
        )
        return [
            TokenLogprob(token_id, chosen, tuple(zip(ids[:count], values[:count], strict=True)))
            for token_id, chosen, ids, values, count in rows
        ]
