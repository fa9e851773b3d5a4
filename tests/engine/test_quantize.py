"""Whole runs of the quantizer on tiny checkpoints of every family, read back by readers that share no code with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import FAMILY_CASES, NUM_KV_HEADS, FamilyCase, case_named, write_checkpoint
from quantize_runs import Interrupted, encode, quantize_folder, weight_files
from safetensors.torch import load_file

from lmdserve.engine import checkpoint_writer
from lmdserve.engine.api import ConfigError
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.quantize import awq, run
from lmdserve.engine.quantize.evaluation import evaluate
from lmdserve.engine.quantize.report import read_report
from lmdserve.engine.quantize.text import evaluation_windows, read_text

OPTIONS: dict[str, Any] = {
    "calib_samples": 8,
    "calib_seqlen": 64,
    "w_group_size": 32,
    "device": "cpu",
    "skip_evaluation": True,
}
TOKENS = torch.randint(3, 131, (60,), generator=torch.Generator().manual_seed(5)).tolist()


def checkpoint(case: FamilyCase, folder: Path) -> Path:
    return write_checkpoint(folder, case.config_json(), case.tensors(case.reference_model()))


def logits(folder: Path) -> torch.Tensor:
    """Return what the engine answers, in float32."""
    config = ModelConfig.from_folder(folder)
    decoder = load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"))
    return CacheDriver(decoder).run("prefill", TOKENS, [len(TOKENS)])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.id)
def test_folded_scales_change_nothing(case: FamilyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every linear kept in 16 bits, what is left of a run is the folding, which must cancel out."""
    source = checkpoint(case, tmp_path / "source")
    monkeypatch.setattr(awq, "_WORST_ERROR", -1.0)
    output = quantize_folder(source, tmp_path / "out", search_clip=False, **OPTIONS)
    original, folded = tensors_of(source), tensors_of(output)
    assert original.keys() == folded.keys()
    changed = [name for name in original if (original[name] - folded[name]).norm() > 0.01 * original[name].norm()]
    num_linears = sum(".layers." in name and name.endswith("weight") and "norm" not in name for name in original)
    assert len(changed) > num_linears / 2, "scales must have been found for this to mean something"
    expected, actual = logits(source), logits(output)
    # Every tensor was rounded to float16 once, a relative error of 2**-11 that two layers of attention enlarge.
    assert (actual - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("case", "symmetric"),
    [*((case, False) for case in FAMILY_CASES), (case_named("internlm2"), True), (case_named("qwen2.5-tied"), True)],
    ids=lambda value: value.id if isinstance(value, FamilyCase) else "symmetric" if value else "asymmetric",
)
def test_transformers_computes_the_same_from_our_files(case: FamilyCase, symmetric: bool, tmp_path: Path) -> None:
    """The files, dequantized here by the format's definition, in transformers' model: the logits of our engine."""
    source = checkpoint(case, tmp_path / "source")
    output = quantize_folder(source, tmp_path / "out", w_sym=symmetric, **OPTIONS)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    plain = dequantized(tensors_of(output))
    reference = case.reference_model()
    reference.load_state_dict(plain if case.rename is None else from_internlm2(plain), strict=False)
    missing = reference.state_dict().keys() - (plain if case.rename is None else from_internlm2(plain)).keys()
    assert missing <= {"lm_head.weight"}, "only a tied head may be absent"
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    assert (logits(output) - expected).abs().max() < 2e-3
    assert 0 < (logits(output) - logits(source)).norm() < 0.5 * logits(source).norm()


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return plain float32 weights: (code - zero) * scale, nibble i of a word being output [0,2,4,6,1,3,5,7][i]."""

    def nibbles(words: torch.Tensor) -> torch.Tensor:
        values = torch.empty(words.shape[0], words.shape[1] * 8)
        for position, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            values[:, output::8] = ((words >> (4 * position)) & 15).float()
        return values

    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            codes, zeros, scales = nibbles(tensor), nibbles(tensors[f"{module}.qzeros"]), tensors[f"{module}.scales"]
            size = codes.shape[0] // zeros.shape[0]
            weight = (codes - zeros.repeat_interleave(size, 0)) * scales.float().repeat_interleave(size, 0)
            plain[f"{module}.weight"] = weight.t()
        elif not name.endswith((".qzeros", ".scales")):
            plain[name] = tensor.float()
    return plain


def from_internlm2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename InternLM2's tensors to Llama's, taking wqkv apart by key-value heads."""
    names = {
        "model.tok_embeddings": "model.embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for internlm2, llama in names.items():
            name = name.replace(internlm2, llama)
        name = "lm_head.weight" if name == "output.weight" else name
        if "wqkv" not in name:
            renamed[name] = tensor
            continue
        heads = tensor.unflatten(0, (NUM_KV_HEADS, -1, 16))  # head_dim of the test's models
        for letter, part in zip("qkv", (heads[:, :-2], heads[:, -2], heads[:, -1]), strict=True):
            renamed[name.replace("attention.wqkv", f"self_attn.{letter}_proj")] = part.reshape(-1, *tensor.shape[1:])
    return renamed


def test_the_searches_lose_less_than_rounding_to_nearest(tmp_path: Path) -> None:
    """Some channels of a trained model are far larger than the others; here the norms make them so."""
    case = case_named("internlm2")
    tensors = case.tensors(case.reference_model())
    for name in tensors:
        if "attention_norm" in name or "ffn_norm" in name:
            tensors[name][::11] *= 10
    source = write_checkpoint(tmp_path / "source", case.config_json(), tensors)
    errors = {}
    for name, options in {
        "nearest": {"search_scale": False, "search_clip": False},
        "scale": {"search_clip": False},
        "both": {},
        "without text": {"calib_samples": 0},
    }.items():
        output = quantize_folder(source, tmp_path / name, **{**OPTIONS, **options})
        errors[name] = float((logits(output) - logits(source)).norm() / logits(source).norm())
    assert errors["scale"] < errors["nearest"]
    assert errors["both"] < errors["nearest"]
    assert errors["without text"] == errors["nearest"]


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(case_named("qwen2"), tmp_path / "source")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quantize_folder(source, whole, **OPTIONS)
    with pytest.raises(Interrupted):
        quantize_folder(source, parts, interrupt_at_layer=1, **OPTIONS)
    assert [path.name for path in parts.iterdir()] == [".quantize"], "what is not finished does not load"
    with pytest.raises(ConfigError, match="was interrupted; give --resume"):
        quantize_folder(source, parts, **OPTIONS)
    with pytest.raises(ConfigError, match=r"w_sym was False and is True.*--overwrite"):
        quantize_folder(source, parts, **OPTIONS, w_sym=True, resume=True)
    with monkeypatch.context() as later:
        later.setattr(run, "_SEARCH_VERSION", 1000)
        with pytest.raises(ConfigError, match=r"search was \d+ and is 1000"):
            quantize_folder(source, parts, **OPTIONS, resume=True)
    with pytest.raises(Interrupted):
        quantize_folder(source, parts, **OPTIONS, resume=True, overwrite=True, interrupt_at_layer=1)
    for _ in range(2):  # to the end, and once more: whoever asked may not have heard that it had ended
        quantize_folder(source, parts, **OPTIONS, resume=True)
        assert weight_files(parts) == weight_files(whole)
    assert not (parts / ".quantize").exists()


def test_a_linear_whose_sizes_do_not_fit_stays_in_16_bits_and_is_named(tmp_path: Path) -> None:
    """96 inputs of down do not divide into groups of 64; the other linears have 64."""
    source = checkpoint(case_named("internlm2"), tmp_path / "source")
    output = quantize_folder(source, tmp_path / "out", **{**OPTIONS, "w_group_size": 64})
    names = json.loads((output / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert names == [f"model.layers.{layer}.feed_forward.w2" for layer in range(2)]
    kept = [row for row in read_report(output).layers if row.bits == 16]
    assert [(row.layer, row.linear) for row in kept] == [(0, "feed_forward.w2"), (1, "feed_forward.w2")]
    assert kept[0].reason == "its 96 inputs do not divide into groups of 64"
    assert (logits(output) - logits(source)).norm() < 0.5 * logits(source).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_group_for_a_whole_row(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both types that layers are computed in: which one a CPU takes is its own matter."""
    monkeypatch.setattr("lmdserve.engine.quantize.run.compute_dtype", lambda device: dtype)
    source = checkpoint(case_named("llama2"), tmp_path / "source")
    output = quantize_folder(source, tmp_path / "out", **{**OPTIONS, "w_group_size": -1})
    assert tensors_of(output)["model.layers.0.mlp.down_proj.scales"].shape == (1, 64)
    assert (logits(output) - logits(source)).norm() < 0.6 * logits(source).norm()


def test_what_float16_cannot_hold_becomes_bfloat16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = case_named("llama2")
    tensors = case.tensors(case.reference_model())
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e3
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e3  # the hidden states reach some 1e6
    source = write_checkpoint(tmp_path / "source", case.config_json(), tensors)
    output = quantize_folder(source, tmp_path / "out", **OPTIONS)
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert tensors_of(output)["lm_head.weight"].dtype == torch.bfloat16
    assert "activations reach" in caplog.text
    assert (logits(output) - logits(source)).norm() < 0.5 * logits(source).norm()


def test_a_weight_that_float16_cannot_hold_is_refused_when_float16_is_asked_for(tmp_path: Path) -> None:
    case = case_named("llama2")
    tensors = case.tensors(case.reference_model())
    tensors["lm_head.weight"][0, 0] = 1e5
    source = write_checkpoint(tmp_path / "source", case.config_json(), tensors)
    with pytest.raises(ConfigError, match="reaches 100000, and float16 ends at 65504; leave --dtype out"):
        quantize_folder(source, tmp_path / "out", **OPTIONS, dtype="float16")


def test_the_report_tells_what_it_cost(tmp_path: Path) -> None:
    source = checkpoint(case_named("qwen3"), tmp_path / "source")
    options = {**OPTIONS, "skip_evaluation": False, "eval_tokens": 512}
    report = read_report(quantize_folder(source, tmp_path / "out", **options))
    assert report.quality is not None
    assert [(row.weights, row.kv_bits) for row in report.quality.rows] == [
        ("16-bit", 16),
        ("4-bit", 16),
        ("4-bit", 8),
        ("4-bit", 4),
    ]
    original, *quantized = report.quality.rows
    assert (original.kl_divergence, original.top1_agreement) == (0.0, 1.0)
    divergences = [row.kl_divergence or 0.0 for row in quantized]
    assert 0 < divergences[0] < divergences[2]
    # The 16-bit answers, computed a layer at a time, are those of the engine.
    text = read_text("builtin", data_dir=None, split="evaluation", encode=encode, encode_chat=None)
    windows = evaluation_windows(text, seqlen=256, max_tokens=512)
    (by_the_engine,) = evaluate(source, windows, device=torch.device("cpu"), kv_policies=(0,))
    assert original.perplexity == pytest.approx(by_the_engine.perplexity, rel=1e-4)
    assert [row.layer for row in report.layers] == [0] * 4 + [1] * 4
    assert all(0 < (row.relative_error or 0.0) < 0.4 for row in report.layers)
    assert report.size_bytes.after < 0.5 * report.size_bytes.before
    assert report.time_s.keys() == {"read", "search", "write", "evaluate"}


def test_a_scale_past_the_range_of_its_type_keeps_all_parts_of_a_product(tmp_path: Path) -> None:
    """gate and up are one product for the engine, so a weight of up that float16 cannot scale keeps gate as well."""
    case = case_named("llama2")
    tensors = case.tensors(case.reference_model())
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e7
    source = write_checkpoint(tmp_path / "source", case.config_json(), tensors)
    output = quantize_folder(source, tmp_path / "out", **OPTIONS, search_scale=False, search_clip=False)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert logits(output).isfinite().all()


@pytest.mark.parametrize("name", ["model.layers.1.feed_forward.w3.weight", "output.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    case = case_named("internlm2")
    tensors = case.tensors(case.reference_model())
    tensors[name][1, 2] = value
    source = write_checkpoint(tmp_path / "source", case.config_json(), tensors)
    with pytest.raises(ConfigError, match=f"tensor {name} holds NaN or infinity"):
        quantize_folder(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_would_be_lost_is_named(tmp_path: Path) -> None:
    case = case_named("llama2")
    tensors = case.tensors(case.reference_model())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old checkpoints have it; it is not missed
    source = write_checkpoint(tmp_path / "source", case.config_json(), tensors)
    quantize_folder(source, tmp_path / "out", **{**OPTIONS, "calib_samples": 0})
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    write_checkpoint(source, case.config_json(), tensors)
    with pytest.raises(ConfigError, match=r"1 tensors that a Llama model does not use, such as .*q_norm\.weight"):
        quantize_folder(source, tmp_path / "other", **OPTIONS)


def test_a_disk_that_is_too_full_is_seen_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(case_named("llama2"), tmp_path / "source")
    monkeypatch.setattr(checkpoint_writer, "_free_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match=r"takes up to 0\.0\d GB and its disk has 0\.00 GB free"):
        quantize_folder(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calib_seqlen": 300}, "--calib-seqlen 300 is longer than the model's context of 256"),
        (
            {"w_group_size": 128},
            "nothing of .* can be quantized like this .*64 inputs do not divide into groups of 128",
        ),
        ({"skip_evaluation": False, "eval_dataset": "no.txt"}, r"'no\.txt' is neither a file nor a data set"),
        ({"calib_dataset": "wikitext3"}, "'wikitext3' is neither a file nor a data set"),
        ({"device": "cuda"}, "torch finds no GPU"),
    ],
)
def test_options_that_cannot_be_followed(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = checkpoint(case_named("llama2"), tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        quantize_folder(source, tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_folders_that_may_not_be_written_to(tmp_path: Path) -> None:
    source = checkpoint(case_named("llama2"), tmp_path / "source")
    with pytest.raises(ConfigError, match="is the folder of the model itself"):
        quantize_folder(source, source, **OPTIONS, overwrite=True)
    output = quantize_folder(source, tmp_path / "out", **OPTIONS)
    before = weight_files(output)
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        quantize_folder(source, output, **OPTIONS)
    with pytest.raises(ConfigError, match="is quantized already"):
        quantize_folder(output, tmp_path / "again", **OPTIONS)
    assert weight_files(output) == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        quantize_folder(source, tmp_path / "file", **OPTIONS)
    quantize_folder(source, output, **OPTIONS, overwrite=True)
    assert weight_files(output) == before
