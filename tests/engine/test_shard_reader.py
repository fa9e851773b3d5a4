"""Where tensors lie in safetensors files, against the format's own library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdserve.engine.api import ConfigError
from lmdserve.engine.shard_reader import stored_tensors


def test_every_tensor_is_where_the_header_says(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    saved = {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c": torch.randint(-9, 9, (2, 2, 3), generator=generator, dtype=torch.int32),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(saved, file, metadata={"format": "pt"})
    data = file.read_bytes()
    found = stored_tensors(file)
    assert {tensor.name for tensor in found} == set(saved)
    assert [tensor.offset for tensor in found] == sorted(tensor.offset for tensor in found)
    for name, start, size, dtype, shape in [(t.name, t.offset, t.num_bytes, t.dtype, t.shape) for t in found]:
        assert (dtype, shape) == (saved[name].dtype, tuple(saved[name].shape))
        if size:
            raw = torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype).view(shape)
            assert torch.equal(raw, load_file(file)[name])


def test_a_type_without_a_name_here_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2, dtype=torch.float8_e4m3fn)}, file)
    with pytest.raises(ConfigError, match="tensor w has the type F8_E4M3, which is not supported"):
        stored_tensors(file)
