"""Measures which tile is fastest for a product on this GPU and writes it to the user's table; run only when asked to.

A tile counts as its median time inside a CUDA graph, over copies of the weight that together exceed the L2 cache, and
only if its result is right.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from .layout import pack_rows
from .w4a16 import launch_tile
from .w4a16_dequantize import add_dequantized, store_dequantized, swiglu_dequantized
from .w4a16_plan import (
    DEQUANTIZE,
    AnyTile,
    HopperTile,
    Operation,
    Tile,
    key_of,
    read_table,
    user_table,
    write_table,
)
from .w4a16_tiles import RECORD_INPUTS, PackedWeight, can_pack, has_wgmma, pack_weight
from .w4a16_workspace import Workspace

_GROUP_SIZE = 128
_BYTES_PAST_CACHE = 400 << 20
_NUM_REPLAYS = 7
_LARGEST_ERROR = 2e-3  # of the result's root mean square, float16
_COMPILERS = 12

# What won anywhere in sweeps of 5 to 176 tiles a product on an H200, by rows up to which it is tried. More stages, more
# warps and none of either never did. Tile: block_n, block_m, warps, stages, scales after the product.
_BLOCKS: dict[int, tuple[tuple[int, int, int, int, bool], ...]] = {
    8: ((64, 8, 1, 3, True), (64, 8, 1, 4, True), (64, 8, 2, 3, True), (64, 8, 2, 4, True), (128, 8, 4, 3, True)),
    16: ((128, 16, 4, 3, True), (128, 16, 4, 4, True), (64, 16, 2, 3, True), (64, 16, 4, 3, True)),
    32: ((128, 32, 4, 3, True), (128, 32, 4, 4, True), (64, 32, 4, 3, True)),
    64: ((128, 64, 4, 3, True), (64, 64, 4, 3, True)),
    128: ((64, 64, 4, 3, True), (128, 128, 4, 3, False), (64, 128, 4, 3, False)),
    512: ((64, 64, 4, 3, True), (128, 128, 4, 3, False), (64, 128, 4, 3, False)),
    4096: ((128, 128, 4, 3, False), (128, 256, 8, 3, False)),
}
# HopperTile: block_m, groups, stages, programs a processor, scales after the product.
_HOPPER_BLOCKS: dict[int, tuple[tuple[int, int, int, int, bool], ...]] = {
    8: ((8, 1, 3, 3, True), (8, 1, 4, 4, True), (8, 2, 4, 3, True)),
    16: ((16, 1, 3, 2, True), (16, 1, 3, 3, True), (16, 1, 4, 4, True)),
    32: ((32, 1, 3, 2, True), (32, 1, 3, 3, True), (32, 1, 4, 4, True), (32, 2, 4, 2, True)),
    64: ((64, 1, 3, 2, True), (64, 1, 3, 3, True), (64, 1, 2, 4, False), (64, 2, 4, 1, True), (64, 2, 4, 2, False)),
    128: (
        (64, 1, 3, 3, True), (64, 1, 2, 4, False), (64, 2, 4, 1, True), (64, 2, 4, 2, False), (128, 1, 3, 2, False),
        (128, 2, 4, 1, False),
    ),
    256: (
        (64, 1, 3, 3, True), (64, 2, 4, 2, False), (128, 1, 3, 2, False), (128, 2, 4, 1, False), (256, 2, 3, 1, False),
    ),
    4096: ((128, 1, 3, 2, False), (128, 2, 4, 1, False), (256, 2, 3, 1, False)),
}  # fmt: skip
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_FEWEST_PROGRAMS, _MOST_PROGRAMS = 100, 1600
_DEQUANTIZE_FROM_BUCKET = 256
_PLAIN_UP_TO_ON_HOPPER = 32  # rows; above, the other kernel won everywhere
_MOST_GROUPED_ROWS = 8
_MANY_ROWS = 1024
_COPIES_FOR_MANY_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product to tune: what is done with the result, and the weight's size."""

    operation: Operation
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One tile's time for one product; None is DEQUANTIZE."""

    product: Product
    num_rows: int
    tile: AnyTile | None
    microseconds: float
    error: float


