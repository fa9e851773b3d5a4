"""The words that reference packers of each format wrote (AutoAWQ, GPTQModel, compressed-tensors, LMDeploy)."""

from typing import Any

import pytest
import torch
from reference_words import fp16, read_formats, words

from lmdserve.engine.formats import FourBitWeight, awq, compressed_tensors, gptq
from lmdserve.engine.quantization_config import QuantizationScheme

ASYMMETRIC_SCALES = "asym_scales_fp16_hex[out][group]"
ZEROS = "zero_points_uint4[out][group]"


@pytest.fixture
def formats() -> dict[str, Any]:
    return read_formats()


def scheme(method: str, layout: str, *, has_zeros: bool = True, reorders_inputs: bool = False) -> QuantizationScheme:
    return QuantizationScheme(
        method=method, layout=layout, group_size=8, has_zeros=has_zeros, reorders_inputs=reorders_inputs
    )


def codes_of(section: dict[str, Any], offset: int = 0) -> torch.Tensor:
    return (torch.tensor(section["int_weights[out][in]"]) + offset).to(torch.uint8)


def assert_holds(weight: FourBitWeight, codes: torch.Tensor, zeros: list[list[int]]) -> None:
    """Codes and zero points are these; groups of eight inputs dequantize by the formula, one weight at a time."""
    assert torch.equal(weight.codes, codes)
    assert weight.zeros.tolist() == zeros
    numbers = [
        [(int(code) - zeros[out][i // 8]) * float(weight.scales[out, i // 8]) for i, code in enumerate(row)]
        for out, row in enumerate(codes)
    ]
    assert weight.dequantize(None).tolist() == numbers
    assert weight.dequantize(torch.arange(16) // 8).tolist() == numbers


def assert_same_tensors(packed: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert packed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert packed[name].dtype == tensor.dtype, name
        assert torch.equal(packed[name], tensor), name
        assert packed[name].is_contiguous(), name


@pytest.mark.parametrize("name", ["awq_gemm", "awq_gemm_lmdeploy_lite"])
def test_awq(formats: dict[str, Any], name: str) -> None:
    section = formats[name]
    scales = fp16(formats[ASYMMETRIC_SCALES])
    tensors = {
        "qweight": words(section["qweight_hex"]),
        "qzeros": words(section["qzeros_hex"]),
        "scales": scales.t().contiguous(),
    }
    weight = awq.read_weight(tensors, scheme("awq", "gemm"))
    assert_holds(weight, codes_of(section), formats[ZEROS])
    if name == "awq_gemm":
        assert weight.dequantize(None).tolist() == section["dequantized[out][in]"]
    assert_same_tensors(awq.pack_linear(weight.codes, weight.zeros, scales), tensors)


@pytest.mark.parametrize(
    ("version", "zeros_key"), [("gptq", "qzeros_v1_packed_subtract_hex"), ("gptq_v2", "qzeros_v2_hex")]
)
def test_gptq_asymmetric(formats: dict[str, Any], version: str, zeros_key: str) -> None:
    section = formats["gptq_asym"]
    tensors = {
        "qweight": words(section["qweight_hex"]),
        "qzeros": words(section[zeros_key]),
        "scales": fp16(section["scales_fp16_hex"]),
        "g_idx": torch.tensor(formats["g_idx"], dtype=torch.int32),
    }
    weight = gptq.read_weight(tensors, scheme("gptq", version))
    assert_holds(weight, codes_of(section), formats[ZEROS])
    packed = gptq.pack_linear(weight.codes, weight.zeros, weight.scales, layout_name=version)
    assert_same_tensors(packed, tensors)


@pytest.mark.parametrize(("version", "zeros_key"), [("gptq", "qzeros_v1_hex"), ("gptq_v2", "qzeros_v2_hex")])
def test_gptq_symmetric(formats: dict[str, Any], version: str, zeros_key: str) -> None:
    section = formats["gptq_sym"]
    scales = fp16(section["scales_fp16_hex"])
    tensors = {"qweight": words(section["qweight_hex"]), "qzeros": words(section[zeros_key]), "scales": scales}
    weight = gptq.read_weight(tensors, scheme("gptq", version))
    assert_holds(weight, codes_of(section), [[8, 8]] * 8)
    packed = gptq.pack_linear(weight.codes, weight.zeros, weight.scales, layout_name=version)
    assert_same_tensors(packed, tensors | {"g_idx": torch.tensor(formats["g_idx"], dtype=torch.int32)})


def test_a_zero_point_of_0_borrows_in_gptq_v1(formats: dict[str, Any]) -> None:
    """Reading nibble by nibble gives [0, 0, 1, 3, ...] or [16, 16, 1, 3, ...] here; only the whole word is right."""
    case = formats["gptq_v1_zero_borrow_edge_case"]
    zeros = torch.tensor(case["zero_points"], dtype=torch.uint8).unsqueeze(1)
    codes, scales = torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1).half()
    for version, key in (("gptq", "v1_by_packed_subtract_hex"), ("gptq_v2", "v2_word_hex")):
        packed = gptq.pack_linear(codes, zeros, scales, layout_name=version)
        assert torch.equal(packed["qzeros"], words([[case[key]]]))
        read = gptq.read_weight(packed, scheme("gptq", version)).zeros
        assert read.flatten().tolist() == case["read_packed_add_0x11111111"] == zeros.flatten().tolist()


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_compressed_tensors(formats: dict[str, Any], kind: str) -> None:
    section = formats[f"compressed_tensors_pack_quantized_{kind}"]
    has_zeros = kind == "asym"
    tensors = {
        "weight_packed": words(section["weight_packed_hex"]),
        "weight_scale": fp16(section["weight_scale_fp16_hex"]),
        "weight_shape": torch.tensor(section["weight_shape"]),
    }
    if has_zeros:
        tensors["weight_zero_point"] = words(section["weight_zero_point_hex"])
    weight = compressed_tensors.read_weight(
        tensors, scheme("compressed-tensors", "pack-quantized", has_zeros=has_zeros)
    )
    zeros = torch.tensor(section["zero_points[out][group]"]) + 8 if has_zeros else torch.full((8, 2), 8)
    assert_holds(weight, codes_of(section, offset=8), zeros.tolist())
    packed = compressed_tensors.pack_linear(weight.codes, weight.zeros, weight.scales, has_zeros=has_zeros)
    assert_same_tensors(packed, tensors)


def test_an_asymmetric_weight_is_not_packed_as_a_symmetric_one() -> None:
    codes, zeros = torch.zeros(8, 8, dtype=torch.uint8), torch.full((8, 1), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="zero points of 8 only"):
        compressed_tensors.pack_linear(codes, zeros, torch.ones(8, 1), has_zeros=False)
