"""The choice of tiles: buckets, the shipped and the user's tables, the rule, and what a weight does not allow."""

import json
from pathlib import Path

import pytest
import torch

from lmdserve.kernels import w4a16_plan
from lmdserve.kernels.w4a16_plan import (
    DEQUANTIZE,
    ROW_BUCKETS,
    HopperTile,
    Operation,
    Tile,
    bucket_of,
    choose_tile,
    deterministic_tile,
    file_name,
    key_of,
    read_table,
    user_table,
    write_table,
)
from lmdserve.kernels.w4a16_tiles import PackedWeight

TABLES = sorted((Path(w4a16_plan.__file__).parent / "tuning").glob("*.json"))


def _weight(out_features: int = 4096, in_features: int = 4096, group_size: int = 128) -> PackedWeight:
    words = 1024 + 64 * 128 // group_size
    return PackedWeight(
        records=torch.empty(out_features // 64, in_features // 128, words, dtype=torch.int32, device="meta"),
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        dtype=torch.float16,
        fragment_width=4,
        interleaved=False,
    )


def test_buckets_are_the_least_that_hold_the_rows() -> None:
    assert [bucket_of(rows) for rows in (1, 8, 9, 64, 65, 1000, 1025, 10**6)] == [1, 8, 16, 64, 96, 1024, 4096, 4096]


def test_the_rule_fills_the_processors_and_leaves_each_split_some_work() -> None:
    for bucket in ROW_BUCKETS:
        for weight in (_weight(128, 128), _weight(57344, 8192), _weight(4096, 14336, 32)):
            tile = choose_tile(Operation.ADD, bucket, weight)
            if tile is DEQUANTIZE:
                continue
            assert weight.in_features // 128 >= tile.num_splits
            assert weight.padded_out_features % tile.block_n == 0
            assert tile.scales_after <= (weight.group_size == 128)
    assert choose_tile(Operation.ADD, 1024, _weight()) is DEQUANTIZE
    assert choose_tile(Operation.STORE, 8, _weight()).num_splits == 1


def test_the_deterministic_tile_does_not_depend_on_rows() -> None:
    assert deterministic_tile(_weight()).num_splits == 4
    assert not deterministic_tile(_weight(group_size=32)).scales_after


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    w4a16_plan._tables.cache_clear()
    yield tmp_path
    w4a16_plan._tables.cache_clear()


def test_the_user_s_own_measurements_win(cache_home: Path) -> None:
    tile = Tile(block_n=128, block_m=16, num_warps=4, num_stages=4, num_splits=6, grouped_rows=2)
    key = key_of(Operation.ADD, 4096, 4096)
    path = user_table("cpu")
    assert path == cache_home / "lmdserve" / "tuning" / "cpu.json"
    hopper = HopperTile(block_m=64, num_groups=2, num_stages=4, programs_per_processor=2, scales_after=False)
    table = {key: {16: tile, 64: hopper, 256: DEQUANTIZE}}
    write_table(path, table)
    assert read_table(path) == table
    weight = _weight()
    object.__setattr__(weight, "records", torch.empty(weight.records.shape, dtype=torch.int32))
    assert choose_tile(Operation.ADD, 16, weight) == tile
    assert choose_tile(Operation.ADD, 256, weight) is DEQUANTIZE
    assert choose_tile(Operation.ADD, 8, weight) != tile
    assert isinstance(choose_tile(Operation.ADD, 64, weight), Tile)  # this device cannot run the other kernel


def test_a_broken_table_is_named(cache_home: Path) -> None:
    path = user_table("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"products": {"add 64x128": {"8": "64/8"}}}))
    with pytest.raises(ValueError, match=r"cpu\.json is not a tuning table"):
        read_table(path)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_can_be_read(path: Path) -> None:
    for key, buckets in read_table(path).items():
        assert key.split()[0] in set(Operation)
        assert set(buckets) <= set(ROW_BUCKETS)


def test_a_gpu_s_table_is_named_after_it() -> None:
    assert file_name("NVIDIA H200") == "nvidia_h200.json"
    assert file_name("NVIDIA GeForce RTX 4090") == "nvidia_geforce_rtx_4090.json"
