"""Random paged caches and the attention over them in float64, written without the kernels.

Every place outside the contexts is poisoned: NaN data, or NaN scales over random codes. Whatever reads one shows it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmdserve.kernels import reference


@dataclass(kw_only=True)
class PagedCase:
    """Sequences of given lengths in a cache of scattered blocks; all tensors lie on `device`."""

    data: torch.Tensor
    scales: torch.Tensor | None
    block_tables: torch.Tensor
    table_rows: torch.Tensor
    context_lens: torch.Tensor
    lens: Sequence[int]
    bits: int
    block_size: int

    def stored(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the cache holds of a sequence, dequantized: keys and values, float64 [length, kv_heads, D]."""
        positions = torch.arange(self.lens[row], device=self.data.device)
        table = self.block_tables[self.table_rows[row].long()].long()
        blocks, offsets = table[positions // self.block_size], positions % self.block_size
        data = self.data[:, blocks, :, offsets]  # [length, 2, kv_heads, width]
        if self.scales is None:
            values = data.double()
        else:
            scales = self.scales[:, blocks, :, offsets]
            values = reference.dequantize_kv(data, scales, self.bits, torch.float32).double()
        return values[:, 0], values[:, 1]


def random_case(
    lens: Sequence[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 64,
    num_unwritten: int = 0,
    seed: int = 0,
) -> PagedCase:
    """Fill a cache with sequences of these lengths, the last `num_unwritten` tokens of each still poison."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-length // block_size) for length in lens]
    num_blocks = sum(widths) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    num_rows = len(lens) + 2
    table_rows = torch.randperm(num_rows, generator=generator)[: len(lens)].to(torch.int32)
    block_tables = torch.full((num_rows, max(*widths, 1) + 1), 2**30, dtype=torch.int32)  # far outside the cache
    for row, width in enumerate(widths):
        block_tables[table_rows[row], :width] = torch.tensor([order.pop() for _ in range(width)], dtype=torch.int32)
    shape = (2, num_blocks, num_kv_heads, block_size)
    scales = None
    if bits == 16:
        data = torch.full((*shape, head_dim), math.nan, dtype=dtype)
    else:
        data = torch.randint(0, 256, (*shape, head_dim * bits // 8), generator=generator).to(torch.uint8)
        scales = torch.full((*shape, 2), math.nan, dtype=torch.bfloat16)
    for row, length in enumerate(lens):
        written = max(length - num_unwritten, 0)
        values = torch.randn(written, 2, num_kv_heads, head_dim, generator=generator)
        values = values * (torch.rand(written, 2, num_kv_heads, 1, generator=generator) * 2) + 0.5
        positions = torch.arange(written)
        blocks, offsets = block_tables[table_rows[row].long()].long()[positions // block_size], positions % block_size
        if scales is None:
            data[:, blocks, :, offsets] = values.to(dtype)
        else:
            data[:, blocks, :, offsets], scales[:, blocks, :, offsets] = reference.quantize_kv(values, bits)
    return PagedCase(
        data=data.to(device),
        scales=None if scales is None else scales.to(device),
        block_tables=block_tables.to(device),
        table_rows=table_rows.to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        lens=tuple(lens),
        bits=bits,
        block_size=block_size,
    )


def rotation(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, fp32 [num_tokens, head_dim / 2]."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions.double()[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotated(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, norm: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Normalize and rotate heads [num_tokens, num_heads, D] as pairs of halves; float64."""
    x = heads.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cosines.double(), sines.double())[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)


def attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attend for the last query tokens [t, heads, D] over [length, kv_heads, D]; float64 [t, heads * D]."""
    num_tokens, num_heads, _ = query.shape
    length, num_kv_heads, _ = keys.shape
    keys, values = (x.double().repeat_interleave(num_heads // num_kv_heads, 1) for x in (keys, values))
    scores = torch.einsum("thd,chd->htc", query.double(), keys) * scale
    context = torch.arange(length, device=query.device)
    positions = torch.arange(length - num_tokens, length, device=query.device)[:, None]
    hidden = context > positions
    if window is not None:
        hidden |= context <= positions - window
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("htc,chd->thd", weights, values).flatten(1)
