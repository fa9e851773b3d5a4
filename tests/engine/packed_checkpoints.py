"""Random 4-bit checkpoints of every on-disk format, with transformers' model of the weights that they stand for.

The packers are plain loops over the formats' definitions, one nibble at a time, and share nothing with the engine's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_checkpoints import FamilyCase, Tensors, interleave, write_checkpoint

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN_COLUMNS = tuple(range(8))
SIZES = {"hidden_size": 64, "intermediate_size": 96}
_QKV = ("q_proj", "k_proj", "v_proj")
_INTERNLM2_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


@dataclass(frozen=True)
class Linear:
    """A 4-bit linear by its definition; W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], g = group_index[i]."""

    codes: np.ndarray  # [out, in]
    zeros: np.ndarray  # [out, groups]
    scales: np.ndarray  # float16 [out, groups]
    group_index: np.ndarray  # [in]

    def weight(self) -> torch.Tensor:
        """Return W in float32, which is exact."""
        zeros, scales = self.zeros[:, self.group_index], self.scales.astype(np.float32)[:, self.group_index]
        return torch.from_numpy((self.codes - zeros).astype(np.float32) * scales)


@dataclass(frozen=True)
class Format:
    """How `write` stores a linear, and what config.json says of it."""

    quantization: dict[str, Any]
    write: Callable[[Linear], Tensors]
    is_symmetric: bool = False
    reorders_inputs: bool = False


def pack(values: np.ndarray, order: tuple[int, ...] = AWQ_COLUMNS) -> np.ndarray:
    """Pack [rows, columns] of 0..15, uint32 [rows, columns / 8]: nibble i of a word is its column order[i]."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for word in range(columns // 8):
        for nibble, column in enumerate(order):
            words[:, word] |= values[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * nibble)
    return words


def signed(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def awq_gemm(linear: Linear) -> Tensors:
    tensors = {"qweight": signed(pack(linear.codes.T)), "scales": torch.from_numpy(linear.scales.T.copy())}
    return tensors | {"qzeros": signed(pack(linear.zeros.T))}


def awq_gemm_without_zeros(linear: Linear) -> Tensors:
    return {name: tensor for name, tensor in awq_gemm(linear).items() if name != "qzeros"}


def awq_gemv(linear: Linear) -> Tensors:
    """Rows of zero points are padded to whole words, of groups of 32 to fours of words and of 64 to pairs."""
    outputs, groups = linear.scales.shape
    words = math.ceil(groups / 8)
    while words % {32: 4, 64: 2}.get(linear.codes.shape[1] // groups, 1):
        words += 1
    zeros = np.zeros((outputs, words * 8), dtype=np.int64)
    scales = np.zeros((outputs, words * 8), dtype=np.float16)
    zeros[:, :groups], scales[:, :groups] = linear.zeros, linear.scales
    return {
        "qweight": signed(pack(linear.codes, PLAIN_COLUMNS)),
        "qzeros": signed(pack(zeros, PLAIN_COLUMNS)),
        "scales": torch.from_numpy(scales),
    }


def gptq_v2(linear: Linear) -> Tensors:
    return {
        "qweight": signed(pack(linear.codes, PLAIN_COLUMNS).T),
        "qzeros": signed(pack(linear.zeros.T, PLAIN_COLUMNS)),
        "scales": torch.from_numpy(linear.scales.T.copy()),
        "g_idx": torch.from_numpy(linear.group_index.astype(np.int32)),
    }


def gptq_v1(linear: Linear) -> Tensors:
    """Zero points of 0 borrow from their neighbours in the word."""
    words = pack(linear.zeros.T, PLAIN_COLUMNS).astype(np.int64)
    return gptq_v2(linear) | {"qzeros": signed(((words - 0x11111111) % 2**32).astype(np.uint32))}


def compressed(linear: Linear) -> Tensors:
    return {
        "weight_packed": signed(pack(linear.codes, PLAIN_COLUMNS)),
        "weight_scale": torch.from_numpy(linear.scales.copy()),
        "weight_shape": torch.tensor(linear.codes.shape),
    }


def compressed_asymmetric(linear: Linear) -> Tensors:
    return compressed(linear) | {"weight_zero_point": signed(pack(linear.zeros.T, PLAIN_COLUMNS).T)}


def compressed_reordered(linear: Linear) -> Tensors:
    return compressed_asymmetric(linear) | {"weight_g_idx": torch.from_numpy(linear.group_index.astype(np.int32))}


def awq(version: str = "gemm", **changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "version": version, "bits": 4, "zero_point": True, **changes}


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "checkpoint_format": "gptq", **changes}


def compressed_config(**weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "actorder": None, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "output"],
        "config_groups": {"group_0": group},
    }


