"""One step's attention as index tensors shared by all layers: which tile of queries reads which blocks, and the mask.

Owns the cutting of a mixed batch (prefill chunks and single decode tokens) into tiles of equal shape and of tiles into
slices of bounded memory. Computes no attention and knows no cache contents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

# Rows (query tokens x heads that share a key-value head) of one matrix product on a CPU. On 2 cores, head_dim 64 and
# blocks of 64: 512 products take 0.43 ms for 2 rows, 0.67 ms for 8 and 0.94 ms for 16; 8 serves decode and prefill.
_CPU_TILE_ROWS = 8
_CUDA_PREFILL_TILE_ROWS = 128
# Bytes of keys and values gathered at once. Small enough to stay in a core's cache, large enough to hide call overhead.
_SLICE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AttentionSlice:
    """A few tiles computed together; `num_blocks` is what the longest of them needs."""

    num_tiles: int
    num_blocks: int
    query_rows: torch.Tensor  # int64 [num_tiles * num_blocks * num_kv_heads * tile_tokens], rows of the queries seen
    # as [num_tokens * num_kv_heads, heads of a group * head_dim]; padding repeats a tile's last token
    block_rows: torch.Tensor  # int64 [2 * num_tiles * num_blocks], key blocks, then value blocks
    first_masked_block: int  # blocks before it are seen whole by every token of the slice
    mask: torch.Tensor  # bool [num_tiles, num_blocks - first_masked_block, 1, tile rows, block_size], true: unseen


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All slices of a step, how to undo the tiling, and where new keys and values go."""

    tile_tokens: int
    slices: tuple[AttentionSlice, ...]
    output_rows: torch.Tensor  # int64 [num_output_rows * num_kv_heads], rows among all tiles' results seen
    # as [num_tiles * num_kv_heads * tile_tokens, heads of a group * head_dim]
    append_rows: torch.Tensor  # int64 [num_tokens * 2 * num_kv_heads], rows of the cache seen as [-1, head_dim]


class _Tile(NamedTuple):
    num_blocks: int
    sequence: int
    first_row: int
    first_position: int
    num_tokens: int


