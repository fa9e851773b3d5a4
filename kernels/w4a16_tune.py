"""Measures which tile is fastest for a product on this GPU and writes it to the user's table; run only when asked to.

A tile counts as its median time inside a CUDA graph, over copies of the weight that together exceed the L2 cache, and
only if its result is right.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from .layout import pack_rows
from .w4a16 import launch_tile
from .w4a16_dequantize import add_dequantized, store_dequantized, swiglu_dequantized
from .w4a16_plan import DEQUANTIZE, Operation, Tile, key_of, read_table, user_table, write_table
from .w4a16_tiles import RECORD_INPUTS, PackedWeight, can_pack, pack_weight
from .w4a16_workspace import Workspace

_GROUP_SIZE = 128
_BYTES_PAST_CACHE = 400 << 20
_NUM_REPLAYS = 7
_LARGEST_ERROR = 2e-3  # of the result's root mean square, float16
_COMPILERS = 12

# block_n, block_m, warps, stages, scales after the product. What won anywhere in sweeps of 13 to 114 tiles a product on
# an H200; more stages, more warps and none of either never did.
_BLOCKS: dict[int, tuple[tuple[int, int, int, int, bool], ...]] = {
    8: ((64, 8, 1, 3, True), (64, 8, 1, 4, True), (64, 8, 2, 3, True), (64, 8, 2, 4, True), (128, 8, 4, 3, True)),
    16: ((128, 16, 4, 3, True), (128, 16, 4, 4, True), (64, 16, 2, 3, True), (64, 16, 4, 3, True)),
    32: ((128, 32, 4, 3, True), (128, 32, 4, 4, True), (64, 32, 4, 3, True), (64, 32, 4, 4, True)),
    64: ((128, 64, 4, 3, True), (128, 64, 4, 4, True), (64, 64, 4, 3, True), (64, 64, 4, 4, True)),
    128: (
        (128, 64, 4, 4, True), (64, 64, 4, 3, True), (128, 64, 8, 3, False), (128, 128, 4, 3, False),
        (128, 128, 8, 3, False), (64, 128, 4, 3, False),
    ),
    256: (
        (64, 64, 4, 3, True), (128, 128, 4, 3, False), (128, 128, 8, 3, False), (64, 128, 4, 3, False),
        (128, 256, 8, 3, False), (64, 256, 4, 3, False),
    ),
    512: ((128, 128, 4, 3, False), (64, 128, 4, 3, False), (128, 256, 8, 3, False), (64, 256, 4, 3, False)),
    1024: ((128, 128, 4, 3, False), (128, 256, 8, 3, False)),
}  # fmt: skip
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_FEWEST_PROGRAMS, _MOST_PROGRAMS = 100, 1600
_DEQUANTIZE_FROM_BUCKET = 128


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
    tile: Tile | None
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


def candidates(product: Product, bucket: int) -> list[Tile | None]:
    """Return the tiles to try for a bucket of rows."""
    found: list[Tile | None] = [DEQUANTIZE] if bucket >= _DEQUANTIZE_FROM_BUCKET else []
    num_blocks = product.in_features // RECORD_INPUTS
    for block_n, block_m, num_warps, num_stages, scales_after in _BLOCKS[bucket]:
        row_tiles = -(-bucket // block_m)
        num_tiles = -(-product.out_features // block_n) * row_tiles
        for num_splits in _SPLITS:
            is_useful = num_splits == 1 or (
                _FEWEST_PROGRAMS <= num_tiles * num_splits <= _MOST_PROGRAMS and num_blocks // num_splits >= 2
            )
            if is_useful:
                found.append(
                    Tile(
                        block_n=block_n, block_m=block_m, num_warps=num_warps, num_stages=num_stages,
                        num_splits=num_splits, scales_after=scales_after, grouped_rows=min(8, row_tiles),
                    )
                )  # fmt: skip
    return found


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
        self._records = [records, *(records.clone() for _ in range(num_copies - 1))]
        self._workspace = Workspace(self.device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def measure(self, num_rows: int) -> Iterator[Measurement]:
        """Yield the right ones of the candidates for so many rows."""
        for tile in candidates(self.product, num_rows):
            measured = self.measure_tile(num_rows, tile)
            if measured.error < _LARGEST_ERROR:
                yield measured

    def measure_tile(self, num_rows: int, tile: Tile | None) -> Measurement:
        """Time one tile and compare its result with the truth."""
        random = torch.Generator(self.device).manual_seed(num_rows)
        x = torch.randn(num_rows, self.product.in_features, device=self.device, generator=random).to(self.weight.dtype)
        expected = x.float() @ self._truth.t()
        if self.product.operation is Operation.SWIGLU:
            gate, up = expected.chunk(2, -1)
            expected = torch.nn.functional.silu(gate) * up
        is_sum = self.product.operation is Operation.ADD
        out = torch.zeros_like(expected) if is_sum else torch.full_like(expected, float("nan"), dtype=x.dtype)
        self._run(x, self.weight, out, tile)
        error = ((out.float() - expected).norm() / expected.norm()).item()
        weights = [_with_records(self.weight, records) for records in self._records]
        microseconds = self.time([lambda weight=weight: self._run(x, weight, out, tile) for weight in weights])  # type: ignore[misc]
        return Measurement(
            product=self.product, num_rows=num_rows, tile=tile, microseconds=microseconds,
            error=error if error == error else float("inf"),
        )  # fmt: skip

    def time(self, calls: list[Callable[[], None]]) -> float:
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

    def _run(self, x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, tile: Tile | None) -> None:
        operation = self.product.operation
        if tile is not DEQUANTIZE:
            launch_tile(operation, x, weight, out, self._workspace, None, tile)
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


def _with_records(weight: PackedWeight, records: torch.Tensor) -> PackedWeight:
    return PackedWeight(
        records=records, out_features=weight.out_features, in_features=weight.in_features,
        group_size=weight.group_size, dtype=weight.dtype, fragment_width=weight.fragment_width,
        interleaved=weight.interleaved,
    )  # fmt: skip


def _compile_all(products: list[Product], buckets: list[int]) -> None:
    """Fill Triton's cache of binaries from parallel processes; measuring then only loads them."""
    kinds = {}
    for product in products:
        for bucket in buckets:
            for tile in candidates(product, bucket):
                if tile is not DEQUANTIZE:
                    is_split = tile.num_splits > 1 and product.operation is not Operation.ADD
                    kinds[(product.operation, tile.block_n, tile.block_m, tile.num_warps, tile.num_stages,
                           tile.scales_after, tile.grouped_rows, is_split)] = (product.operation, tile)  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(_COMPILERS, max(1, len(kinds))), mp_context=context) as pool:
        for future in [pool.submit(compile_tile, *kind) for kind in kinds.values()]:
            future.result()


def compile_tile(operation: Operation, tile: Tile) -> None:
    """Compile a tile's kernel by running it on the smallest weight that it fits."""
    device = torch.device("cuda", torch.cuda.current_device())
    product = Product(operation=operation, out_features=256, in_features=128 * max(2, tile.num_splits))
    weight, _ = random_weight(product, torch.float16, device)
    x = torch.zeros(1, product.in_features, dtype=torch.float16, device=device)
    columns = 128 if operation is Operation.SWIGLU else 256
    out = torch.zeros(1, columns, dtype=torch.float32 if operation is Operation.ADD else torch.float16, device=device)
    launch_tile(operation, x, weight, out, Workspace(device, scratch_bytes=1 << 24), None, tile)
