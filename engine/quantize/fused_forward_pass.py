"""Windows of tokens through the fused decoder for CUDA: a step of prefill rows alone."""

import torch

from lmdserve.kernels.attention_workspace import DEFAULT_SCRATCH_BYTES, AttentionWorkspace

from ..config import QuantPolicy
from ..kv_cache import KVCache
from ..layers import rotary_frequencies
from ..models.fused_decoder import FusedDecoder, FusedStep, PrefillRows, StepMemory
from ..step_buffers import SlotTables, StepBuffers, StepLimits
from .forward_pass import BLOCK_SIZE, Head, block_tables, windows_at_once


class FusedPass:
    """See ForwardPass."""

    def __init__(
        self, model: object, *, seqlen: int, quant_policy: QuantPolicy, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert isinstance(model, FusedDecoder)
        config = model.config
        self.num_windows = windows_at_once(seqlen, device)
        tables = block_tables(self.num_windows, seqlen)
        limits = StepLimits(
            max_tokens=self.num_windows * seqlen,
            max_logit_rows=1,  # hidden states go to a tensor of their own, and the head runs elsewhere
            num_slots=self.num_windows,
            max_blocks_per_slot=tables.shape[1],
        )
        self._decoder = model
        self._memory = StepMemory(
            KVCache(
                config,
                num_blocks=tables.numel() + 1,
                block_size=BLOCK_SIZE,
                quant_policy=quant_policy,
                dtype=dtype,
                device=device,
            ),
            SlotTables(config, limits, device=device),
            StepBuffers(config, limits, dtype=dtype, device=device),
            AttentionWorkspace.allocate(
                max_rows=1,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                device=device,
                scratch_bytes=0 if quant_policy == 0 else DEFAULT_SCRATCH_BYTES,
            ),
        )
        self._memory.tables.block_tables.copy_(tables)
        base = config.rope_base(seqlen)
        self._memory.tables.frequencies.copy_(rotary_frequencies(config.rope, base, config.head_dim))

    @torch.inference_mode()
    def hidden_states(self, windows: torch.Tensor) -> torch.Tensor:
        """See ForwardPass."""
        step = _prefill_step(windows)
        hidden = torch.empty(
            windows.numel(), self._decoder.config.hidden_size, dtype=self._decoder.dtype, device=windows.device
        )
        self._decoder.forward(step, self._memory)
        self._decoder.hidden_states(step, None, self._memory, hidden)
        return hidden


def _prefill_step(windows: torch.Tensor) -> FusedStep:
    count, seqlen = windows.shape
    device = windows.device
    slots = torch.arange(count, dtype=torch.int32, device=device)
    prefill = PrefillRows(
        query_starts=torch.arange(0, (count + 1) * seqlen, seqlen, dtype=torch.int32, device=device),
        slots=slots,
        context_lens=torch.full((count,), seqlen, dtype=torch.int32, device=device),
        max_query_len=seqlen,
        max_context_len=seqlen,
        total_context_len=count * seqlen,
    )
    return FusedStep(
        token_ids=windows.flatten().int(),
        positions=torch.arange(seqlen, dtype=torch.int32, device=device).repeat(count),
        slots=slots.repeat_interleave(seqlen),
        context_lens=torch.empty(0, dtype=torch.int32, device=device),
        has_drafts=False,
        is_deterministic=False,
        prefill=prefill,
    )


def fused_head(model: object) -> Head:
    """Return the head alone; the decoder is not held."""
    assert isinstance(model, FusedDecoder)
    head = model.head

    def logits(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(rows), head.out_features, dtype=torch.float32, device=rows.device)
        head.store(rows, out, deterministic=False)
        return out

    return logits
