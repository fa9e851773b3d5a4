"""The decoder that runs every family: embedding, layers, final norm, head; one step's batch in, logits out.

Owns the weights and the per-step tables. Differences between families are in the ModelConfig and in how the loader
filled the layers. In float32 on a CPU the logits of a token depend on its own sequence alone, bit for bit.
"""

from functools import lru_cache, partial

import torch

from lmdserve.kernels import reference
from lmdserve.kernels.attention_plan import AttentionPlanner

from ..batch import StepBatch
from ..kv_cache import KVCache
from ..layers import DecoderLayer, RMSNorm, StepTables, rotary_frequencies
from ..linear import Linear, padded_row_count
from ..model_config import ModelConfig

# Dynamic NTK gives every long prompt its own base; this many sets of frequencies (head_dim / 2 floats) are kept.
_KEPT_ROPE_BASES = 256


class Decoder:
    """A loaded model. `forward` changes nothing but the KV cache it is given."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: list[DecoderLayer],
        final_norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self.head = head
        # Neither cache refers to the decoder: the weights go as soon as nobody holds it, without a garbage collection.
        frequencies = partial(_frequencies_on, config, self.device)
        self._frequencies = lru_cache(maxsize=_KEPT_ROPE_BASES)(frequencies)
        self._planner = lru_cache(maxsize=1)(partial(_new_planner, config, self.dtype, self.device))

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Append the batch's tokens to the cache and return fp32 logits [len(batch.logit_rows), vocab_size]."""
        return self.head(self.hidden_states(batch, kv_cache))[: len(batch.logit_rows)].float()

    @torch.inference_mode()
    def hidden_states(self, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Append the batch's tokens to the cache and return what the head multiplies, [num_rows, hidden_size].

        Rows are those of `logit_rows`; on a CPU more may follow that only pad the product.
        """
        tables = self._step_tables(batch, kv_cache)
        x = self._embedding.index_select(0, self._pad(batch.token_ids))
        for layer in self._layers:
            x = layer(x, tables, kv_cache)
        return self._final_norm(x.index_select(0, self._pad(batch.logit_rows)))

    def _step_tables(self, batch: StepBatch, kv_cache: KVCache) -> StepTables:
        plan = self._planner(kv_cache.num_blocks, kv_cache.block_size).plan(
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            slot_ids=batch.slot_ids,
            num_output_rows=padded_row_count(len(batch.positions), self.device),
        )
        cosines, signed_sines = reference.rope_tables(batch.positions, self._token_frequencies(batch))
        return StepTables(len(batch.positions), plan, cosines.to(self.dtype), signed_sines.to(self.dtype))

    def _token_frequencies(self, batch: StepBatch) -> torch.Tensor:
        """Return fp32 [1, head_dim / 2] when all sequences share a base, else a row for every token."""
        if len(set(batch.rope_bases)) == 1:
            return self._frequencies(batch.rope_bases[0]).unsqueeze(0)
        rows = torch.stack([self._frequencies(base) for base in batch.rope_bases])
        return rows.repeat_interleave(torch.tensor(batch.query_lens, device=self.device), 0)

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows`, the first repeated at the end, as many as products are made for; an empty one stays empty."""
        missing = padded_row_count(len(rows), self.device) - len(rows)
        return rows if missing == 0 else torch.cat((rows, rows[:1].expand(missing)))


def _new_planner(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, num_blocks: int, block_size: int
) -> AttentionPlanner:
    return AttentionPlanner(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        num_blocks=num_blocks,
        block_size=block_size,
        block_bytes=2 * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize,
        sliding_window=config.sliding_window,
        device=device,
    )


def _frequencies_on(config: ModelConfig, device: torch.device, base: float) -> torch.Tensor:
    return rotary_frequencies(config.rope, base, config.head_dim).to(device)
