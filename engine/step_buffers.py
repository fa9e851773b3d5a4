"""The fixed memory of a fused decoder's steps: intermediate results, and what the device knows of each slot.

Owns the tensors; `memory_sizes.py` counts them before anything is allocated. Nothing here is freed or moved while the
engine lives: CUDA graphs hold the addresses.
"""

from dataclasses import dataclass

import torch

from .memory_sizes import qkv_width
from .model_config import ModelConfig
from .step import MAX_PROMPT_LOGPROB_ROWS
from .step_inputs import ALIGNMENT, NUM_INPUT_PARTS

# Up to here a 4-bit product is fastest when its parts are added atomically to a float32 buffer (kernels/w4a16.py).
MOST_ROWS_TO_ACCUMULATE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step."""

    max_tokens: int  # rows of all sequences together
    max_logit_rows: int
    num_slots: int
    max_blocks_per_slot: int

    @property
    def max_inputs(self) -> int:
        """The integers that describe a step: see step_inputs.py."""
        numbers = 4 * self.max_tokens + 3 * (self.num_slots + 1) + 3 * self.max_logit_rows + MAX_PROMPT_LOGPROB_ROWS
        return numbers + NUM_INPUT_PARTS * ALIGNMENT


class StepBuffers:
    """What one step's kernels hand to the next; rows past a step's own are left over from others.

    `qkv_sums` is where products of few rows are added up in float32; products of many rows go to `qkv`, and what
    attention makes of them (`queries`, `attended`) has the compute type.
    """

    def __init__(self, config: ModelConfig, limits: StepLimits, *, dtype: torch.dtype, device: torch.device) -> None:
        tokens, logits = limits.max_tokens, limits.max_logit_rows
        heads, pairs = config.num_heads, config.head_dim // 2

        def buffer(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self.residual = buffer(tokens, config.hidden_size, kind=torch.float32)
        self.normed = buffer(tokens, config.hidden_size)
        self.qkv = buffer(tokens, qkv_width(config))
        self.qkv_sums = buffer(min(tokens, MOST_ROWS_TO_ACCUMULATE), qkv_width(config), kind=torch.float32)
        self.cosines = buffer(tokens, pairs, kind=torch.float32)
        self.sines = buffer(tokens, pairs, kind=torch.float32)
        self.queries = buffer(tokens, heads, config.head_dim)
        self.attended = buffer(tokens, heads * config.head_dim)
        self.activated = buffer(tokens, config.intermediate_size)
        self.head_inputs = buffer(logits, config.hidden_size)
        self.logits = buffer(logits, config.vocab_size, kind=torch.float32)


class SlotTables:
    """What the device knows of each slot between steps; a sequence has its slot as long as it holds blocks."""

    def __init__(self, config: ModelConfig, limits: StepLimits, *, device: torch.device) -> None:
        slots = limits.num_slots
        self.block_tables = torch.zeros((slots, limits.max_blocks_per_slot), dtype=torch.int32, device=device)
        self.frequencies = torch.zeros((slots, config.head_dim // 2), dtype=torch.float32, device=device)
        self.last_token_ids = torch.zeros(slots, dtype=torch.int32, device=device)
