"""4-bit linears on a CPU: what multiplies by a weight of half a byte when there is no GPU.

Owns the choice between two products. The tiled one dequantizes a few output rows at a time, so that the floats stay in
the cache, and multiplies them as `linear.py` multiplies dense weights: in float32 it keeps that file's promise, a row's
bits depend on that row alone. torch's int4 product never makes the floats at all. benchmarks/cpu_four_bit.py, one
thread of a Xeon (AVX-512, torch 2.13), microseconds for 1 / 8 / 64 / 512 rows:

    weight       dtype      whole weight dequantized        tiled                          torch's int4 product
    2048 x 8192  float32    53760 / 57019 / 68728 / 169363  16476 / 17573 / 31394 / 137277  29345 a row
    1024 x 512   float32    437 / 555 / 878 / 3863          the same, it is two tiles      804 / 7091 / 56813 / 454353
    2048 x 8192  bfloat16   44510 / 45378 / 47456 / 63285   19383 / 19280 / 21797 / 44841  872 / 3345 / 26313 / 208951
    1024 x 512   bfloat16   479 / 477 / 554 / 1009          562 / 560 / 642 / 1138         29 / 104 / 806 / 6485

So torch's product serves bfloat16 steps of few rows, and nothing else: for float32 and float16 it is a scalar loop.
float32 stays the default on a CPU, since bfloat16 rounds by row count (`linear.py`).
"""

import torch

from lmdserve.kernels import layout, reference

from .linear import Linear, choose_product

# Weights in a tile: a megabyte of float32, half of a core's L2. 2**16 took 1.2 to 1.9 times as long, 2**20 0.8 to 1.2.
TILE_WEIGHTS = 2**18
# Up to this many rows torch's product was faster on every shape tried.
INT4_PRODUCT_MAX_ROWS = {"AVX512": 64, "AVX2": 16}
# Output rows that torch's packed order interleaves. Without one of these instruction sets its product is a scalar loop.
_BLOCK_ROWS = {"AVX512": 64, "AVX2": 32}
_INT4_GROUP_SIZES = (32, 64, 128, 256)
_INT4_ZERO = 8  # torch's product computes (code - 8) * scale + offset


def build_four_bit_linear(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Linear:
    """Return the linear that is fastest on this CPU.

    codes uint8 [out_features, in_features], values 0..15; zeros and scales [out_features, groups], compute type.
    """
    instruction_set = torch.backends.cpu.get_cpu_capability()
    if instruction_set in _BLOCK_ROWS and _has_int4_product(codes, scales, _BLOCK_ROWS[instruction_set]):
        packed = _Int4Packed(codes, _BLOCK_ROWS[instruction_set])
        if packed.is_order_known(codes):
            max_rows = INT4_PRODUCT_MAX_ROWS[instruction_set]
            return Int4Linear(packed, zeros, scales, bias, max_product_rows=max_rows)
    return TiledFourBitLinear(layout.pack_rows(codes), zeros, scales, bias)


class TiledFourBitLinear:
    """Dequantizes a tile of output rows, multiplies, and drops it again; a weight of one tile is dequantized whole."""

    def __init__(
        self, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """codes uint8 [out_features, in_features / 2] in row order; zeros and scales [out_features, groups]."""
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * 2
        self._multiply = choose_product(scales.dtype, scales.device)
        self._tile_rows = max(1, TILE_WEIGHTS // self.in_features)
        self._codes = codes
        self._zeros = zeros
        self._scales = scales
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        products = []
        for start in range(0, self.out_features, self._tile_rows):
            rows = slice(start, start + self._tile_rows)
            weight = reference.w4a16_weight(self._codes[rows], self._zeros[rows], self._scales[rows], x.dtype)
            products.append(self._multiply(x, weight))
        return _finish(products, self._bias)


class Int4Linear:
    """torch's int4 product for few rows; above, tiles dequantized from the same packed weight."""

    def __init__(
        self,
        packed: "_Int4Packed",
        zeros: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        max_product_rows: int,
    ) -> None:
        """zeros and scales bfloat16 [out_features, groups]."""
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self._multiply = choose_product(scales.dtype, scales.device)
        self._group_size = self.in_features // scales.shape[1]
        offsets = (_INT4_ZERO - zeros.float()).mul_(scales.float()).to(scales.dtype)
        self._scales_and_offsets = torch.stack((scales.t(), offsets.t()), -1).contiguous()  # [groups, out_features, 2]
        self._packed = packed
        self._max_product_rows = max_product_rows
        self._tile_rows = max(1, TILE_WEIGHTS // self.in_features // packed.block_rows) * packed.block_rows
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self._max_product_rows:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self._packed.words, self._group_size, self._scales_and_offsets
            )
            return _finish([product], self._bias)
        tiles = range(0, self.out_features, self._tile_rows)
        return _finish([self._multiply(x, self._weight_tile(start)) for start in tiles], self._bias)

    def _weight_tile(self, start: int) -> torch.Tensor:
        rows = slice(start, min(start + self._tile_rows, self.out_features))
        weight = torch.empty(rows.stop - start, self.in_features, dtype=self._scales_and_offsets.dtype)
        self._packed.unpack_rows(rows, weight)
        scales, offsets = self._scales_and_offsets[:, rows].permute(2, 1, 0).unsqueeze(-1)  # each [rows, groups, 1]
        grouped = weight.view(len(weight), -1, self._group_size)
        grouped.sub_(_INT4_ZERO).mul_(scales).add_(offsets)
        return weight


class _Int4Packed:
    """A weight in the order of torch's int4 product: rows in blocks, of each input first the low half of the rows."""

    def __init__(self, codes: torch.Tensor, block_rows: int) -> None:
        self.out_features, self.in_features = codes.shape
        self.block_rows = block_rows
        self.words: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)

    def is_order_known(self, codes: torch.Tensor) -> bool:
        """Say whether this torch packs as `unpack_rows` reads: the order is torch's own affair."""
        return torch.equal(self.unpack_rows(slice(0, self.out_features), torch.empty_like(codes)), codes)

    def unpack_rows(self, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """Write the codes of whole blocks of rows into `out` [rows, in_features] and return it."""
        blocks = self.words.view(-1, self.in_features, self.block_rows // 2)
        blocks = blocks[rows.start // self.block_rows : rows.stop // self.block_rows].transpose(1, 2).contiguous()
        halves = out.view(-1, 2, self.block_rows // 2, self.in_features)
        halves[:, 0] = blocks & 0xF
        halves[:, 1] = blocks >> 4
        return out


def _has_int4_product(codes: torch.Tensor, scales: torch.Tensor, block_rows: int) -> bool:
    out_features, in_features = codes.shape
    group_size, remainder = divmod(in_features, scales.shape[1])
    return (
        scales.dtype == torch.bfloat16
        and out_features % block_rows == 0
        and remainder == 0
        and group_size in _INT4_GROUP_SIZES
    )


def _finish(products: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    product = products[0] if len(products) == 1 else torch.cat(products, 1)
    return product if bias is None else product.add_(bias)
