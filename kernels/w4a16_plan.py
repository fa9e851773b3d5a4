"""Which tile a W4A16 product uses: from a table measured on its GPU, or by a rule from the number of programs.

Owns the tables: the shipped ones in tuning/<gpu>.json, and the user's own, written by an explicit tuning run, in
$XDG_CACHE_HOME/lmdserve/tuning (~/.cache by default), which win. Nothing is tuned while serving.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

import torch

from .w4a16_tiles import RECORD_INPUTS, PackedWeight

# Rows are counted in buckets, each with its own tile; above the last one all counts share the last one's.
ROW_BUCKETS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
# Each entry is the fastest alone (w4a16_tune.py), but for sums of a few rows by Hopper's kernel: those are the fastest
# in a decode step, where they fetch their weights while another kernel still runs.
_SHIPPED = Path(__file__).parent / "tuning"


class Operation(StrEnum):
    """What a product does with its result."""

    ADD = "add"  # fp32 +=
    STORE = "store"  # 16-bit =
    SWIGLU = "swiglu"  # 16-bit = silu(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a product is cut: programs of block_n x block_m results, each over one of num_splits runs of the inputs.

    scales_after: the group's scale is applied to the product of a group, in fp32, instead of to the weights.
    grouped_rows: so many row tiles run side by side, which share weights in the L2 cache.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    scales_after: bool = True
    grouped_rows: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperTile:
    """How w4a16_hopper.py cuts a product: 64 x num_groups times block_m results a program, 64 of them a group of warps.

    programs_per_processor bounds the registers so that so many programs share a processor. Else as in `Tile`.
    """

    block_m: int
    num_groups: int
    num_stages: int
    programs_per_processor: int
    num_splits: int = 1
    scales_after: bool = True
    grouped_rows: int = 1

    @property
    def block_n(self) -> int:
        """Return the number of outputs of a program."""
        return 64 * self.num_groups


AnyTile = Tile | HopperTile

# In place of a tile: unpack the weight to 16 bits, slice by slice, and multiply with the vendor's library.
DEQUANTIZE = None

# Bits of a row must not depend on the number of rows, so this tile serves every number. Narrower is faster for a few
# rows and slower for many.
DETERMINISTIC_BLOCK = Tile(block_n=64, block_m=64, num_warps=4, num_stages=3)
_DETERMINISTIC_PROGRAMS = 264

# Measured on an H200 for 4096x4096 to 28672x4096: enough programs that each processor holds several, all of them
# resident at once; more of them only start and end more often.
_PROGRAMS_PER_PROCESSOR = {8: 3, 16: 2, 32: 3, 64: 2, 128: 1, 512: 1, 4096: 1}
_MOST_SPLITS = 16
_MOST_GROUPED_ROWS = 8
_FEWEST_BLOCKS_PER_SPLIT = 2
_HOPPER_BLOCKS: dict[int, AnyTile] = {
    8: Tile(block_n=128, block_m=8, num_warps=4, num_stages=3),
    16: Tile(block_n=128, block_m=16, num_warps=4, num_stages=3),
    32: HopperTile(block_m=32, num_groups=1, num_stages=4, programs_per_processor=4),
    64: HopperTile(block_m=64, num_groups=1, num_stages=3, programs_per_processor=3),
    128: HopperTile(block_m=128, num_groups=2, num_stages=4, programs_per_processor=1, scales_after=False),
    512: HopperTile(block_m=128, num_groups=2, num_stages=4, programs_per_processor=1, scales_after=False),
    4096: HopperTile(block_m=256, num_groups=2, num_stages=3, programs_per_processor=1, scales_after=False),
}
# 99 KiB of shared memory a program on sm_86 and sm_89 bound the stages. Not measured: no such GPU was at hand.
_AMPERE_BLOCKS: dict[int, AnyTile] = {
    8: Tile(block_n=64, block_m=8, num_warps=2, num_stages=4),
    16: Tile(block_n=64, block_m=16, num_warps=4, num_stages=4),
    32: Tile(block_n=64, block_m=32, num_warps=4, num_stages=4),
    64: Tile(block_n=64, block_m=64, num_warps=4, num_stages=3),
    128: Tile(block_n=64, block_m=64, num_warps=4, num_stages=3, scales_after=False),
}


def bucket_of(num_rows: int) -> int:
    """Return the bucket that num_rows falls into."""
    for bucket in ROW_BUCKETS:
        if num_rows <= bucket:
            return bucket
    return ROW_BUCKETS[-1]


def choose_tile(operation: Operation, bucket: int, weight: PackedWeight) -> AnyTile | None:
    """Return the tile for a bucket of rows, or DEQUANTIZE."""
    device = _describe(weight.records.device)
    entry = _tables(device.name).get(key_of(operation, weight.out_features, weight.in_features), {}).get(bucket, ...)
    tile = (
        _rule(operation, bucket, weight, device.num_processors, _blocks_for(weight, device)) if entry is ... else entry
    )
    if isinstance(tile, HopperTile) and _blocks_for(weight, device) is not _HOPPER_BLOCKS:
        tile = _rule(operation, bucket, weight, device.num_processors, _AMPERE_BLOCKS)
    return _fitted(tile, weight) if isinstance(tile, Tile) else tile


def deterministic_tile(weight: PackedWeight) -> Tile:
    """Return the one tile whose results are the same bits for every number of rows."""
    num_tiles = weight.padded_out_features // DETERMINISTIC_BLOCK.block_n
    num_splits = _splits_for(_DETERMINISTIC_PROGRAMS, num_tiles, weight)
    return _fitted(replace(DETERMINISTIC_BLOCK, num_splits=num_splits), weight)


def key_of(operation: Operation, out_features: int, in_features: int) -> str:
    """Return the name of a product in the tables."""
    return f"{operation} {out_features}x{in_features}"


def _blocks_for(weight: PackedWeight, device: "_Device") -> dict[int, AnyTile]:
    """Return the rule's blocks: Hopper's kernel takes only groups of 128 inputs."""
    return _HOPPER_BLOCKS if device.has_wgmma and weight.group_size == RECORD_INPUTS else _AMPERE_BLOCKS


def _rule(
    operation: Operation, bucket: int, weight: PackedWeight, num_processors: int, blocks: dict[int, AnyTile]
) -> AnyTile | None:
    largest = min((rows for rows in blocks if rows >= bucket), default=None)
    if largest is None:
        return DEQUANTIZE
    block = blocks[largest]
    row_tiles = -(-bucket // block.block_m)
    block = replace(block, grouped_rows=min(_MOST_GROUPED_ROWS, row_tiles))
    if operation is not Operation.ADD:  # sums of several programs' results are costly here: see w4a16.py
        return block
    num_tiles = -(-weight.out_features // block.block_n) * row_tiles
    return replace(block, num_splits=_splits_for(_PROGRAMS_PER_PROCESSOR[largest] * num_processors, num_tiles, weight))


def _splits_for(num_programs: int, num_tiles: int, weight: PackedWeight) -> int:
    most = min(_MOST_SPLITS, weight.in_features // RECORD_INPUTS // _FEWEST_BLOCKS_PER_SPLIT)
    return max(1, min(most, round(num_programs / num_tiles)))


def _fitted(tile: Tile, weight: PackedWeight) -> Tile:
    """Return the tile as this weight allows it: small groups need their scales before the product."""
    if tile.scales_after and weight.group_size < RECORD_INPUTS:
        return replace(tile, scales_after=False)
    return tile


@dataclass(frozen=True, slots=True)
class _Device:
    name: str
    has_wgmma: bool
    num_processors: int


@cache
def _describe(device: torch.device) -> _Device:
    if device.type != "cuda":
        return _Device("cpu", has_wgmma=False, num_processors=4)
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.name, properties.major == 9, properties.multi_processor_count)


Table = Mapping[str, Mapping[int, AnyTile | None]]


@cache
def _tables(gpu: str) -> Table:
    """Return all that was measured on this GPU, the user's own measurements first."""
    merged: dict[str, dict[int, AnyTile | None]] = {}
    for path in (_SHIPPED / file_name(gpu), user_table(gpu)):
        if path.is_file():
            for key, buckets in read_table(path).items():
                merged.setdefault(key, {}).update(buckets)
    return merged


def file_name(gpu: str) -> str:
    """Return the name of a GPU's table."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def user_table(gpu: str) -> Path:
    """Return where a tuning run on this machine writes."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "lmdserve" / "tuning" / file_name(gpu)


def read_table(path: Path) -> Table:
    """Read a table; raises ValueError that names the file when it is not one."""
    try:
        content = json.loads(path.read_text())
        return {
            key: {int(bucket): _parse(entry) for bucket, entry in buckets.items()}
            for key, buckets in content["products"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning table ({error}); remove it or tune again") from error


def write_table(path: Path, table: Table) -> None:
    """Write a table, one product a line, beside the old one and then in its place."""
    lines = [
        f"    {json.dumps(key)}: " + json.dumps({str(bucket): render(tile) for bucket, tile in sorted(buckets.items())})
        for key, buckets in sorted(table.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text('{\n  "products": {\n' + ",\n".join(lines) + "\n  }\n}\n")
    fresh.replace(path)
    _tables.cache_clear()


# A tile in a table: block_n, block_m, warps, stages, splits, scales after (1) or before (0), grouped row tiles; of
# Hopper's kernel: block_m, groups, stages, programs a processor, and the same last three.
_HOPPER = "hopper "


def _parse(entry: str) -> AnyTile | None:
    if entry == "dequantize":
        return DEQUANTIZE
    first, second, third, fourth, num_splits, scales_after, grouped_rows = map(
        int, entry.removeprefix(_HOPPER).split("/")
    )
    if entry.startswith(_HOPPER):
        return HopperTile(
            block_m=first, num_groups=second, num_stages=third, programs_per_processor=fourth,
            num_splits=num_splits, scales_after=bool(scales_after), grouped_rows=grouped_rows,
        )  # fmt: skip
    return Tile(
        block_n=first, block_m=second, num_warps=third, num_stages=fourth,
        num_splits=num_splits, scales_after=bool(scales_after), grouped_rows=grouped_rows,
    )  # fmt: skip


def render(tile: AnyTile | None) -> str:
    """Return a tile as the tables hold it."""
    if tile is DEQUANTIZE:
        return "dequantize"
    name = _HOPPER if isinstance(tile, HopperTile) else ""
    return name + "/".join(str(int(value)) for value in astuple(tile))
