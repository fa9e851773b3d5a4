"""Drives a Decoder over a KV cache the way a scheduler does, with blocks in scattered order and any mix of chunks."""

import random
from collections.abc import Mapping, Sequence

import torch

from lmdserve.engine.batch import StepBatch
from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.kv_cache import KVCache
from lmdserve.engine.models.decoder import Decoder


class CacheDriver:
    """Sequences by name; each step takes their next tokens and gives back the logits of every one of those."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        block_size: int = 16,
        num_blocks: int = 128,
        quant_policy: QuantPolicy = 0,
        device: str = "cpu",
    ) -> None:
        self.decoder = decoder
        self.device = torch.device(device)
        self.kv_cache = KVCache(
            decoder.config,
            num_blocks=num_blocks,
            block_size=block_size,
            quant_policy=quant_policy,
            dtype=decoder.dtype,
            device=self.device,
        )
        self._free_blocks = list(range(1, num_blocks))
        random.Random(block_size).shuffle(self._free_blocks)
        self._blocks: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}
        self._rope_bases: dict[str, float] = {}

    def add(self, name: str, num_prompt_tokens: int, shared_blocks: Sequence[int] = (), num_shared: int = 0) -> None:
        """Start a sequence, with the first `num_shared` tokens already in `shared_blocks` of another one."""
        self._blocks[name] = list(shared_blocks)
        self._lengths[name] = num_shared
        self._rope_bases[name] = self.decoder.config.rope_base(num_prompt_tokens)

    def blocks(self, name: str) -> list[int]:
        return self._blocks[name]

    def step(
        self, work: Mapping[str, Sequence[int]], logit_rows: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute one step of these tokens, in this order of sequences; of a lone sequence only some rows if wanted."""
        block_size = self.kv_cache.block_size
        positions, slots = [], []
        for name, tokens in work.items():
            start = self._lengths[name]
            self._lengths[name] += len(tokens)
            while len(self._blocks[name]) * block_size < self._lengths[name]:
                self._blocks[name].append(self._free_blocks.pop())
            for position in range(start, self._lengths[name]):
                positions.append(position)
                slots.append(self._blocks[name][position // block_size] * block_size + position % block_size)
        width = max(len(self._blocks[name]) for name in work)
        tables = [self._blocks[name] + [0] * (width - len(self._blocks[name])) for name in work]
        query_lens = tuple(len(tokens) for tokens in work.values())
        batch = StepBatch(
            token_ids=self._ids([token for tokens in work.values() for token in tokens]),
            positions=self._ids(positions),
            slot_ids=self._ids(slots),
            query_lens=query_lens,
            context_lens=tuple(self._lengths[name] for name in work),
            block_tables=self._ids(tables),
            rope_bases=tuple(self._rope_bases[name] for name in work),
            logit_rows=self._ids(range(sum(query_lens)) if logit_rows is None else logit_rows),
        )
        logits = self.decoder.forward(batch, self.kv_cache)
        return dict(zip(work, logits.split(query_lens if logit_rows is None else len(logit_rows)), strict=True))

    def run(self, name: str, tokens: Sequence[int], chunk_sizes: Sequence[int]) -> torch.Tensor:
        """Run one whole sequence alone in chunks of these sizes; the last size repeats."""
        self.add(name, len(tokens))
        logits, start, sizes = [], 0, list(chunk_sizes)
        while start < len(tokens):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            logits.append(self.step({name: tokens[start : start + size]})[name])
            start += size
        return torch.cat(logits)

    def _ids(self, values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)
