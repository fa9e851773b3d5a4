"""Conversions are exact: codes, zero points and scales bit for bit, plain weights the numbers they stand for."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import Tensors, case_named
from packed_checkpoints import (
    FORMATS,
    Linear,
    LinearSource,
    in_internlm2_naming,
    quantization_config,
    quantized_model,
    write_quantized,
)
from safetensors.torch import load_file, save_file

from lmdserve.engine import checkpoint_writer
from lmdserve.engine.api import ConfigError
from lmdserve.engine.convert import convert_checkpoint
from lmdserve.engine.convert_options import ConvertOptions
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig

# Which of packed_checkpoints' writers a conversion must agree with, for weights in order and symmetric, and so on.
WRITTEN_AS = {
    ("awq", "asymmetric"): "awq",
    ("gptq", "asymmetric"): "gptq-v2",
    ("gptq", "symmetric"): "gptq-sym",
    ("gptq", "reordered"): "gptq-v2-act-order",
    ("compressed-tensors", "asymmetric"): "ct-asym",
    ("compressed-tensors", "symmetric"): "ct-sym",
    ("compressed-tensors", "reordered"): "ct-group-order",
}


def kind_of(format_name: str) -> str:
    form = FORMATS[format_name]
    return "reordered" if form.reorders_inputs else "symmetric" if form.is_symmetric else "asymmetric"


def source(folder: Path, format_name: str, case_id: str = "internlm2", **more: Any) -> tuple[Path, dict[str, Linear]]:
    case, form = case_named(case_id), FORMATS[format_name]
    model, linears = quantized_model(case, LinearSource(form, more.pop("group_size", 32)), skip=more.pop("skip", ()))
    section = quantization_config(form, 32) | more.pop("quantization", {})
    write_quantized(folder, case, model, linears, form, section, torch_dtype="float16", **more)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder, linears if case.rename is None else in_internlm2_naming(linears)


def convert(folder: Path, output: Path, **options: Any) -> Tensors:
    convert_checkpoint(folder, output, ConvertOptions(**options))
    return load_file(output / "model.safetensors")


def assert_equal_tensors(ours: Tensors, expected: Tensors) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def logits(folder: Path) -> torch.Tensor:
    decoder = load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float32, device=torch.device("cpu"))
    numbers = random.Random(5)
    return CacheDriver(decoder).run("all", [numbers.randrange(131) for _ in range(20)], [20])


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_becomes_every_other_bit_for_bit(format_name: str, to: str, tmp_path: Path) -> None:
    """What is written is what an independent packer makes of the same codes; what it computes is the same bits."""
    folder, linears = source(tmp_path / "source", format_name)
    kind = kind_of(format_name)
    if to == "awq" and kind == "reordered":
        with pytest.raises(ConfigError, match=r"runs of neighbours only.*--to hf"):
            convert(folder, tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()
        return
    tensors = convert(folder, tmp_path / "out", to=to)
    form = FORMATS[WRITTEN_AS.get((to, kind), "awq")]
    expected = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.rpartition(".")[0] not in linears
    }
    for name, linear in linears.items():
        expected |= {f"{name}.{suffix}": tensor for suffix, tensor in form.write(linear).items()}
    assert_equal_tensors(tensors, expected)
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 2}
    assert (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize("format_name", ["awq", "gptq-act-order", "ct-sym", "ct-group-order"])
def test_16_bit_weights_are_the_numbers_that_the_codes_stand_for(format_name: str, tmp_path: Path) -> None:
    folder, linears = source(tmp_path / "source", format_name)
    exact = convert(folder, tmp_path / "exact", to="hf", dtype="float32")
    rounded = convert(folder, tmp_path / "rounded", to="hf")
    for name, linear in linears.items():
        assert torch.equal(exact[f"{name}.weight"], linear.weight())
        assert torch.equal(rounded[f"{name}.weight"], linear.weight().half())
    config = json.loads((tmp_path / "exact/config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    assert rounded["model.norm.weight"].dtype == torch.float32  # auto leaves what was not quantized as it is
    assert (logits(tmp_path / "exact") - logits(folder)).abs().max() <= 1e-4


@pytest.mark.parametrize("first", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("second", ["gptq", "compressed-tensors"])
def test_there_and_back_again(first: str, second: str, tmp_path: Path) -> None:
    folder, _ = source(tmp_path / "source", "awq", "qwen2")
    convert(folder, tmp_path / "first", to=first)
    convert(tmp_path / "first", tmp_path / "second", to=second)
    back = convert(tmp_path / "second", tmp_path / "back", to="awq")
    assert_equal_tensors(back, load_file(folder / "model.safetensors"))
    sections = [
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path / "back")
    ]
    assert sections[1] == {**sections[0], "modules_to_not_convert": None}


def test_an_order_of_inputs_survives(tmp_path: Path) -> None:
    folder, _ = source(tmp_path / "source", "gptq-v2-act-order", "llama2")
    convert(folder, tmp_path / "compressed", to="compressed-tensors")
    back = convert(tmp_path / "compressed", tmp_path / "back", to="gptq")
    assert_equal_tensors(back, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors", "hf"])
def test_plain_linears_stay_plain(to: str, tmp_path: Path) -> None:
    folder, _ = source(
        tmp_path / "source", "awq", "llama2", skip=("down_proj", "1.self_attn.o_proj"),
        quantization={"modules_to_not_convert": ["down_proj", "layers.1.self_attn.o_proj"]},
    )  # fmt: skip
    converted = convert(folder, tmp_path / "out", to=to)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(converted[name], load_file(folder / "model.safetensors")[name])
    assert (logits(tmp_path / "out") - logits(folder)).abs().max() <= (1e-2 if to == "hf" else 0)


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors"])
def test_scales_keep_their_type_and_one_group_stays_one(to: str, tmp_path: Path) -> None:
    form = FORMATS["gptq-static-groups"]
    folder, _ = source(
        tmp_path / "source", "gptq-static-groups", group_size=-1, quantization=quantization_config(form, -1)
    )
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith(".scales")}
    save_file(tensors | scales, folder / "model.safetensors")
    converted = convert(folder, tmp_path / "out", to=to)
    name = "model.layers.0.feed_forward.w2."
    ours = converted[name + ("weight_scale" if to == "compressed-tensors" else "scales")]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.flatten(), scales[name + "scales"].flatten())
    assert torch.equal(logits(tmp_path / "out"), logits(folder))


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = source(tmp_path / "source", "awq")
    convert_checkpoint(folder, tmp_path / "one", ConvertOptions(to="gptq"))
    monkeypatch.setattr(checkpoint_writer, "_MAX_SHARD_BYTES", 20_000)
    convert_checkpoint(folder, tmp_path / "many", ConvertOptions(to="gptq"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[1] == f"model-00002-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    joined = {name: tensor for file in files for name, tensor in load_file(tmp_path / "many" / file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in joined.values())
    assert_equal_tensors(joined, load_file(tmp_path / "one/model.safetensors"))
    assert torch.equal(logits(tmp_path / "many"), logits(folder))


def test_pytorch_files_are_read_too(tmp_path: Path) -> None:
    folder, _ = source(tmp_path / "source", "gptq-act-order")
    expected = convert(folder, tmp_path / "one", to="compressed-tensors")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.rotary_emb.inv_freq"] = tensors["model.norm.weight"][:8]  # kept as it is, and shares memory
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    expected["model.rotary_emb.inv_freq"] = tensors["model.rotary_emb.inv_freq"]
    assert_equal_tensors(convert(folder, tmp_path / "two", to="compressed-tensors"), expected)
    assert not (tmp_path / "two/pytorch_model.bin").exists()


def plain(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def infinite_scale(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.feed_forward.w2.scales"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors")


def large_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors")


def without_scales(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.feed_forward.w2.scales"]
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.feed_forward.w2.scales"] = torch.ones(3, 8)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("break_it", "options", "complaint"),
    [
        (plain, {"to": "gptq"}, "lmdserve quantize"),
        (infinite_scale, {"to": "gptq"}, r"layers\.1\.feed_forward\.w2\.scales has values that are not finite"),
        (infinite_scale, {"to": "hf"}, r"layers\.1\.feed_forward\.w2\.weight has values that are not finite"),
        (large_norm, {"to": "hf", "dtype": "float16"}, r"model\.norm\.weight.*bfloat16"),
        (without_scales, {"to": "gptq"}, "lacks tensor model.layers.1.feed_forward.w2.scales"),
        (wrong_shape, {"to": "gptq"}, r"w2.scales is torch.float32 \[3, 8\]"),
        (None, {"to": "gptq", "dtype": "float16"}, "--dtype is for --to hf"),
        (None, {}, "--to is missing"),
    ],
)
def test_what_cannot_be_converted_says_why_and_leaves_nothing(
    break_it: Any, options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder, _ = source(tmp_path / "source", "awq")
    if break_it is not None:
        break_it(folder)
    with pytest.raises(ConfigError, match=complaint):
        convert(folder, tmp_path / "new" / "out", **options)
    assert not (tmp_path / "new").exists()


def test_groups_of_several_sizes_are_refused(tmp_path: Path) -> None:
    section = quantization_config(FORMATS["gptq"], 32) | {"dynamic": {"+:.*w2": {"group_size": 16}}}
    folder, _ = source(tmp_path / "source", "gptq", quantization=section)
    with pytest.raises(ConfigError, match="groups of 16, 32 inputs"):
        convert(folder, tmp_path / "out", to="awq")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    folder, _ = source(tmp_path / "source", "awq")
    for output in (folder, tmp_path):
        before = sorted(output.iterdir())
        with pytest.raises(ConfigError, match="no empty folder"):
            convert(folder, output, to="gptq")
        assert sorted(output.iterdir()) == before


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = source(tmp_path / "source", "awq")
    monkeypatch.setattr(checkpoint_writer, "_free_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match=r"takes up to 0\.03 GB and its disk has 0\.00 GB free"):
        convert(folder, tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = source(tmp_path / "source", "awq")
    monkeypatch.setattr(checkpoint_writer, "_MAX_SHARD_BYTES", 20_000)

    def interrupt(path: Path, value: object) -> None:
        assert len(list(tmp_path.glob("out/*.safetensors"))) > 3
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_writer, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()
