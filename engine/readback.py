"""Results on their way from the device to the host: copies that are begun with a step and read when it is done.

Owns the pinned memory that they arrive in, and the device memory that logprobs are computed in. Nothing here waits;
whoever reads has waited for the step's end.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from .api import TokenLogprob
from .memory_sizes import MOST_COPIED_LOGIT_ROWS


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Begin to copy a device tensor to pinned memory, behind the work that makes it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Begin to copy a host tensor to the device."""
    return values.pin_memory().to(device, non_blocking=True)


class LogprobReadback:
    """The logprobs of some rows' tokens and of each row's most likely ones, on their way."""

    def __init__(
        self, token_ids: torch.Tensor, chosen: torch.Tensor, top: torch.return_types.topk, num_top: SequenceOf[int]
    ) -> None:
        self._num_top = num_top
        self._token_ids, self._chosen = to_host(token_ids), to_host(chosen)
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


class LogprobReader:
    """Computes logprobs, MOST_COPIED_LOGIT_ROWS rows at a time; one step after another on one stream uses it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        shape = (min(max_rows, MOST_COPIED_LOGIT_ROWS), vocab_size)
        self._logits, self._logprobs = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))

    def begin(
        self, logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, num_top: SequenceOf[int]
    ) -> Iterable[LogprobReadback]:
        """Yield the readbacks of all rows, in order.

        logits fp32 [R, vocab_size]; rows int64 [n], which of them; token_ids int64 [n], whose logprob is wanted;
        num_top says how many of the most likely each wants.
        """
        most = len(self._logits)
        for start in range(0, len(num_top), most):
            part = slice(start, start + most)
            tokens, wanted = token_ids[part], num_top[part]
            own = torch.index_select(logits, 0, rows[part], out=self._logits[: len(tokens)])
            logprobs = torch.log_softmax(own, -1, out=self._logprobs[: len(tokens)])
            chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
            yield LogprobReadback(tokens, chosen, logprobs.topk(max(wanted), dim=-1), wanted)
