"""The 4-bit kernels compile for every architecture with the tiles that are shipped: no spills, and they fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from offline_compile import assert_fits, compile_for_all, compile_kernel

from lmdserve.kernels import w4a16_plan
from lmdserve.kernels.w4a16 import _w4a16_kernel
from lmdserve.kernels.w4a16_dequantize import _dequantize_kernel
from lmdserve.kernels.w4a16_hopper import _WORD_LAYOUT, _X_LAYOUT, _hopper_kernel, _registers
from lmdserve.kernels.w4a16_plan import DETERMINISTIC_BLOCK, HopperTile, Operation, Tile, read_table
from lmdserve.kernels.w4a16_tiles import mma_sync_width

SHIPPED = Path(w4a16_plan.__file__).parent / "tuning" / "nvidia_h200.json"


def _shipped(kind: type) -> list[tuple[Operation, Any]]:
    """Return the distinct kernels of the shipped table: splits and the order of programs are no part of the code."""
    found = {}
    for key, buckets in read_table(SHIPPED).items():
        for tile in buckets.values():
            if isinstance(tile, kind):
                form = replace(tile, num_splits=1, grouped_rows=1)
                found.setdefault(form, (Operation(key.split()[0]), form))
    return list(found.values())


def _plain_arguments(
    tile: Tile, operation: Operation, dtype: str, *, hopper: bool, groups: int, is_ordered: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    out = "*fp32" if operation is Operation.ADD else f"*{dtype}"
    signature = {
        "x": f"*{dtype}", "records": "*i32", "out": out, "bias": f"*{dtype}", "partials": "*fp32", "counters": "*i32",
        "num_rows": "i32", "out_features": "i32:16", "num_blocks": "i32", "x_stride": "i32:16", "out_stride": "i32:16",
        "num_splits": "i32",
    }  # fmt: skip
    uses_wgmma = hopper and tile.num_warps >= 4 and tile.block_m >= 16
    constexprs = {
        "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "NUM_STAGES": tile.num_stages, "GROUPS": groups,
        "SCALES_AFTER": tile.scales_after, "PACKED_WIDTH": 2 if hopper else mma_sync_width(),
        "WIDTH": 2 if uses_wgmma else mma_sync_width(), "GROUPED_ROWS": tile.grouped_rows,
        "OPERATION": operation.value, "IS_ORDERED": is_ordered, "HAS_BIAS": False, "WAITS": uses_wgmma,
        "INTERPRETED": False,
    }  # fmt: skip
    return signature, constexprs


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tile", [*w4a16_plan._AMPERE_BLOCKS.values(), DETERMINISTIC_BLOCK], ids=str)
def test_the_rule_s_tiles_compile_before_hopper(tile: Tile, dtype: str) -> None:
    groups = 1 if tile.scales_after else 4
    operation, is_ordered = (Operation.SWIGLU, True) if tile == DETERMINISTIC_BLOCK else (Operation.ADD, False)
    signature, constexprs = _plain_arguments(tile, operation, dtype, hopper=False, groups=groups, is_ordered=is_ordered)
    for compiled in compile_for_all(
        _w4a16_kernel, signature, constexprs,
        architectures=(80, 86, 89), num_warps=tile.num_warps, num_stages=tile.num_stages,
    ).values():  # fmt: skip
        assert_fits(compiled)


@pytest.mark.parametrize(("operation", "tile"), [*_shipped(Tile), (Operation.STORE, DETERMINISTIC_BLOCK)], ids=str)
def test_shipped_tiles_compile_for_hopper(operation: Operation, tile: Tile) -> None:
    is_ordered = tile == DETERMINISTIC_BLOCK
    signature, constexprs = _plain_arguments(tile, operation, "fp16", hopper=True, groups=1, is_ordered=is_ordered)
    compiled = compile_kernel(
        _w4a16_kernel, signature, {**constexprs, "PDL": True}, 90, num_warps=tile.num_warps, num_stages=tile.num_stages
    )
    assert_fits(compiled)
    if constexprs["WAITS"]:
        assert "pendings = 0" in compiled.ttgir
    # Unpacked values are the instruction's operand where they are: only results change their place, to be written.
    assert compiled.ttgir.count("ttg.convert_layout") <= (3 if is_ordered else 1)


@pytest.mark.parametrize(("operation", "tile"), _shipped(HopperTile), ids=str)
def test_the_kernel_for_hopper_compiles(operation: Operation, tile: HopperTile) -> None:
    out = "*fp32" if operation is Operation.ADD else "*bf16"
    signature = {
        "x_rows": f"tensordesc<bf16[{tile.block_m}, 128],{_X_LAYOUT!r}>",
        "records": f"tensordesc<i32[1024],{_WORD_LAYOUT!r}>", "scales": f"tensordesc<i32[64],{_WORD_LAYOUT!r}>",
        "out": out, "bias": "*bf16", "num_rows": "i32", "out_features": "i32:16", "num_blocks": "i32",
        "out_stride": "i32:16", "num_splits": "i32",
    }  # fmt: skip
    registers, group_registers = _registers(tile)
    constexprs = {
        "BLOCK_M": tile.block_m, "GROUPS": tile.num_groups, "STAGES": tile.num_stages,
        "SCALES_AFTER": tile.scales_after, "GROUPED_ROWS": tile.grouped_rows, "OPERATION": operation.value,
        "IS_SYNCHRONOUS": tile.block_m == 8 and operation is not Operation.ADD, "HAS_BIAS": True,
        "GROUP_REGISTERS": group_registers, "PDL": True,
    }  # fmt: skip
    compiled = compile_kernel(_hopper_kernel, signature, constexprs, 90, num_warps=4, maxnreg=registers)
    assert_fits(compiled)
    # What the groups are told of their tile must not lie where a barrier was made: that write may come late.
    barriers, told = _barrier_places(compiled.ptx), _places_told(compiled.ptx)
    assert barriers
    assert told
    assert not barriers & told


def _barrier_places(ptx: str) -> set[int]:
    """Return where in shared memory barriers are initialized."""
    registers = set(re.findall(r"mbarrier\.init\S* \[(%r\d+)\]", ptx))
    sums = re.findall(r"add\.s32 \t(%r\d+), %r\d+, (\d+);", ptx)
    return {int(offset) for register, offset in sums if register in registers}


def _places_told(ptx: str) -> set[int]:
    """Return where in shared memory the first group of warps leaves what the others need to know."""
    return {int(offset) for offset in re.findall(r"st\.shared\S* \t\[global_smem\+(\d+)\]", ptx)}


@pytest.mark.parametrize("groups", [1, 4])
def test_unpacking_compiles_for_every_architecture(groups: int) -> None:
    signature = {
        "records": "*i32", "out": "*bf16", "num_blocks": "i32", "num_rows": "i32:16", "in_features": "i32:16",
    }  # fmt: skip
    constexprs = {"GROUPS": groups, "WIDTH": 2, "INTERLEAVED": True, "BLOCKS": 4, "INTERPRETED": False}
    for compiled in compile_for_all(_dequantize_kernel, signature, constexprs, num_warps=4).values():
        assert_fits(compiled)
