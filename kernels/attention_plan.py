"""One step's attention as index tensors shared by all layers: which tile of queries reads which blocks, and the mask.

Owns the cutting of a mixed batch (prefill chunks and single decode tokens) into tiles of equal shape and of tiles into
slices of bounded memory. Computes no attention and knows no cache contents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

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
    token_rows: torch.Tensor  # int64 [num_tiles * tile_tokens], the token in each place; padding repeats a token
    block_rows: torch.Tensor  # int64 [2 * num_tiles * num_blocks], key blocks, then value blocks
    first_masked_block: int  # blocks before it are seen whole by every token of the slice
    mask: torch.Tensor  # bool [num_tiles, num_blocks - first_masked_block, 1, tile rows, block_size], true: unseen


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All slices of a step, how to undo the tiling, and where new keys and values go."""

    tile_tokens: int
    slices: tuple[AttentionSlice, ...]
    output_rows: torch.Tensor  # int64 [max(num_tokens, least_rows)], each token's place among all tiles' rows
    append_rows: torch.Tensor  # int64 [num_tokens * 2 * num_kv_heads], rows of the cache seen as [-1, head_dim]


class _Tile(NamedTuple):
    num_blocks: int
    sequence: int
    first_row: int
    first_position: int
    num_tokens: int


def plan_attention(
    *,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: torch.Tensor,
    slot_ids: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    num_blocks: int,
    block_size: int,
    block_bytes: int,
    sliding_window: int | None,
    least_rows: int,
) -> AttentionPlan:
    """Plan one step. Lengths and tables as in the engine's StepBatch; `num_blocks` is the size of the whole cache.

    `block_bytes` is what one gathered block of keys and values takes in the compute type. With fewer tokens than
    `least_rows` the output repeats the first token's row.
    """
    group = num_heads // num_kv_heads
    tile_tokens = _tile_tokens(group, query_lens, block_tables.is_cuda)
    tiles = sorted(_cut_into_tiles(query_lens, context_lens, tile_tokens, block_size))
    # A batch of a single matrix product takes another code path in the BLAS, with other rounding.
    least_blocks = 2 if num_kv_heads == 1 else 1
    blocks_per_slice = max(1, _SLICE_BYTES // block_bytes)

    device = block_tables.device
    table = torch.tensor(tiles, dtype=torch.int64)
    offsets = torch.arange(tile_tokens)
    inside = torch.minimum(offsets, table[:, 4:] - 1)  # [num_tiles, tile_tokens], padding repeats the last token
    token_rows = table[:, 2:3] + inside
    positions = table[:, 3:4] + inside
    output_rows = torch.zeros(max(sum(query_lens), least_rows), dtype=torch.int64)
    real = offsets < table[:, 4:]
    output_rows[token_rows[real]] = torch.arange(token_rows.numel()).view_as(token_rows)[real]

    slices = []
    for start, stop in _cut_into_slices(tiles, blocks_per_slice):
        width = max(tiles[stop - 1].num_blocks, least_blocks)
        first_masked = (
            0 if sliding_window else min((tile.first_position + 1) // block_size for tile in tiles[start:stop])
        )
        first_masked = min(first_masked, width)
        mask = _mask(positions[start:stop], first_masked, width, block_size, group, sliding_window)
        sequences = table[start:stop, 1].to(device)
        slices.append(
            AttentionSlice(
                num_tiles=stop - start,
                num_blocks=width,
                token_rows=token_rows[start:stop].reshape(-1).to(device),
                block_rows=_block_rows(block_tables, sequences, width, num_blocks),
                first_masked_block=first_masked,
                mask=mask.to(device),
            )
        )
    append_rows = _append_rows(slot_ids, num_kv_heads, num_blocks, block_size)
    return AttentionPlan(tile_tokens, tuple(slices), output_rows.to(device), append_rows)


def _tile_tokens(group: int, query_lens: Sequence[int], on_cuda: bool) -> int:
    """Return the query tokens of a tile: fixed on a CPU, where it decides the rounding; by need on a GPU."""
    if not on_cuda:
        return max(1, _CPU_TILE_ROWS // group)
    return 1 if max(query_lens) == 1 else max(1, _CUDA_PREFILL_TILE_ROWS // group)


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


def _mask(
    positions: torch.Tensor, first_block: int, num_blocks: int, block_size: int, group: int, sliding_window: int | None
) -> torch.Tensor:
    """Return which keys a slice's rows must not see; positions int64 [num_tiles, tile_tokens]."""
    num_tiles, tile_tokens = positions.shape
    keys = torch.arange(first_block * block_size, num_blocks * block_size)
    queries = positions.unsqueeze(-1)
    hidden = keys > queries  # [num_tiles, tile_tokens, keys]
    if sliding_window is not None:
        hidden |= keys <= queries - sliding_window
    blocked = hidden.view(num_tiles, tile_tokens, 1, num_blocks - first_block, block_size).permute(0, 3, 1, 2, 4)
    rows = blocked.expand(-1, -1, -1, group, -1)
    return rows.reshape(num_tiles, num_blocks - first_block, 1, tile_tokens * group, block_size)


def _block_rows(block_tables: torch.Tensor, sequences: torch.Tensor, width: int, num_blocks: int) -> torch.Tensor:
    tables = block_tables[:, :width].index_select(0, sequences)
    if tables.shape[1] < width:
        tables = torch.nn.functional.pad(tables, (0, width - tables.shape[1]))
    keys = tables.reshape(-1)
    return torch.cat((keys, keys + num_blocks))


def _append_rows(slot_ids: torch.Tensor, num_kv_heads: int, num_blocks: int, block_size: int) -> torch.Tensor:
    blocks = torch.div(slot_ids, block_size, rounding_mode="floor")
    offsets = slot_ids - blocks * block_size
    heads = torch.arange(num_kv_heads, device=slot_ids.device)
    keys = (blocks.unsqueeze(-1) * num_kv_heads + heads) * block_size + offsets.unsqueeze(-1)
    return torch.stack((keys, keys + num_blocks * num_kv_heads * block_size), 1).reshape(-1)
