"""The shipped files: sizes that fit a repository, InternLM2's names and shapes, matrices that can be quantized."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from lmdserve.demo.export import config_json
from lmdserve.demo.network import Shape

MAX_TOTAL_BYTES = 24_000_000
MAX_SHARD_BYTES = 16_000_000
GROUP_SIZE = 128


@pytest.fixture(scope="module")
def tensors(model_folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for shard in model_folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                view = file.get_slice(name)
                found[name] = (tuple(view.get_shape()), view.get_dtype())
    return found


def test_sizes(model_folder: Path) -> None:
    assert sum(path.stat().st_size for path in model_folder.iterdir()) <= MAX_TOTAL_BYTES
    shards = sorted(model_folder.glob("*.safetensors"))
    numbers = range(1, len(shards) + 1)
    assert [shard.name for shard in shards] == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in numbers]
    assert all(shard.stat().st_size < MAX_SHARD_BYTES for shard in shards)


def test_files_of_a_hub_repository(model_folder: Path) -> None:
    names = {path.name for path in model_folder.iterdir() if path.suffix != ".safetensors"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names == tokenizer | {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"}


def test_index_names_every_tensor_where_it_is(model_folder: Path, tensors) -> None:
    index = json.loads((model_folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    for name, shard in index["weight_map"].items():
        with safe_open(model_folder / shard, framework="pt") as file:
            assert name in set(file.keys())


def test_config_is_the_one_of_the_trained_shape(model_folder: Path) -> None:
    assert json.loads((model_folder / "config.json").read_text()) == config_json(Shape())


def test_names_shapes_and_type_are_internlm2s(tensors) -> None:
    shape = Shape()
    hidden, inner, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    fused = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (vocab, hidden),
    }
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}."
        expected |= {
            f"{layer}attention_norm.weight": (hidden,),
            f"{layer}attention.wqkv.weight": (fused, hidden),
            f"{layer}attention.wo.weight": (hidden, hidden),
            f"{layer}ffn_norm.weight": (hidden,),
            f"{layer}feed_forward.w1.weight": (inner, hidden),
            f"{layer}feed_forward.w3.weight": (inner, hidden),
            f"{layer}feed_forward.w2.weight": (hidden, inner),
        }
    assert {name: size for name, (size, _) in tensors.items()} == expected
    assert {dtype for _, dtype in tensors.values()} == {"BF16"}


def test_inner_sizes_fit_groups_of_weights(tensors) -> None:
    assert all(size[1] % GROUP_SIZE == 0 for size, _ in tensors.values() if len(size) == 2)


def test_model_card_tells_what_matters(model_folder: Path) -> None:
    card = (model_folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Training", "## Scores", "## Limits"):
        assert heading in card