FORMATS = {
    "awq": Format(awq(), awq_gemm),
    "awq-sym": Format(awq(zero_point=False), awq_gemm_without_zeros, is_symmetric=True),
    "awq-gemv": Format(awq("GEMV"), awq_gemv),
    "gptq": Format(gptq(), gptq_v1),
    "gptq-sym": Format(gptq(sym=True), gptq_v1, is_symmetric=True),
    "gptq-v2": Format(gptq(checkpoint_format="gptq_v2"), gptq_v2),
    "gptq-act-order": Format(gptq(desc_act=True), gptq_v1, reorders_inputs=True),
    "gptq-v2-act-order": Format(gptq(desc_act=True, checkpoint_format="gptq_v2"), gptq_v2, reorders_inputs=True),
    "gptq-static-groups": Format(gptq(desc_act=True, static_groups=True), gptq_v1),
    "ct-sym": Format(compressed_config(), compressed, is_symmetric=True),
    "ct-asym": Format(compressed_config(symmetric=False), compressed_asymmetric),
    "ct-weight-order": Format(compressed_config(symmetric=False, actorder="weight"), compressed_asymmetric),
    "ct-group-order": Format(
        compressed_config(symmetric=False, actorder="group"), compressed_reordered, reorders_inputs=True
    ),
}


def quantization_config(form: Format, group_size: int) -> dict[str, Any]:
    if form.quantization["quant_method"] != "compressed-tensors":
        return {**form.quantization, "group_size": group_size}
    group = form.quantization["config_groups"]["group_0"]
    size = {"strategy": "channel", "group_size": None} if group_size == -1 else {"group_size": group_size}
    changed = {**group, "weights": {**group["weights"], **size}}
    return {**form.quantization, "config_groups": {"group_0": changed}}


class LinearSource:
    """Random linears, the same for every format; `shares_orders`: q, k and v have one order of inputs, gate and up too.

    `gain` is about what a product multiplies the deviation of its inputs by.
    """

    def __init__(self, form: Format, group_size: int, *, shares_orders: bool = True, gain: float = 2.0) -> None:
        self._form = form
        self._group_size = group_size
        self._shares_orders = shares_orders
        self._gain = gain
        self._random = np.random.default_rng(9)
        self._orders: dict[str, np.ndarray] = {}

    def linear(self, module: str, out_features: int, in_features: int) -> Linear:
        group_size = in_features if self._group_size == -1 else self._group_size
        groups = in_features // group_size
        if self._form.is_symmetric:
            zeros = np.full((out_features, groups), 8)
        else:
            zeros = self._random.integers(16, size=(out_features, groups))
        codes = self._random.integers(16, size=(out_features, in_features))
        codes = np.clip(codes // 2 + zeros.repeat(group_size, 1) // 2, 0, 15)  # so that no weight is far from 0
        step = self._gain / 5 / math.sqrt(in_features)
        scales = self._random.uniform(0.5 * step, 1.5 * step, size=(out_features, groups)).astype(np.float16)
        return Linear(codes, zeros, scales, self._group_index(module, in_features, group_size))

    def _group_index(self, module: str, in_features: int, group_size: int) -> np.ndarray:
        in_order = np.arange(in_features) // group_size
        if not self._form.reorders_inputs:
            return in_order
        shared = module
        if self._shares_orders:
            for name in (*_QKV, "gate_proj", "up_proj"):
                shared = shared.replace(name, "joined")
        return self._orders.setdefault(shared, self._random.permutation(in_order))


def quantized_model(
    case: FamilyCase, source: LinearSource, *, skip: tuple[str, ...] = (), **sizes: int
) -> tuple[transformers.PreTrainedModel, dict[str, Linear]]:
    """Return transformers' model of random 4-bit linears, and those linears by their names in Llama's naming."""
    model = case.reference_model(**sizes)
    linears: dict[str, Linear] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head" and not any(part in name for part in skip):
                linears[name] = source.linear(name, *module.weight.shape)
                module.weight.copy_(linears[name].weight())
    return model, linears


def write_quantized(
    folder: Path,
    case: FamilyCase,
    model: transformers.PreTrainedModel,
    linears: dict[str, Linear],
    form: Format,
    quantization: dict[str, Any],
    **config: Any,
) -> Path:
    """Write the checkpoint in the family's own naming."""
    tensors = case.tensors(model)
    for name, linear in (linears if case.rename is None else in_internlm2_naming(linears)).items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in form.write(linear).items()}
    return write_checkpoint(folder, case.config_json(quantization_config=quantization, **config), tensors)


def in_internlm2_naming(linears: dict[str, Linear]) -> dict[str, Linear]:
    renamed = {}
    for name, linear in linears.items():
        if "q_proj" in name:
            parts = [linears[name.replace("q_proj", part)] for part in _QKV]
            rows = [
                interleave(*(torch.from_numpy(getattr(part, field)) for part in parts)).numpy()
                for field in ("codes", "zeros", "scales")
            ]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = Linear(*rows, linear.group_index)
        elif not name.endswith(_QKV[1:]):
            for llama, internlm2 in _INTERNLM2_NAMES.items():
                name = name.replace(llama, internlm2)
            renamed[name] = linear
    return renamed


def reference_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits
