"""How a decode batch is cut into parts, found by every program for itself from the context lengths on the device.

Nothing comes from the host, so one captured graph serves all lengths, and a batch of unequal contexts is cut evenly:
the chunk is the number of tiles of all rows over the number of parts wanted, and a program finds its row by a running
sum over the rows' parts. With one row there is nothing to search.
"""

import triton
import triton.language as tl


@triton.jit
def _span(context_len, TILE: tl.constexpr, WINDOW: tl.constexpr, APPENDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first token to be read from the cache, a tile's first, the end, and how many tiles that is."""
    end = tl.maximum(context_len - 1, 0) if APPENDS else context_len
    start = tl.maximum(context_len - WINDOW, 0) // TILE * TILE if WINDOW > 0 else context_len * 0
    return start, end, tl.cdiv(tl.maximum(end - start, 0), TILE)


@triton.jit
def find_part(  # type: ignore[no-untyped-def]
    context_lens,
    num_rows,
    num_splits,
    part,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    APPENDS: tl.constexpr,
):
    """Return the part's row, its context length, the part's first token and end, its number in the row, parts of row.

    A part past the last one has row num_rows.
    """
    # Each row's last part may be short: num_rows parts more than the tiles of all rows over the chunk, at most.
    wanted = tl.maximum(num_splits - num_rows, 1)
    if ROWS == 1:
        context_len = tl.load(context_lens)
        start, end, num_tiles = _span(context_len, TILE, WINDOW, APPENDS)
        chunk = tl.maximum(tl.cdiv(num_tiles, wanted), 1)
        number = part
        num_parts = tl.maximum(tl.cdiv(num_tiles, chunk), 1)
        row = tl.where(part < num_parts, 0, 1)
    else:
        rows = tl.arange(0, ROWS)
        lens = tl.load(context_lens + rows, mask=rows < num_rows, other=0)
        _, _, tiles = _span(lens, TILE, WINDOW, APPENDS)
        chunk = tl.maximum(tl.cdiv(tl.sum(tiles, axis=0), wanted), 1)
        parts = tl.where(rows < num_rows, tl.maximum(tl.cdiv(tiles, chunk), 1), 0)
        past = tl.cumsum(parts, axis=0)
        # The last row that ends before this part, and how many parts there are up to it, in one reduction.
        last = tl.max(tl.where((past <= part) & (rows < num_rows), past * ROWS + rows, -1), axis=0)
        row = tl.where(last < 0, 0, last % ROWS + 1)
        number = part - tl.where(last < 0, 0, last // ROWS)
        context_len = tl.load(context_lens + row, mask=row < num_rows, other=0)
        start, end, num_tiles = _span(context_len, TILE, WINDOW, APPENDS)
        num_parts = tl.maximum(tl.cdiv(num_tiles, chunk), 1)
    share = tl.cdiv(num_tiles, num_parts) * TILE
    first = start + number * share
    return row, context_len, first, tl.minimum(first + share, end), number, num_parts
