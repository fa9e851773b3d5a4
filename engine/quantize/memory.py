"""What a run takes of a GPU, as far as a model's sizes tell, so that one that does not fit is refused beforehand.

Estimates, for the default options.
"""

import dataclasses
import re

from ..memory_sizes import CONTEXT_BYTES, ComputeForm, layer_linears, weight_bytes
from ..model_config import ModelConfig
from ..quantization_config import QuantizationConfig, QuantizationRule, QuantizationScheme

# The calibration text's hidden states stay on the device when they take at most this share of what is free there; else
# they wait in host memory.
LARGEST_TEXT_SHARE = 0.3

# The layer in 16 bits and the float32 copies of its linears that a search works on; measured on an H200, the rows of a
# batch taken off: 15 at InternLM2.5-7B's sizes, 17 at 20B's. At 7B a search got along with 5.2 of the 6.4 GiB below.
_BYTES_PER_WEIGHT_OF_A_LAYER = 17
# Logits, scratch and what loading takes: the rest of the 9.9 GiB that an evaluation took at 7B; with 7.9 it ended.
_REST_OF_EVALUATION_BYTES = 9 << 28
_ITEM_BYTES = 2
_BATCH_ROWS = 8192  # of calibration text, and of a pass of the evaluation


def needed_gpu_bytes(config: ModelConfig, *, has_evaluation: bool) -> int:
    """Return about what quantizing this 16-bit model takes, the process's CUDA context included."""
    search_bytes = _search_bytes(config)
    peak_bytes = max(search_bytes, _evaluation_bytes(config)) if has_evaluation else search_bytes
    return CONTEXT_BYTES + peak_bytes


def _search_bytes(config: ModelConfig) -> int:
    weights = sum(linear.in_features * linear.out_features for linear in layer_linears(config))
    without_text = weights * _BYTES_PER_WEIGHT_OF_A_LAYER + _activation_bytes(config)
    return round(without_text / (1 - LARGEST_TEXT_SHARE))


def _evaluation_bytes(config: ModelConfig) -> int:
    scheme = QuantizationScheme(method="awq", layout="gemm", group_size=128, has_zeros=True, reorders_inputs=False)
    every_linear = QuantizationConfig("awq", (QuantizationRule(re.compile(""), scheme),))
    quantized = dataclasses.replace(config, quantization=every_linear)
    return (
        weight_bytes(quantized, ComputeForm(itemsize=_ITEM_BYTES, is_fused=True))
        + config.vocab_size * config.hidden_size * _ITEM_BYTES  # the 16-bit model's head
        + _BATCH_ROWS * config.num_layers * 2 * config.num_kv_heads * config.head_dim * _ITEM_BYTES  # keys and values
        + _activation_bytes(config)
        + _REST_OF_EVALUATION_BYTES
    )


def _activation_bytes(config: ModelConfig) -> int:
    """Return what a batch takes on its way through a layer, and what is sampled of it."""
    return _BATCH_ROWS * (4 * config.intermediate_size + 3 * config.hidden_size) * _ITEM_BYTES
