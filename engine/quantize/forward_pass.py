"""Windows of tokens through a served model's own decoder and kernels, up to what the head multiplies.

Owns the memory of such a pass: one KV cache for a few windows, whose blocks each pass writes anew. Both decoders are
covered, so that what is measured is what would be served on this device: keys and values are read back from the cache
as it stores them. No scheduler, sampler or graphs.
"""

from typing import Protocol

import torch

from ..batch import StepBatch
from ..config import QuantPolicy
from ..kv_cache import KVCache
from ..models.decoder import Decoder

BLOCK_SIZE = 64  # the server's default

# Tokens in one pass: 8192 keep a GPU's products at full speed; a CPU's are at 2048.
_TOKENS_AT_ONCE = {"cuda": 8192, "cpu": 2048}


class ForwardPass(Protocol):
    """One model with one KV policy; windows are int64 [at most `num_windows`, seqlen] on the model's device."""

    num_windows: int

    def hidden_states(self, windows: torch.Tensor) -> torch.Tensor:
        """Return [num_windows * seqlen, hidden_size] in the compute type, after the final norm."""


class Head(Protocol):
    """The output head alone; the rest of its model may be freed."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [num_rows, vocab_size] of hidden states [num_rows, hidden_size]."""


def windows_at_once(seqlen: int, device: torch.device) -> int:
    """Return how many windows a pass takes on this device."""
    return max(1, _TOKENS_AT_ONCE.get(device.type, 2048) // seqlen)


def make_forward_pass(
    model: object, *, seqlen: int, quant_policy: QuantPolicy, dtype: torch.dtype, device: torch.device
) -> ForwardPass:
    """Return the pass of a model that `load_model` returned, with the KV cache it needs."""
    if isinstance(model, Decoder):
        return _PlainPass(model, seqlen=seqlen, quant_policy=quant_policy, dtype=dtype, device=device)
    from .fused_forward_pass import FusedPass  # brings Triton, as the model has

    return FusedPass(model, seqlen=seqlen, quant_policy=quant_policy, dtype=dtype, device=device)


def head_of(model: object) -> Head:
    """Return the head of a model that `load_model` returned."""
    if isinstance(model, Decoder):
        head = model.head
        return lambda rows: head(rows).float()
    from .fused_forward_pass import fused_head

    return fused_head(model)


def block_tables(num_windows: int, seqlen: int) -> torch.Tensor:
    """Return int64 [num_windows, blocks a window takes]: blocks in order, from 1, as 0 is for padding."""
    blocks = -(-seqlen // BLOCK_SIZE)
    return torch.arange(1, num_windows * blocks + 1).view(num_windows, blocks)


class _PlainPass:
    """The decoder of plain torch."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        seqlen: int,
        quant_policy: QuantPolicy,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_windows = windows_at_once(seqlen, device)
        self._decoder = decoder
        self._seqlen = seqlen
        self._tables = block_tables(self.num_windows, seqlen).to(device)
        self._kv_cache = KVCache(
            decoder.config,
            num_blocks=self._tables.numel() + 1,
            block_size=BLOCK_SIZE,
            quant_policy=quant_policy,
            dtype=dtype,
            device=device,
        )

    @torch.inference_mode()
    def hidden_states(self, windows: torch.Tensor) -> torch.Tensor:
        """See ForwardPass."""
        count, seqlen = windows.shape
        positions = torch.arange(seqlen, device=windows.device).repeat(count)
        tables = self._tables[:count]
        slots = tables.repeat_interleave(BLOCK_SIZE, 1)[:, :seqlen].flatten() * BLOCK_SIZE + positions % BLOCK_SIZE
        batch = StepBatch(
            token_ids=windows.flatten(),
            positions=positions,
            slot_ids=slots,
            query_lens=(seqlen,) * count,
            context_lens=(seqlen,) * count,
            block_tables=tables,
            rope_bases=(self._decoder.config.rope_base(seqlen),) * count,
            logit_rows=torch.arange(count * seqlen, device=windows.device),
        )
        return self._decoder.hidden_states(batch, self._kv_cache)[: count * seqlen]