def tune(products: Iterable[Product], buckets: Iterable[int]) -> Iterator[list[Measurement]]:
    """Measure every candidate for each product at each bucket's number of rows, fastest first, and store the fastest.

    Yields the measurements of a product and bucket once they are made. Needs an otherwise idle CUDA device.
    """
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).name
    path = user_table(gpu)
    products, buckets = list(products), list(buckets)
    _compile_all(products, buckets)
    for product in products:
        bench = Bench(product)
        for bucket in buckets:
            found = sorted(bench.measure(bucket), key=lambda measured: measured.microseconds)
            table = {key: dict(entries) for key, entries in read_table(path).items()} if path.is_file() else {}
            key = key_of(product.operation, product.out_features, product.in_features)
            table.setdefault(key, {})[bucket] = found[0].tile
            write_table(path, table)
            yield found


def candidates(product: Product, bucket: int, device: torch.device) -> list[AnyTile | None]:
    """Return the tiles to try for a bucket of rows."""
    blocks: list[AnyTile] = [
        Tile(block_n=block_n, block_m=block_m, num_warps=num_warps, num_stages=num_stages, scales_after=scales_after)
        for block_n, block_m, num_warps, num_stages, scales_after in _at(_BLOCKS, bucket)
    ]
    if has_wgmma(device):
        blocks = [] if bucket > _PLAIN_UP_TO_ON_HOPPER else blocks
        for block_m, num_groups, num_stages, programs_per_processor, scales_after in _at(_HOPPER_BLOCKS, bucket):
            blocks.append(
                HopperTile(
                    block_m=block_m, num_groups=num_groups, num_stages=num_stages,
                    programs_per_processor=programs_per_processor, scales_after=scales_after,
                )
            )  # fmt: skip
    found: list[AnyTile | None] = [DEQUANTIZE] if bucket >= _DEQUANTIZE_FROM_BUCKET else []
    num_blocks = product.in_features // RECORD_INPUTS
    for block in blocks:
        row_tiles = -(-bucket // block.block_m)
        num_tiles = -(-product.out_features // block.block_n) * row_tiles
        can_split = product.operation is Operation.ADD or isinstance(block, Tile)
        for num_splits in _SPLITS if can_split else (1,):
            is_useful = num_splits == 1 or (
                _FEWEST_PROGRAMS <= num_tiles * num_splits <= _MOST_PROGRAMS and num_blocks // num_splits >= 2
            )
            if is_useful:
                found.append(replace(block, num_splits=num_splits, grouped_rows=min(_MOST_GROUPED_ROWS, row_tiles)))
    return found


def _at(
    blocks: dict[int, tuple[tuple[int, int, int, int, bool], ...]], bucket: int
) -> Iterable[tuple[int, int, int, int, bool]]:
    return blocks[min(rows for rows in blocks if rows >= bucket)]


class Bench:
    """One product's weight in enough copies, and timers for its tiles."""

    def __init__(
        self, product: Product, *, dtype: torch.dtype = torch.float16, fragment_width: int | None = None
    ) -> None:
        self.product = product
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.weight, self._truth = random_weight(product, dtype, self.device, fragment_width)
        records = self.weight.records
        num_copies = max(2, -(-_BYTES_PAST_CACHE // (records.numel() * 4)))
        self._copies = [
            self.weight,
            *(replace(self.weight, records=records.clone(), cache={}) for _ in range(num_copies - 1)),
        ]
        self._workspace = Workspace(self.device)
        self._last_case: tuple[torch.Tensor, torch.Tensor] | None = None
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def measure(self, bucket: int) -> Iterator[Measurement]:
        """Yield the right ones of a bucket's candidates that fit this device."""
        for tile in candidates(self.product, bucket, self.device):
            try:
                measured = self.measure_tile(bucket, tile)
            except (OutOfResources, PTXASError, ValueError):  # shared memory, registers, room for a split's parts
                continue
            if measured.error < _LARGEST_ERROR:
                yield measured

    def measure_tile(self, num_rows: int, tile: AnyTile | None, *, is_ordered: bool = False) -> Measurement:
        """Time one tile and compare its result with the truth; is_ordered as in `w4a16.launch_tile`."""
        x, expected = self._case(num_rows)
        is_sum = self.product.operation is Operation.ADD
        out = torch.zeros_like(expected) if is_sum else torch.full_like(expected, float("nan"), dtype=x.dtype)
        self._run(x, self.weight, out, tile, is_ordered)
        error = ((out.float() - expected).norm() / expected.norm()).item()
        weights = self._copies[: _COPIES_FOR_MANY_ROWS if num_rows >= _MANY_ROWS else None]
        microseconds = self.time([partial(self._run, x, weight, out, tile, is_ordered) for weight in weights])
        return Measurement(
            product=self.product, num_rows=num_rows, tile=tile, microseconds=microseconds,
            error=error if error == error else float("inf"),
        )  # fmt: skip

    def _case(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random rows and the true result, the same ones as long as the number of rows stays."""
        if self._last_case is None or self._last_case[0].shape[0] != num_rows:
            random = torch.Generator(self.device).manual_seed(num_rows)
            x = torch.randn(num_rows, self.product.in_features, device=self.device, generator=random)
            x = x.to(self.weight.dtype)
            expected = x.float() @ self._truth.t()
            if self.product.operation is Operation.SWIGLU:
                gate, up = expected.chunk(2, -1)
                expected = torch.nn.functional.silu(gate) * up
            self._last_case = (x, expected)
        return self._last_case

    def time(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the microseconds of a call: the median of replays of a graph that makes each call once."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for call in calls:
                call()
        graph.replay()
        times: list[float] = []
        for _ in range(_NUM_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(times)

    def _run(
        self, x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, tile: AnyTile | None, is_ordered: bool
    ) -> None:
        operation = self.product.operation
        if tile is not DEQUANTIZE:
            launch_tile(operation, x, weight, out, self._workspace, None, tile, is_ordered=is_ordered)
        else:
            run = {
                Operation.ADD: add_dequantized,
                Operation.STORE: store_dequantized,
                Operation.SWIGLU: swiglu_dequantized,
            }
            run[operation](x, weight, out, self._workspace, None)


def random_weight(
    product: Product, dtype: torch.dtype, device: torch.device, fragment_width: int | None = None
) -> tuple[PackedWeight, torch.Tensor]:
    """Return a random packed weight and its values in fp32, [out_features, in_features]."""
    if not can_pack(product.out_features, product.in_features, _GROUP_SIZE):
        raise ValueError(f"{product.out_features}x{product.in_features} is no shape of a packed weight")
    random = torch.Generator(device).manual_seed(product.out_features + product.in_features)
    shape = (product.out_features, product.in_features)
    groups = (product.out_features, product.in_features // _GROUP_SIZE)
    values = torch.randint(0, 16, shape, dtype=torch.uint8, device=device, generator=random)
    zeros = torch.randint(0, 16, groups, dtype=torch.int32, device=device, generator=random)
    scales = (torch.rand(groups, device=device, generator=random) * 0.01 + 0.005).to(dtype)
    weight = pack_weight(
        pack_rows(values), zeros, scales, dtype,
        interleave_halves=product.operation is Operation.SWIGLU, fragment_width=fragment_width,
    )  # fmt: skip
    truth = values.float().view(*groups, _GROUP_SIZE).sub_(zeros.unsqueeze(-1)).mul_(scales.float().unsqueeze(-1))
    return weight, truth.view(shape)


def _compile_all(products: list[Product], buckets: list[int]) -> None:
    """Fill Triton's cache of binaries from parallel processes; measuring then only loads them."""
    device = torch.device("cuda", torch.cuda.current_device())
    kinds: dict[tuple[object, ...], tuple[Operation, AnyTile]] = {}
    for product in products:
        for bucket in buckets:
            for tile in candidates(product, bucket, device):
                if tile is not DEQUANTIZE:
                    is_split = tile.num_splits > 1
                    kinds[(product.operation, is_split, replace(tile, num_splits=1))] = (product.operation, tile)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(_COMPILERS, max(1, len(kinds))), mp_context=context) as pool:
        for future in [pool.submit(compile_tile, *kind) for kind in kinds.values()]:
            future.exception()  # met again, and passed over, when the tile is measured


def compile_tile(operation: Operation, tile: AnyTile) -> None:
    """Compile a tile's kernel by running it on the smallest weight that it fits."""
    device = torch.device("cuda", torch.cuda.current_device())
    product = Product(operation=operation, out_features=256, in_features=128 * max(2, tile.num_splits))
    weight, _ = random_weight(product, torch.float16, device)
    x = torch.zeros(1, product.in_features, dtype=torch.float16, device=device)
    columns = 128 if operation is Operation.SWIGLU else 256
    out = torch.zeros(1, columns, dtype=torch.float32 if operation is Operation.ADD else torch.float16, device=device)
    launch_tile(operation, x, weight, out, Workspace(device, scratch_bytes=1 << 24), None, tile)
