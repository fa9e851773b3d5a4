"""Drives a FusedDecoder without a runner: sequences by name, scattered blocks, any mix of prefill, decode and drafts.

Also linears of plain torch for it, so that everything but cuBLAS runs on a machine without a GPU, interpreted.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from lmdserve.engine.assembly import LayerParts, PlainAssembly
from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.kv_cache import KVCache
from lmdserve.engine.layers import rotary_frequencies
from lmdserve.engine.linear import DenseLinear, Linear, SharedLinear
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.models.fused_decoder import FusedDecoder, FusedLayer, FusedStep, PrefillRows, StepMemory
from lmdserve.engine.step_buffers import SlotTables, StepBuffers, StepLimits
from lmdserve.kernels.attention_workspace import AttentionWorkspace

NUM_SLOTS = 4
MAX_TOKENS = 512


class TorchLinear:
    """A FusedLinear of float32 products, each row on its own; accumulates for few rows, as packed 4-bit weights do."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()

    def accumulates(self, num_rows: int) -> bool:
        return num_rows <= 8

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        product = (x.float().unsqueeze(1) * self._weight).sum(-1)
        return product if self._bias is None else product + self._bias

    def store(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        out.copy_(self._multiply(x))

    def add(self, x: torch.Tensor, accumulator: torch.Tensor, *, deterministic: bool) -> None:
        accumulator.add_(self._multiply(x))

    def swiglu(self, x: torch.Tensor, out: torch.Tensor, *, deterministic: bool) -> None:
        gate, up = self._multiply(x).chunk(2, -1)
        out.copy_(functional.silu(gate) * up)


class TorchLinearAssembly(PlainAssembly):
    """Assembles a FusedDecoder of TorchLinears."""

    def linear(self, linear: Linear) -> TorchLinear:
        assert isinstance(linear, DenseLinear | SharedLinear)
        weight = linear.weight
        return TorchLinear(weight.to_dense() if weight.is_mkldnn else weight, getattr(linear, "bias", None))

    gate_up = linear

    def decoder(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: list[LayerParts],
        final_norm: torch.Tensor,
        head: Linear,
    ) -> FusedDecoder:
        fused = [FusedLayer(**{name: getattr(parts, name) for name in LayerParts.__slots__}) for parts in layers]
        return FusedDecoder(config, embedding=embedding, layers=fused, final_norm=final_norm, head=self.linear(head))


@dataclass
class _Sequence:
    slot: int
    num_blocks: int = 0
    num_tokens: int = 0


class FusedDriver:
    """Up to NUM_SLOTS sequences; each step takes their next tokens and gives back the logits of every one of those."""

    def __init__(self, decoder: FusedDecoder, *, block_size: int = 16, quant_policy: QuantPolicy = 0) -> None:
        num_blocks = NUM_SLOTS * MAX_TOKENS // block_size
        limits = StepLimits(
            max_tokens=MAX_TOKENS,
            max_logit_rows=MAX_TOKENS,
            num_slots=NUM_SLOTS,
            max_blocks_per_slot=MAX_TOKENS // block_size,
        )
        device, dtype = decoder.device, decoder.dtype
        self._decoder = decoder
        self._device = device
        self._block_size = block_size
        kv_cache = KVCache(
            decoder.config,
            num_blocks=num_blocks,
            block_size=block_size,
            quant_policy=quant_policy,
            dtype=dtype,
            device=device,
        )
        self.memory = StepMemory(
            kv_cache,
            SlotTables(decoder.config, limits, device=device),
            StepBuffers(decoder.config, limits, dtype=dtype, device=device),
            AttentionWorkspace.allocate(
                max_rows=MAX_TOKENS,
                num_heads=decoder.config.num_heads,
                num_kv_heads=decoder.config.num_kv_heads,
                head_dim=decoder.config.head_dim,
                device=device,
                scratch_bytes=1 << 20,
            ),
        )
        self._free_blocks = list(range(1, num_blocks))
        random.Random(block_size).shuffle(self._free_blocks)
        self._sequences: dict[str, _Sequence] = {}

    def add(self, name: str, num_prompt_tokens: int) -> None:
        slot = len(self._sequences)
        config = self._decoder.config
        frequencies = rotary_frequencies(config.rope, config.rope_base(num_prompt_tokens), config.head_dim)
        self.memory.tables.frequencies[slot] = frequencies.to(self._device)
        self._sequences[name] = _Sequence(slot)

    def rewind(self, name: str, num_tokens: int) -> None:
        """Forget a sequence's last tokens, as after rejected drafts."""
        self._sequences[name].num_tokens -= num_tokens

    def step(
        self,
        work: Mapping[str, Sequence[int]],
        *,
        num_decoding: int = 0,
        has_drafts: bool = False,
        is_deterministic: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Compute one step of these tokens; the first `num_decoding` sequences bring decode rows."""
        positions, slots = [], []
        for name, tokens in work.items():
            sequence = self._sequences[name]
            positions += range(sequence.num_tokens, sequence.num_tokens + len(tokens))
            slots += [sequence.slot] * len(tokens)
            sequence.num_tokens += len(tokens)
            while sequence.num_blocks * self._block_size < sequence.num_tokens:
                self.memory.tables.block_tables[sequence.slot, sequence.num_blocks] = self._free_blocks.pop()
                sequence.num_blocks += 1
        lengths = [len(tokens) for tokens in work.values()]
        num_decode_rows = sum(lengths[:num_decoding])
        step = FusedStep(
            token_ids=self._ints([token for tokens in work.values() for token in tokens]),
            positions=self._ints(positions),
            slots=self._ints(slots),
            context_lens=self._ints(positions[:num_decode_rows]) + 1,
            has_drafts=has_drafts,
            is_deterministic=is_deterministic,
            prefill=self._prefill(
                [self._sequences[name] for name in list(work)[num_decoding:]], lengths[num_decoding:]
            ),
        )
        self._decoder.forward(step, self.memory)
        logits = self._decoder.logits(step, None, self.memory).clone()
        return dict(zip(work, logits.split(lengths), strict=True))

    def _prefill(self, sequences: list[_Sequence], lengths: list[int]) -> PrefillRows | None:
        if not sequences:
            return None
        return PrefillRows(
            query_starts=self._ints([sum(lengths[:index]) for index in range(len(lengths) + 1)]),
            slots=self._ints([sequence.slot for sequence in sequences]),
            context_lens=self._ints([sequence.num_tokens for sequence in sequences]),
            max_query_len=max(lengths),
            max_context_len=max(sequence.num_tokens for sequence in sequences),
            total_context_len=sum(sequence.num_tokens for sequence in sequences),
        )

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)
