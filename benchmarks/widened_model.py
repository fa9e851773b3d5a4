"""Write the demo model at InternLM2.5-7B's size: what it says, at a large model's cost.

    python benchmarks/widened_model.py --out /tmp/demo-7b-awq

Zeros fill what the demo model has not: hidden dimensions, heads, layers. So it answers as its 4-bit form does, and a
step takes what a 7B model's takes but for the vocabulary, which stays the demo's. For measurements that depend on what
the text is, such as guesses at the next tokens (`speculation.py`), which random weights cannot give.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_quality import DEMO, GROUP_SIZE, LINEAR, quantize
from safetensors.torch import load_file, save_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A geometry of the InternLM2 family."""

    hidden: int
    intermediate: int
    num_layers: int
    num_kv_heads: int
    group: int  # query heads of a key-value head
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, int]) -> "Size":
        """Read it from a config.json's contents."""
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_kv_heads=config["num_key_value_heads"],
            group=config["num_attention_heads"] // config["num_key_value_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
        )


LARGE = Size(hidden=4096, intermediate=14336, num_layers=32, num_kv_heads=16, group=4, head_dim=64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write_widened(parser.parse_args().out, LARGE)
    return 0


def write_widened(folder: Path, size: Size) -> None:
    """Write the folder; every dimension of `size` is at least the demo model's, and its head_dim the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in DEMO.glob("*.json"):
        shutil.copy(path, folder)
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((DEMO / "config.json").read_text("utf-8"))
    own = Size.of(config)
    config |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.num_layers,
        "num_key_value_heads": size.num_kv_heads,
        "num_attention_heads": size.num_kv_heads * size.group,
        "rms_norm_eps": config["rms_norm_eps"] * own.hidden / size.hidden,  # of a mean over more dimensions
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    tensors = {name: tensor for path in DEMO.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(dict(widened(tensors, own, size)), folder / "model.safetensors")


def widened(tensors: dict[str, torch.Tensor], own: Size, size: Size) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's tensors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last = f"model.layers.{own.num_layers - 1}."
    spare = [
        (name.replace(last, f"model.layers.{layer}."), torch.zeros_like(tensor))
        for layer in range(own.num_layers, size.num_layers)
        for name, tensor in tensors.items()
        if name.startswith(last)
    ]
    for name, tensor in [*tensors.items(), *spare]:
        wide = widen(name, tensor.to(device, torch.float32), own, size)
        parts = quantize(name.removesuffix(".weight"), wide) if LINEAR.search(name) else {name: wide.half()}
        yield from ((key, part.cpu().contiguous()) for key, part in parts.items())


def widen(name: str, tensor: torch.Tensor, own: Size, size: Size) -> torch.Tensor:
    """Return a tensor among zeros, at the places that the larger geometry gives its rows and columns."""
    if name.endswith("norm.weight"):
        return _among_zeros(tensor * (own.hidden / size.hidden) ** 0.5, (size.hidden,))
    if name.endswith("wqkv.weight"):  # the queries of each key-value head, its key, its value
        heads = tensor.view(own.num_kv_heads, own.group + 2, own.head_dim, own.hidden)
        shape = (size.num_kv_heads, size.group + 2, size.head_dim, size.hidden)
        wide = _among_zeros(heads[:, : own.group], shape)
        wide[: own.num_kv_heads, size.group :, :, : own.hidden] = heads[:, own.group :]
        return wide.view(-1, size.hidden)
    if name.endswith("wo.weight"):
        heads = tensor.view(own.hidden, own.num_kv_heads, own.group, own.head_dim)
        shape = (size.hidden, size.num_kv_heads, size.group, size.head_dim)
        return _among_zeros(heads, shape).view(size.hidden, -1)
    if name.endswith("w2.weight"):
        return _among_zeros(tensor, (size.hidden, size.intermediate))
    if LINEAR.search(name):
        return _among_zeros(tensor, (size.intermediate, size.hidden))
    return _among_zeros(tensor, (len(tensor), size.hidden))


def _among_zeros(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    wide = tensor.new_zeros(shape)
    wide[tuple(slice(0, length) for length in tensor.shape)] = tensor
    return wide


if __name__ == "__main__":
    sys.exit(main())
