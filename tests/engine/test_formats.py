"""Quantized checkpoints compute what transformers computes with the weights that they stand for, in every format.

The checkpoints are written by packers of plain loops (packed_checkpoints.py); the reference words of other tools are
held to in test_format_words.py.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import case_named, interleave, write_checkpoint
from packed_checkpoints import (
    FORMATS,
    LinearSource,
    awq,
    compressed_config,
    gptq,
    pack,
    quantization_config,
    quantized_model,
    reference_logits,
    signed,
    write_quantized,
)
from safetensors.torch import load_file, save_file

from lmdserve.engine.api import ConfigError
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig

TOKENS = [random.Random(4).randrange(131) for _ in range(40)]
FAMILIES = ("internlm2", "llama2", "qwen2")  # wqkv; q, k and v joined; the same with biases
OTHER_FAMILIES = ("internlm2-bias", "internlm3-bias", "qwen3")


def logits(folder: Path) -> torch.Tensor:
    decoder = load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float32, device=torch.device("cpu"))
    return CacheDriver(decoder).run("all", TOKENS, [30, 1])


def assert_equals_transformers(
    folder: Path,
    format_name: str,
    case_id: str = "llama2",
    *,
    group_size: int = 32,
    shares_orders: bool = True,
    skip: tuple[str, ...] = (),
    quantization: dict[str, Any] | None = None,
    **sizes: int,
) -> None:
    case, form = case_named(case_id), FORMATS[format_name]
    source = LinearSource(form, group_size, shares_orders=shares_orders)
    model, linears = quantized_model(case, source, skip=skip, **sizes)
    config = quantization_config(form, group_size) | (quantization or {})
    write_quantized(folder, case, model, linears, form, config, **sizes)
    expected = reference_logits(model, TOKENS)
    assert expected.std() > 0.1
    assert (logits(folder) - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("case_id", FAMILIES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_equals_its_dequantized_model(format_name: str, case_id: str, tmp_path: Path) -> None:
    assert_equals_transformers(tmp_path, format_name, case_id)


@pytest.mark.parametrize("case_id", OTHER_FAMILIES)
@pytest.mark.parametrize("format_name", ["awq", "gptq-act-order", "ct-group-order"])
def test_other_families(format_name: str, case_id: str, tmp_path: Path) -> None:
    assert_equals_transformers(tmp_path, format_name, case_id)


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("format_name", ["awq", "awq-sym", "gptq", "gptq-static-groups", "ct-sym", "ct-asym"])
def test_other_groups(format_name: str, group_size: int, tmp_path: Path) -> None:
    assert_equals_transformers(tmp_path, format_name, group_size=group_size)


def test_one_group_has_no_order(tmp_path: Path) -> None:
    """With desc_act and one group for all inputs there is nothing to reorder."""
    assert_equals_transformers(tmp_path, "gptq-static-groups", "internlm2", group_size=-1)


@pytest.mark.parametrize(("hidden", "inner", "group_size"), [(128, 256, 128), (128, 192, 64)])
@pytest.mark.parametrize("format_name", ["awq", "awq-gemv", "gptq-act-order"])
def test_larger_groups(format_name: str, hidden: int, inner: int, group_size: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    assert_equals_transformers(tmp_path, format_name, "internlm2", group_size=group_size, **sizes)


@pytest.mark.parametrize("format_name", ["gptq-act-order", "ct-group-order"])
def test_joined_products_may_have_their_inputs_in_different_orders(format_name: str, tmp_path: Path) -> None:
    assert_equals_transformers(tmp_path, format_name, "qwen2", shares_orders=False)


@pytest.mark.parametrize(
    ("format_name", "skip", "quantization"),
    [
        ("awq", ("down_proj", "layers.1.self_attn.o_proj"), {"modules_to_not_convert": ["down_proj", "1.self_attn.o"]}),
        ("gptq-act-order", ("down_proj", "1.self_attn.o"), {"dynamic": {"-:.*down_proj": {}, "-:.*1.self_attn.o": {}}}),
        ("gptq", ("mlp.gate", "mlp.up"), {"modules_in_block_to_quantize": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"], ["mlp.down_proj"]]}),
        ("gptq-act-order", ("gate_proj", "up_proj"), {"dynamic": {r"-:.*\.(gate|up)_proj$": {}}}),
        ("ct-group-order", ("mlp", "layers.1.self_attn.o"),
         {"ignore": ["lm_head", "re:.*mlp.*", "model.layers.1.self_attn.o_proj"]}),
    ],
)  # fmt: skip
def test_some_linears_stay_plain(
    format_name: str, skip: tuple[str, ...], quantization: dict[str, Any], tmp_path: Path
) -> None:
    assert_equals_transformers(tmp_path, format_name, skip=skip, quantization=quantization)


def test_targets_name_the_linears_of_a_group(tmp_path: Path) -> None:
    section = quantization_config(FORMATS["ct-sym"], 32)
    section["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*", "model.layers.0.mlp.down_proj"]
    skip = ("gate_proj", "up_proj", "1.mlp")
    assert_equals_transformers(tmp_path, "ct-sym", skip=skip, quantization=section)


@pytest.mark.parametrize(
    ("format_name", "file", "section"),
    [
        ("gptq-act-order", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": True}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_the_config_may_lie_in_a_file_of_its_own(
    format_name: str, file: str, section: dict[str, Any], tmp_path: Path
) -> None:
    case, form = case_named("llama2"), FORMATS[format_name]
    model, linears = quantized_model(case, LinearSource(form, 32))
    write_quantized(tmp_path, case, model, linears, form, {})
    (tmp_path / "config.json").write_text(json.dumps(case.config_json()))
    with pytest.raises(ConfigError, match="needs its quantization_config"):
        logits(tmp_path)
    (tmp_path / file).write_text(json.dumps(section))
    assert (logits(tmp_path) - reference_logits(model, TOKENS)).abs().max() <= 1e-3


def changed_tensor(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors.get(name))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("format_name", "suffix", "change", "complaint"),
    [
        ("gptq", "g_idx", lambda index: index.flip(0), "desc_act true"),
        ("gptq-act-order", "g_idx", lambda index: index.clamp(max=0), "does not put 32 inputs into each of 2 groups"),
        ("gptq-act-order", "g_idx", lambda index: index[:-8].clone(), r"shape \[56\]"),
        ("gptq", "bias", lambda _: torch.ones(64), "config.json says that this linear has none"),
        ("ct-sym", "weight_shape", lambda shape: shape.flip(0) + 1, r"says \[65, 65\], and config.json"),
        ("ct-sym", "weight_zero_point", lambda _: torch.zeros(8, 2, dtype=torch.int32), "does not use"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    format_name: str, suffix: str, change: Any, complaint: str, tmp_path: Path
) -> None:
    case, form = case_named("llama2"), FORMATS[format_name]
    model, linears = quantized_model(case, LinearSource(form, 32))
    write_quantized(tmp_path, case, model, linears, form, quantization_config(form, 32))
    changed_tensor(tmp_path, f"model.layers.1.self_attn.o_proj.{suffix}", change)
    with pytest.raises(ConfigError, match=complaint):
        logits(tmp_path)


def test_leftovers_of_writers_are_let_pass(tmp_path: Path) -> None:
    """AutoGPTQ adds a bias of zeros to every linear; compressed-tensors may keep an order that was never set."""
    for format_name, name, leftover in (
        ("gptq", "bias", torch.zeros(64)),
        ("ct-asym", "weight_g_idx", torch.full((64,), -1, dtype=torch.int32)),
    ):
        case, form = case_named("llama2"), FORMATS[format_name]
        model, linears = quantized_model(case, LinearSource(form, 32))
        folder = write_quantized(tmp_path / format_name, case, model, linears, form, quantization_config(form, 32))
        changed_tensor(folder, f"model.layers.1.self_attn.o_proj.{name}", lambda _, leftover=leftover: leftover)
        assert (logits(folder) - reference_logits(model, TOKENS)).abs().max() <= 1e-3


def test_half_of_a_fused_product_cannot_stay_plain(tmp_path: Path) -> None:
    case = case_named("internlm2")
    section = awq(group_size=32, modules_to_not_convert=["w1"])
    write_checkpoint(tmp_path, case.config_json(quantization_config=section), case.tensors(case.reference_model()))
    with pytest.raises(ConfigError, match=r"w1.*w3.*one product"):
        logits(tmp_path)


def test_the_splitting_of_wqkv_is_by_output_column() -> None:
    """The interleaving of words must be the interleaving of the outputs that they pack."""
    codes = np.random.default_rng(2).integers(16, size=(4, 128))
    q, k, v = np.split(codes, [64, 96], 1)
    by_row = interleave(*(torch.from_numpy(part.T.copy()) for part in (q, k, v)))
    by_word = interleave(*(signed(pack(part)).t() for part in (q, k, v)))
    assert torch.equal(signed(pack(by_row.t().numpy())), by_word.t())


def nested(section: dict[str, Any], *, weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Change keys of the group of config_groups, and of the weights in it."""
    group = section["config_groups"]["group_0"]
    changed = {**group, **changes, "weights": {**group["weights"], **(weights or {})}}
    return {**section, "config_groups": {"group_0": changed}}


