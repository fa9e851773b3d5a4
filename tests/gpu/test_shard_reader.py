"""Tensors read to the GPU in pieces by several threads, against the format's own library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdserve.engine.api import ConfigError
from lmdserve.engine.checkpoint import Checkpoint
from lmdserve.engine.shard_reader import read_to_device, stored_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("piece_bytes", [64, 1000, 1 << 20])
def test_every_bit_arrives(tmp_path: Path, piece_bytes: int) -> None:
    """Far more pieces than threads and buffers, with lengths that no piece divides."""
    file = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(2)
    saved = {f"t{i}": torch.randn(1 + 37 * i, generator=generator).to(torch.float16) for i in range(40)}
    save_file(saved | {"empty": torch.empty(0, 3), "words": torch.arange(99_999, dtype=torch.int32)}, file)
    expected = load_file(file)
    names = []
    for name, tensor in read_to_device(stored_tensors(file), torch.device("cuda"), {}, piece_bytes=piece_bytes):
        names.append(name)
        tensor = tensor.clone()  # on the current stream, as soon as it is handed over
        assert torch.equal(tensor.cpu(), expected[name]), name
    assert sorted(names) == sorted(expected)


def test_memory_that_is_freed_is_not_overwritten_too_early(tmp_path: Path) -> None:
    """A tensor's memory goes back while the work on it is only enqueued, and the next tensor may get it."""
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.full((1 << 20,), float(i)) for i in range(64)}, file)
    sums = {}
    for name, tensor in read_to_device(stored_tensors(file), torch.device("cuda"), {}):
        torch.cuda._sleep(1_000_000)
        sums[name] = tensor.double().mean()
    assert {name: int(total.item()) for name, total in sums.items()} == {f"t{i}": i for i in range(64)}


def test_a_reader_that_stops_early_leaves_nothing_running(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.ones(1 << 16) for i in range(64)}, file)
    reader = read_to_device(stored_tensors(file), torch.device("cuda"), {})
    next(reader)
    reader.close()


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1 << 16)}, file)
    tensors = stored_tensors(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors ends before its last tensor"):
        list(read_to_device(tensors, torch.device("cuda"), {}))


def test_a_checkpoint_gives_device_tensors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    ((name, tensor),) = Checkpoint(tmp_path).tensors(torch.device("cuda"), into={})
    assert (name, tensor.device.type) == ("w", "cuda")


def test_a_tensor_goes_where_it_is_wanted_if_it_fits_there(tmp_path: Path) -> None:
    save_file({name: torch.arange(12.0).view(3, 4) for name in ("fits", "type", "shape")}, tmp_path / "m.safetensors")
    cuda = torch.device("cuda")
    into = {
        "fits": torch.zeros(3, 4, device=cuda),
        "type": torch.zeros(3, 4, dtype=torch.float16, device=cuda),
        "shape": torch.zeros(4, 3, device=cuda),
    }
    read = dict(read_to_device(stored_tensors(tmp_path / "m.safetensors"), cuda, into))
    assert read["fits"] is into["fits"]
    for name in into:
        assert torch.equal(read[name].cpu(), torch.arange(12.0).view(3, 4))
        assert name == "fits" or not into[name].any()