class AttentionPlanner:
    """Plans the steps of one model over one cache of `num_blocks` blocks.

    `block_bytes` is what one gathered block of keys and values takes in the compute type. Output rows past the last
    token repeat the first token's.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        num_blocks: int,
        block_size: int,
        block_bytes: int,
        sliding_window: int | None,
        device: torch.device,
    ) -> None:
        self._group = num_heads // num_kv_heads
        self._num_kv_heads = num_kv_heads
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._blocks_per_slice = max(1, _SLICE_BYTES // block_bytes)
        # A batch of a single matrix product takes another code path in the BLAS, with other rounding.
        self._least_blocks = 2 if num_kv_heads == 1 else 1
        self._sliding_window = sliding_window
        self._device = device
        heads = torch.arange(num_kv_heads)
        self._heads = heads.view(1, 1, -1, 1)
        keys = heads * block_size
        self._cache_rows = torch.cat((keys, keys + num_blocks * num_kv_heads * block_size)).to(device)

    def plan(
        self,
        *,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: torch.Tensor,
        slot_ids: torch.Tensor,
        num_output_rows: int,
    ) -> AttentionPlan:
        """Plan one step; the arguments are those of the engine's StepBatch, and how many rows the result shall have."""
        tile_tokens = self._tile_tokens(query_lens)
        tiles = sorted(_cut_into_tiles(query_lens, context_lens, tile_tokens, self._block_size))
        table = torch.tensor(tiles, dtype=torch.int64)
        inside = torch.minimum(torch.arange(tile_tokens), table[:, 4:] - 1)  # [num_tiles, tile_tokens]
        token_rows = table[:, 2:3] + inside
        positions = table[:, 3:4] + inside

        # Padding repeats a token, and all places of a token hold the same result: any of them may be written last.
        places = torch.zeros(num_output_rows, dtype=torch.int64)
        tile_starts = torch.arange(len(tiles)).mul_(self._num_kv_heads * tile_tokens).unsqueeze(-1)
        places[token_rows] = tile_starts + torch.arange(tile_tokens)
        output_rows = places.unsqueeze(-1) + self._heads.view(-1) * tile_tokens

        first_rows = token_rows.mul_(self._num_kv_heads).view(len(tiles), 1, 1, tile_tokens) + self._heads
        slices = []
        for start, stop in _cut_into_slices(tiles, self._blocks_per_slice):
            width = max(tiles[stop - 1].num_blocks, self._least_blocks)
            first_masked = self._first_masked_block(tiles[start:stop], width)
            sequences = table[start:stop, 1].to(self._device)
            slices.append(
                AttentionSlice(
                    num_tiles=stop - start,
                    num_blocks=width,
                    query_rows=first_rows[start:stop].expand(-1, width, -1, -1).reshape(-1).to(self._device),
                    block_rows=self._block_rows(block_tables, sequences, width),
                    first_masked_block=first_masked,
                    mask=self._mask(positions[start:stop], first_masked, width).to(self._device),
                )
            )
        return AttentionPlan(
            tile_tokens, tuple(slices), output_rows.view(-1).to(self._device), self._append_rows(slot_ids)
        )

    def _tile_tokens(self, query_lens: Sequence[int]) -> int:
        """Return the query tokens of a tile: fixed on a CPU, where it decides the rounding; by need on a GPU."""
        if self._device.type == "cpu":
            return max(1, _CPU_TILE_ROWS // self._group)
        return 1 if max(query_lens) == 1 else max(1, _CUDA_PREFILL_TILE_ROWS // self._group)

    def _first_masked_block(self, tiles: Sequence[_Tile], width: int) -> int:
        if self._sliding_window is not None:
            return 0
        return min(width, min((tile.first_position + 1) // self._block_size for tile in tiles))

    def _mask(self, positions: torch.Tensor, first_block: int, width: int) -> torch.Tensor:
        """Return which keys a slice's rows must not see; positions int64 [num_tiles, tile_tokens]."""
        num_tiles, tile_tokens = positions.shape
        keys = torch.arange(first_block * self._block_size, width * self._block_size)
        queries = positions.unsqueeze(-1)
        hidden = keys > queries  # [num_tiles, tile_tokens, keys]
        if self._sliding_window is not None:
            hidden |= keys <= queries - self._sliding_window
        blocks = hidden.view(num_tiles, tile_tokens, 1, width - first_block, self._block_size).permute(0, 3, 1, 2, 4)
        rows = blocks.expand(-1, -1, -1, self._group, -1)
        return rows.reshape(num_tiles, width - first_block, 1, tile_tokens * self._group, self._block_size)

    def _block_rows(self, block_tables: torch.Tensor, sequences: torch.Tensor, width: int) -> torch.Tensor:
        tables = block_tables[:, :width].index_select(0, sequences)
        if tables.shape[1] < width:
            tables = functional.pad(tables, (0, width - tables.shape[1]))
        keys = tables.view(-1)
        return torch.cat((keys, keys + self._num_blocks))

    def _append_rows(self, slot_ids: torch.Tensor) -> torch.Tensor:
        """Turn block * block_size + offset into (block * num_kv_heads + head) * block_size + offset, for K and V."""
        first_heads = slot_ids * self._num_kv_heads - (slot_ids % self._block_size) * (self._num_kv_heads - 1)
        return (first_heads.unsqueeze(-1) + self._cache_rows).view(-1)


def _cut_into_tiles(
    query_lens: Sequence[int], context_lens: Sequence[int], tile_tokens: int, block_size: int
) -> list[_Tile]:
    tiles = []
    row = 0
    for sequence, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        position = context_len - query_len
        for start in range(0, query_len, tile_tokens):
            count = min(tile_tokens, query_len - start)
            num_blocks = (position + start + count - 1) // block_size + 1
            tiles.append(_Tile(num_blocks, sequence, row + start, position + start, count))
        row += query_len
    return tiles


def _cut_into_slices(tiles: Sequence[_Tile], blocks_per_slice: int) -> list[tuple[int, int]]:
    """Cut tiles, sorted by rising num_blocks, into runs whose padded block count stays within the bound."""
    slices = []
    start = 0
    for stop in range(1, len(tiles) + 1):
        if stop == len(tiles) or (stop + 1 - start) * tiles[stop].num_blocks > blocks_per_slice:
            slices.append((start, stop))
            start = stop
    return slices