CT = nested(compressed_config(), weights={"group_size": 32})


@pytest.mark.parametrize(
    ("quantization", "complaint"),
    [
        (awq(group_size=48), "group_size 48"),
        (awq(group_size=32, bits=3), "3 bits"),
        (awq("gemv_fast", group_size=32), "gemv_fast"),
        (awq("marlin", group_size=32), "marlin"),
        (awq(group_size=0), "group_size 0"),
        (awq(group_size=32, bits=None), "'bits' is missing"),
        (awq(group_size=32, zero_point=None), "'zero_point' is missing"),
        (awq(group_size=32, zero_point=False), r"qzeros.*does not use|does not use.*qzeros"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        (gptq(group_size=32, bits=8), "8 bits.*lmdserve quantize"),
        (gptq(group_size=32, bits=3), "3 bits"),
        (gptq(group_size=32, checkpoint_format="marlin"), "marlin"),
        (gptq(group_size=32, is_marlin_format=True), "marlin"),
        (gptq(group_size=32, pack_dtype="int16"), "int16"),
        (gptq(group_size=32, lm_head=True), "lm_head"),
        (gptq(group_size=32, dynamic={"+:.*down.*": {"bits": 8}}), "8 bits"),
        (gptq(group_size=32, dynamic={"-:(": {}}), "regular expression"),
        (gptq(group_size=32, dynamic={"+:.*up_proj": {"group_size": 16}}), "one product"),
        ({**CT, "format": "marlin-24"}, "marlin-24"),
        ({**CT, "format": "int-quantized"}, "int-quantized"),
        ({**CT, "quantization_status": "frozen"}, "frozen"),
        ({**CT, "sparsity_config": {"format": "sparse-bitmask"}}, "sparse"),
        ({**CT, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**CT, "transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
        ({**CT, "ignore": []}, "output head"),
        ({**CT, "config_groups": {}}, "names no linears"),
        (nested(CT, input_activations={"num_bits": 8}), "input_activations"),
        (nested(CT, weights={"num_bits": 8}), "8 bits"),
        (nested(CT, weights={"type": "float"}), "float"),
        (nested(CT, weights={"strategy": "tensor"}), "tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(quantization: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    case, form = case_named("llama2"), FORMATS["awq"]
    model, linears = quantized_model(case, LinearSource(form, 32))
    write_quantized(tmp_path, case, model, linears, form, quantization)
    with pytest.raises(ConfigError, match=complaint):
        logits(tmp_path)


def test_quantized_weights_without_their_config_say_so(tmp_path: Path) -> None:
    case, form = case_named("llama2"), FORMATS["awq"]
    model, linears = quantized_model(case, LinearSource(form, 32))
    write_quantized(tmp_path, case, model, linears, form, quantization_config(form, 32))
    (tmp_path / "config.json").write_text(json.dumps(case.config_json()))
    with pytest.raises(ConfigError, match="needs its quantization_config"):
        logits(tmp_path)
