"""AWQ checkpoints compute what the same model with dequantized weights computes, in both namings.

The checkpoints are written here by a packer of plain loops; the layout's own tests hold it to reference words.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import FamilyCase, Tensors, case_named, interleave, write_checkpoint

from lmdserve.engine.api import ConfigError
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
TOKENS = [random.Random(4).randrange(131) for _ in range(40)]
NAMINGS = ("internlm2", "internlm2-bias", "llama2", "internlm3-bias", "qwen2")


def pack(values: np.ndarray) -> torch.Tensor:
    """Pack [rows, columns] of 0..15 into AWQ words by the definition, one nibble at a time."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for word in range(columns // 8):
        for nibble, column in enumerate(AWQ_COLUMNS):
            words[:, word] |= values[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


class AwqWriter:
    """Turns every linear of a state dict into random AWQ tensors and the plain weight those stand for."""

    def __init__(self, *, group_size: int, zero_point: bool, skip: tuple[str, ...] = ()) -> None:
        self.group_size = group_size
        self.zero_point = zero_point
        self.skip = skip
        self.random = np.random.default_rng(9)

    def quantize(self, state: Tensors) -> tuple[Tensors, Tensors]:
        quantized: Tensors = {}
        plain: Tensors = {}
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            if tensor.dim() != 2 or any(part in name for part in (*self.skip, "embed", "output.", "lm_head")):
                quantized[name] = plain[name] = tensor
            else:
                assert kind == "weight"
                tensors, plain[name] = self._linear(*tensor.shape)
                quantized |= {f"{module}.{suffix}": value for suffix, value in tensors.items()}
        return quantized, plain

    def _linear(self, out_features: int, in_features: int) -> tuple[Tensors, torch.Tensor]:
        group_size = in_features if self.group_size == -1 else self.group_size
        groups = in_features // group_size
        codes = self.random.integers(16, size=(in_features, out_features))
        zeros = (
            self.random.integers(5, 11, size=(groups, out_features))
            if self.zero_point
            else np.full((groups, out_features), 8)
        )
        scales = self.random.uniform(0.02, 0.08, size=(groups, out_features)).astype(np.float16)
        weight = (codes - zeros.repeat(group_size, 0)) * scales.astype(np.float32).repeat(group_size, 0)
        tensors = {"qweight": pack(codes), "scales": torch.from_numpy(scales)}
        if self.zero_point:
            tensors["qzeros"] = pack(zeros)
        return tensors, torch.from_numpy(weight.T.astype(np.float32))


def awq_config(case: FamilyCase, group_size: int, zero_point: bool, **more: Any) -> dict[str, Any]:
    section = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": zero_point}
    return case.config_json(quantization_config={**section, **more}, torch_dtype="float16")


def logits(folder: Path, tokens: list[int] = TOKENS) -> torch.Tensor:
    decoder = load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float32, device=torch.device("cpu"))
    return CacheDriver(decoder).run("all", tokens, [30, 1])


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [32, 16, -1])
@pytest.mark.parametrize("case_id", NAMINGS)
def test_awq_equals_its_dequantized_model(case_id: str, group_size: int, zero_point: bool, tmp_path: Path) -> None:
    case = case_named(case_id)
    state = case.tensors(case.reference_model())
    quantized, plain = AwqWriter(group_size=group_size, zero_point=zero_point).quantize(state)
    awq = logits(write_checkpoint(tmp_path / "awq", awq_config(case, group_size, zero_point), quantized))
    expected = logits(write_checkpoint(tmp_path / "plain", case.config_json(), plain))
    assert expected.std() > 0.1
    assert (awq - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("hidden", "inner", "group_size"), [(128, 256, 128), (128, 192, 64)])
def test_larger_groups(hidden: int, inner: int, group_size: int, tmp_path: Path) -> None:
    case = case_named("internlm2")
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    writer = AwqWriter(group_size=group_size, zero_point=True)
    quantized, plain = writer.quantize(case.tensors(case.reference_model(**sizes)))
    awq = logits(write_checkpoint(tmp_path / "awq", awq_config(case, group_size, True) | sizes, quantized))
    expected = logits(write_checkpoint(tmp_path / "plain", case.config_json(**sizes), plain))
    assert (awq - expected).abs().max() <= 1e-4


def test_modules_to_not_convert_stay_plain(tmp_path: Path) -> None:
    case = case_named("internlm2")
    skip = ("feed_forward.w2", "layers.1.attention.wqkv")
    writer = AwqWriter(group_size=32, zero_point=True, skip=skip)
    quantized, plain = writer.quantize(case.tensors(case.reference_model()))
    config = awq_config(case, 32, True, modules_to_not_convert=list(skip))
    awq = logits(write_checkpoint(tmp_path / "awq", config, quantized))
    assert (awq - logits(write_checkpoint(tmp_path / "plain", case.config_json(), plain))).abs().max() <= 1e-4


def test_half_of_a_fused_product_cannot_stay_plain(tmp_path: Path) -> None:
    case = case_named("internlm2")
    config = awq_config(case, 32, True, modules_to_not_convert=["w1"])
    with pytest.raises(ConfigError, match=r"w1.*w3.*one product"):
        logits(write_checkpoint(tmp_path, config, case.tensors(case.reference_model())))


def test_the_splitting_of_wqkv_is_by_output_column() -> None:
    """The interleaving of words must be the interleaving of the outputs that they pack."""
    codes = np.random.default_rng(2).integers(16, size=(4, 128))
    q, k, v = np.split(codes, [64, 96], 1)
    by_row = interleave(*(torch.from_numpy(part.T.copy()) for part in (q, k, v)))
    by_word = interleave(*(pack(part).t() for part in (q, k, v)))
    assert torch.equal(pack(by_row.t().numpy()), by_word.t())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"group_size": 48}, "group_size 48"),
        ({"bits": 3}, "3 bits"),
        ({"version": "gemv"}, "gemv"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"group_size": 0}, "group_size 0"),
        ({"bits": None}, "'bits' is missing"),
        ({"zero_point": None}, "'zero_point' is missing"),
        ({"zero_point": False}, r"qzeros.*does not use|does not use.*qzeros"),
    ],
)
def test_what_awq_cannot_hold_is_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    case = case_named("internlm2")
    quantized, _ = AwqWriter(group_size=32, zero_point=True).quantize(case.tensors(case.reference_model()))
    config = awq_config(case, 32, True)
    config["quantization_config"] |= changes
    with pytest.raises(ConfigError, match=complaint):
        logits(write_checkpoint(tmp_path, config, quantized))


def test_quantized_weights_without_their_config_say_so(tmp_path: Path) -> None:
    case = case_named("llama2")
    quantized, _ = AwqWriter(group_size=32, zero_point=True).quantize(case.tensors(case.reference_model()))
    with pytest.raises(ConfigError, match="needs its quantization_config"):
        logits(write_checkpoint(tmp_path, case.config_json(), quantized))
