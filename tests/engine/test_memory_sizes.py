"""The plan's arithmetic against what the owners of the memory really allocate."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdserve.engine.fused_linear import Int8Head
from lmdserve.engine.kv_cache import KVCache
from lmdserve.engine.memory_device import MemoryDevice
from lmdserve.engine.memory_sizes import (
    JOINED_ROWS,
    W4A16_WORKSPACE_BYTES,
    ComputeForm,
    LinearShape,
    StepSizes,
    attention_bytes,
    can_pack,
    dequantized_kv_bytes,
    kv_block_bytes,
    largest_unpacked_bytes,
    most_gathered_inputs,
    runtime_parts,
    sampling_bytes,
    step_buffer_bytes,
    weight_bytes,
)
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.reordered_linear import gather_scratch
from lmdserve.engine.step_buffers import SlotTables, StepBuffers, StepLimits

FUSED, PLAIN = ComputeForm(2, True), ComputeForm(4, False)
QUANTIZATION = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
SIZES = {"max_tokens": 300, "max_logit_rows": 40, "num_slots": 40, "max_blocks_per_slot": 17}


def _config(folder: Path, **changes: Any) -> ModelConfig:
    values = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bias": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(values | changes))
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_weights_take_what_their_parameters_do(tmp_path: Path, bias: bool, tied: bool) -> None:
    config = _config(tmp_path, bias=bias, tie_word_embeddings=tied)
    norms = (2 * 3 + 1) * 512
    biases = 3 * (12 * 64 + 512) if bias else 0  # of wqkv and wo
    assert weight_bytes(config, PLAIN) == 4 * (config.num_parameters + norms + biases)
    assert largest_unpacked_bytes(config, PLAIN) == 0


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_packed_weights_take_what_packing_makes_of_them(tmp_path: Path, group_size: int) -> None:
    from lmdserve.kernels.w4a16_tiles import pack_weight

    config = _config(tmp_path, quantization_config=QUANTIZATION | {"group_size": group_size})
    packed = 0
    for out_features, in_features in ((12 * 64, 512), (512, 512), (2 * 768, 512), (512, 768)):
        groups = 1 if group_size == -1 else in_features // group_size
        weight = pack_weight(
            torch.zeros(out_features, in_features // 2, dtype=torch.uint8),
            torch.zeros(out_features, groups),
            torch.ones(out_features, groups),
            torch.float16,
        )
        packed += weight.records.nbytes
    dense = 2 * (2 * 1000 * 512 + 7 * 512)
    assert weight_bytes(config, FUSED) == 3 * packed + dense


def test_modules_left_unquantized_are_counted_as_such(tmp_path: Path) -> None:
    quantized = _config(tmp_path, quantization_config=QUANTIZATION)
    partly = _config(tmp_path, quantization_config=QUANTIZATION | {"modules_to_not_convert": ["attention.wo"]})
    difference = weight_bytes(partly, FUSED) - weight_bytes(quantized, FUSED)
    assert difference == 3 * 512 * 512 * (2 - (0.5 + 4 / 128))


def test_orders_of_inputs_and_gathering_are_counted(tmp_path: Path) -> None:
    """Only down needs no order: gate and up put out what it takes as it wants it."""
    in_order = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    plain = _config(tmp_path, quantization_config=in_order)
    reordered = _config(tmp_path, quantization_config=in_order | {"desc_act": True})
    assert weight_bytes(reordered, FUSED) - weight_bytes(plain, FUSED) == 3 * (512 + 512 + 512) * 4
    hopper, sizes = MemoryDevice("cuda", "GPU", 2**36, 2**36, (9, 0)), StepSizes(**SIZES)
    products = [
        next(part.num_bytes for part in runtime_parts(config, FUSED, sizes, hopper) if part.name == "products")
        for config in (plain, reordered)
    ]
    scratch = gather_scratch(most_gathered_inputs(reordered), torch.float16, torch.device("meta"))
    assert products[1] - products[0] == scratch.nbytes + JOINED_ROWS * 2 * 768 * 2
    assert most_gathered_inputs(plain) == 0


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(16, 128, 128), (24, 128, 128), (16, 96, 32)])
def test_what_can_be_packed_is_what_the_kernels_say(out_features: int, in_features: int, group_size: int) -> None:
    from lmdserve.kernels import w4a16_tiles

    shape = LinearShape("w", in_features, out_features, has_bias=False)
    assert can_pack(shape, group_size) == w4a16_tiles.can_pack(out_features, in_features, group_size)


@pytest.mark.parametrize("quant_policy", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kv_blocks(tmp_path: Path, quant_policy: Any, dtype: torch.dtype) -> None:
    config = _config(tmp_path)
    cache = KVCache(
        config, num_blocks=5, block_size=16, quant_policy=quant_policy, dtype=dtype, device=torch.device("cpu")
    )
    tensors = [tensor for layer in range(3) for tensor in cache.layer(layer) if tensor is not None]
    expected = sum(tensor.nbytes for tensor in tensors)
    size = kv_block_bytes(config, block_size=16, quant_policy=quant_policy, itemsize=dtype.itemsize)
    assert 5 * size == expected


@pytest.mark.parametrize("max_tokens", [7, 300])
def test_step_buffers(tmp_path: Path, max_tokens: int) -> None:
    config = _config(tmp_path)
    sizes, meta = SIZES | {"max_tokens": max_tokens}, torch.device("meta")
    buffers = StepBuffers(config, StepLimits(**sizes), dtype=torch.float16, device=meta)
    tables = SlotTables(config, StepLimits(**sizes), device=meta)
    expected = sum(tensor.nbytes for owner in (buffers, tables) for tensor in vars(owner).values())
    assert step_buffer_bytes(config, StepSizes(**sizes), 2) == expected


def test_what_kernels_work_in(tmp_path: Path) -> None:
    from lmdserve.kernels.attention_workspace import DEFAULT_SCRATCH_BYTES, attention_workspace_bytes
    from lmdserve.kernels.w4a16_workspace import workspace_bytes

    config = _config(tmp_path)
    assert workspace_bytes() == W4A16_WORKSPACE_BYTES
    assert dequantized_kv_bytes(FUSED, 8) == DEFAULT_SCRATCH_BYTES
    assert dequantized_kv_bytes(FUSED, 0) == dequantized_kv_bytes(PLAIN, 4) == 0
    own = attention_workspace_bytes(
        max_rows=40, num_heads=8, num_kv_heads=2, head_dim=64, num_processors=132, scratch_bytes=0
    )
    assert attention_bytes(config, 40) == pytest.approx(own, abs=2**20)  # the number of parts is tuned now and then


def test_sampling_is_close_to_the_samplers_own_scratch(tmp_path: Path) -> None:
    from lmdserve.kernels.sampling_weights import sampling_scratch

    scratch = sampling_scratch(40, 92544, torch.device("meta"))
    tensors = [getattr(scratch, field.name) for field in dataclasses.fields(scratch)]
    own = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    config = _config(tmp_path, vocab_size=92544)
    rows_of_logits = 4 * 40 * 92544 * 4  # what 40 slots have seen, and three copies
    assert own - 40 * 4096 < sampling_bytes(config, StepSizes(**SIZES)) - rows_of_logits < own + 0.05 * rows_of_logits


def test_every_form_of_engine_has_its_parts(tmp_path: Path) -> None:
    config, sizes = _config(tmp_path, quantization_config=QUANTIZATION), StepSizes(**SIZES)
    hopper = MemoryDevice("cuda", "GPU", 2**36, 2**36, (9, 0))
    volta, cpu = hopper._replace(capability=(7, 0)), MemoryDevice("cpu", "CPU", 2**34, 2**34)
    names = {
        name: [part.name for part in runtime_parts(config, form, sizes, device)]
        for name, form, device in (("fused", FUSED, hopper), ("plain", PLAIN, volta), ("cpu", PLAIN, cpu))
    }
    assert names["cpu"] == ["step buffers"]
    assert names["plain"] == ["CUDA context", "cuBLAS", "step buffers"]
    assert names["fused"] == ["CUDA context", "cuBLAS", "step buffers", "products", "attention", "sampling"]


@pytest.mark.parametrize("tied", [False, True])
def test_an_8_bit_head_takes_what_it_allocates(tmp_path: Path, tied: bool) -> None:
    config = _config(tmp_path, tie_word_embeddings=tied)
    head = Int8Head(torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.float16))
    tensors = (head._weight.codes, head._weight.scales, head._scratch)
    without = weight_bytes(config, FUSED) - (0 if tied else config.vocab_size * config.hidden_size * 2)
    assert weight_bytes(config, FUSED._replace(head_bits=8)) - without == sum(tensor.nbytes for tensor in tensors)
