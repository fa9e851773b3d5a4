"""What a model takes in memory, from its config.json alone: weights in every form, KV blocks, and a step's buffers.

Owns the arithmetic, without torch, so that a plan is made in milliseconds and on any machine. The tensors themselves
belong to the modules named beside each function; tests hold the numbers here equal to what those allocate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .config import QuantPolicy
from .memory_device import MemoryDevice
from .model_config import ModelConfig
from .quantization_config import QuantizationScheme

FLOAT_BYTES = 4
INT_BYTES = 4

# Measured on an H200 with torch 2.11 and CUDA 13: the driver's context, and kernels of torch, cuBLAS and Triton in it.
CONTEXT_BYTES = 830 * 2**20
# What torch gives cuBLAS for its own use, per stream that calls it: 32 MiB on sm_90, 8 MiB before.
CUBLAS_WORKSPACE_BYTES = 32 * 2**20
# kernels/w4a16_workspace.py
W4A16_WORKSPACE_BYTES = (64 << 20) + (1 << 14) * INT_BYTES
# kernels/attention_workspace.py: the parts that split contexts are computed in, for an H200's multiprocessors (fewer
# make 1 MiB less), and with a quantized cache dequantized keys and values of a prefill step.
_ATTENTION_PARTS_PER_PROCESSOR, _MOST_PROCESSORS = 6, 132
ATTENTION_SCRATCH_BYTES = 256 << 20
# engine/step_buffers.py: rows whose queries, keys and values are added up in float32.
_MOST_SUMMED_ROWS = 64
# engine/fused_linear.py: rows of gate and up that a 16-bit model computes at once.
_MOST_ROWS_OF_GATE_UP = 2048
# engine/reordered_linear.py: rows whose values are gathered at once before a product, and rows of gate and up that are
# computed at once where their weights have their inputs in different orders. 2048 rows keep products at full speed.
GATHERED_ROWS = 2048
JOINED_ROWS = 256
# kernels/sampling_weights.py
_SAMPLING_BYTES_PER_ROW = 64 << 10
# Rows of logits that are copied together when requests change their logits (engine/device_sampler.py) or ask for
# logprobs (engine/readback.py): a full batch takes a few turns instead of a buffer of its own size.
MOST_COPIED_LOGIT_ROWS = 64
_LOGIT_COPIES = 3  # edited ones; rows that logprobs are asked of, and the logprobs

# Vector loads and descriptors want 16; torch gives 512.
ARENA_ALIGNMENT_BYTES = 256

# Packed 4-bit weights (kernels/w4a16_tiles.py): records of 64 rows x 128 inputs, rows padded to 128.
_RECORD_ROWS, _RECORD_INPUTS, _ROW_PADDING = 64, 128, 128
_INT8_SCRATCH_ROWS = 4096  # kernels/w8a16.py
_SCALE_BYTES_PER_KV_ROW = 4  # scale and minimum of a token and head in 16 bits each (engine/kv_cache.py)


# What the fused decoder's kernels cover beside 16-bit types. Before this capability Triton has no tensor cores: the
# plain decoder dequantizes and calls cuBLAS.
_FUSED_HEAD_DIMS = (64, 128)
_FUSED_CAPABILITY = (8, 0)


class ComputeForm(NamedTuple):
    """How a model computes: bytes of a number, and whether by the fused decoder's kernels (engine/assembly.py)."""

    itemsize: int
    is_fused: bool
    head_bits: int = 16  # of the fused decoder's output head; 8 is a byte and a scale a row


class Part(NamedTuple):
    """Something that takes memory for as long as the process lives."""

    name: str
    num_bytes: int
    is_outside_torch: bool = False


class LinearShape(NamedTuple):
    """A linear as the decoder holds it: q, k, v in one, gate and up in one."""

    name: str  # as on disk, that of the first where several are joined
    in_features: int
    out_features: int
    has_bias: bool
    takes_sorted_inputs: bool = False  # down's are made in the order that it wants (engine/loader.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """The largest step, as engine/step_buffers.py has it."""

    max_tokens: int
    max_logit_rows: int
    num_slots: int
    max_blocks_per_slot: int


def is_fused(config: ModelConfig, itemsize: int, capability: tuple[int, int]) -> bool:
    """Say whether a model is computed by the fused decoder, in a type of this size on a device of this capability."""
    return itemsize == 2 and config.head_dim in _FUSED_HEAD_DIMS and capability >= _FUSED_CAPABILITY


def layer_linears(config: ModelConfig) -> list[LinearShape]:
    """Return the four linears of one layer."""
    names, hidden, intermediate = config.family.names, config.hidden_size, config.intermediate_size
    attended = config.num_heads * config.head_dim
    return [
        LinearShape(names.qkv[0], hidden, qkv_width(config), config.qkv_bias),
        LinearShape(names.output, attended, hidden, config.output_bias),
        LinearShape(names.gate, hidden, 2 * intermediate, config.mlp_bias),
        LinearShape(names.down, intermediate, hidden, config.mlp_bias, takes_sorted_inputs=True),
    ]


def qkv_width(config: ModelConfig) -> int:
    """Return the outputs of the fused query, key and value projection."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def weight_bytes(config: ModelConfig, form: ComputeForm) -> int:
    """Return what all weights take once they are loaded (engine/loader.py)."""
    norms = (2 * config.num_layers + 1) * config.hidden_size
    if config.qk_norm:
        norms += config.num_layers * 2 * config.head_dim
    embedding = config.vocab_size * config.hidden_size
    linears = sum(map(sum, _linear_bytes(config, form)))
    return linears + (norms + embedding) * form.itemsize + _head_bytes(config, form)


def _head_bytes(config: ModelConfig, form: ComputeForm) -> int:
    if form.head_bits == 8:  # kernels/w8a16.py; the scratch is for steps of many rows
        return config.vocab_size * (config.hidden_size + FLOAT_BYTES) + _INT8_SCRATCH_ROWS * config.hidden_size * 2
    return 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * form.itemsize


def arena_bytes(config: ModelConfig, form: ComputeForm) -> int:
    """Return what the layers' linears take one after another (engine/weight_arena.py)."""
    return sum(sum(map(aligned_bytes, sizes)) for sizes in _linear_bytes(config, form))


def aligned_bytes(num_bytes: int) -> int:
    """Return what a tensor of this size takes in an arena."""
    return -(-num_bytes // ARENA_ALIGNMENT_BYTES) * ARENA_ALIGNMENT_BYTES


def _linear_bytes(config: ModelConfig, form: ComputeForm) -> Iterator[tuple[int, int, int]]:
    """Yield the bytes of weight, bias and order of inputs of every linear in every layer."""
    for layer in range(config.num_layers):
        for linear in layer_linears(config):
            scheme = _scheme_of(linear, config, layer)
            bias = linear.out_features * form.itemsize if linear.has_bias else 0
            order = linear.in_features * INT_BYTES if _is_gathered(linear, scheme) else 0
            yield _weight_bytes(linear, scheme, form), bias, order


def kv_block_bytes(config: ModelConfig, *, block_size: int, quant_policy: QuantPolicy, itemsize: int) -> int:
    """Return what one KV block takes in all layers (engine/kv_cache.py)."""
    row_bytes = config.head_dim * itemsize
    if quant_policy != 0:
        row_bytes = config.head_dim * quant_policy // 8 + _SCALE_BYTES_PER_KV_ROW
    return config.num_layers * 2 * config.num_kv_heads * block_size * row_bytes


def largest_unpacked_bytes(config: ModelConfig, form: ComputeForm) -> int:
    """Return what the largest 4-bit linear takes dequantized; 0 for a model without any."""
    sizes = [
        linear.in_features * linear.out_features * form.itemsize
        for linear in layer_linears(config)
        if _scheme_of(linear, config, 0) is not None
    ]
    return max(sizes, default=0)


def _scheme_of(linear: LinearShape, config: ModelConfig, layer: int) -> QuantizationScheme | None:
    if config.quantization is None:
        return None
    return config.quantization.scheme_of(f"model.layers.{layer}.{linear.name}")


def _is_gathered(linear: LinearShape, scheme: QuantizationScheme | None) -> bool:
    return scheme is not None and scheme.reorders_inputs and not linear.takes_sorted_inputs


def most_gathered_inputs(config: ModelConfig) -> int:
    """Return the inputs of the widest linear whose activations are gathered; 0 for a model without any."""
    return max(
        linear.in_features if _is_gathered(linear, _scheme_of(linear, config, layer)) else 0
        for layer in range(config.num_layers)
        for linear in layer_linears(config)
    )


def _weight_bytes(linear: LinearShape, scheme: QuantizationScheme | None, form: ComputeForm) -> int:
    num_weights = linear.in_features * linear.out_features
    if scheme is None:
        return num_weights * form.itemsize
    group_size = scheme.num_inputs_per_group(linear.in_features)
    if form.is_fused and can_pack(linear, group_size):
        groups_per_record = _RECORD_INPUTS // min(group_size, _RECORD_INPUTS)
        words = _RECORD_ROWS * (_RECORD_INPUTS // 8 + groups_per_record)
        padded_rows = -(-linear.out_features // _ROW_PADDING) * _ROW_PADDING
        return padded_rows // _RECORD_ROWS * (linear.in_features // _RECORD_INPUTS) * words * INT_BYTES
    zeros_and_scales = 2 * linear.out_features * (linear.in_features // group_size) * form.itemsize
    return num_weights // 2 + zeros_and_scales


def can_pack(linear: LinearShape, group_size: int) -> bool:
    """Say whether the fused kernels take a 4-bit weight of this shape (kernels/w4a16_tiles.py)."""
    fits_records = group_size in (32, 64) or group_size % _RECORD_INPUTS == 0
    return fits_records and linear.in_features % _RECORD_INPUTS == 0 and linear.out_features % 16 == 0


def step_buffer_bytes(config: ModelConfig, sizes: StepSizes, itemsize: int) -> int:
    """Return what the fused decoder's step buffers and slot tables take (engine/step_buffers.py)."""
    attended, pairs = config.num_heads * config.head_dim, config.head_dim // 2
    token_numbers = config.hidden_size + qkv_width(config) + 2 * attended + config.intermediate_size
    token_bytes = token_numbers * itemsize + (config.hidden_size + 2 * pairs) * FLOAT_BYTES
    summed = min(sizes.max_tokens, _MOST_SUMMED_ROWS) * qkv_width(config) * FLOAT_BYTES
    logit_bytes = config.hidden_size * itemsize + config.vocab_size * FLOAT_BYTES
    slot_bytes = (sizes.max_blocks_per_slot + pairs + 1) * INT_BYTES
    return sizes.max_tokens * token_bytes + summed + sizes.max_logit_rows * logit_bytes + sizes.num_slots * slot_bytes


def runtime_parts(config: ModelConfig, form: ComputeForm, sizes: StepSizes, device: MemoryDevice) -> list[Part]:
    """Return what a process takes beside weights and KV cache."""
    if device.kind == "cpu":
        return [Part("step buffers", _plain_step_bytes(config, form, sizes))]
    parts = [Part("CUDA context", CONTEXT_BYTES, is_outside_torch=True), Part("cuBLAS", _cublas_bytes(device))]
    if not form.is_fused:
        unpacked = 2 * largest_unpacked_bytes(config, form)  # as dequantized, and what that is made of
        return [*parts, Part("step buffers", _plain_step_bytes(config, form, sizes) + unpacked)]
    return [
        *parts,
        Part("step buffers", step_buffer_bytes(config, sizes, form.itemsize)),
        Part("products", _product_bytes(config, form)),
        Part("attention", attention_bytes(config, sizes.max_logit_rows)),
        Part("sampling", sampling_bytes(config, sizes)),
    ]


def attention_bytes(config: ModelConfig, max_rows: int) -> int:
    """Return what attention works in, without its scratch (kernels/attention_workspace.py)."""
    num_parts = max_rows + max(1, _ATTENTION_PARTS_PER_PROCESSOR * _MOST_PROCESSORS // config.num_kv_heads)
    parts = num_parts * config.num_heads * (config.head_dim + 1) * FLOAT_BYTES
    return parts + max_rows * config.num_kv_heads * INT_BYTES


def dequantized_kv_bytes(form: ComputeForm, quant_policy: QuantPolicy) -> int:
    """Return the scratch that a prefill step's keys and values are dequantized in; none for a cache in 16 bits."""
    return ATTENTION_SCRATCH_BYTES if form.is_fused and quant_policy != 0 else 0


def sampling_bytes(config: ModelConfig, sizes: StepSizes) -> int:
    """Return what sampling and logprobs take (engine/device_sampler.py, engine/readback.py)."""
    seen = sizes.num_slots * config.vocab_size * INT_BYTES
    num_copied_rows = min(sizes.num_slots, MOST_COPIED_LOGIT_ROWS)
    copies = _LOGIT_COPIES * num_copied_rows * config.vocab_size * FLOAT_BYTES
    return seen + copies + sizes.max_logit_rows * _SAMPLING_BYTES_PER_ROW


def _product_bytes(config: ModelConfig, form: ComputeForm) -> int:
    """Return the workspace of 4-bit products, and what a 16-bit MLP has of gate and up at once."""
    if config.quantization is not None:
        gathered = GATHERED_ROWS * most_gathered_inputs(config)
        joined = JOINED_ROWS * 2 * config.intermediate_size if gathered else 0
        return W4A16_WORKSPACE_BYTES + (gathered + joined) * form.itemsize
    return _MOST_ROWS_OF_GATE_UP * 2 * config.intermediate_size * form.itemsize


def _cublas_bytes(device: MemoryDevice) -> int:
    return CUBLAS_WORKSPACE_BYTES if device.capability >= (9, 0) else CUBLAS_WORKSPACE_BYTES // 4


def _plain_step_bytes(config: ModelConfig, form: ComputeForm, sizes: StepSizes) -> int:
    """Return about what a step of the plain decoder has at its peak: an MLP's products, attention's rows, logits."""
    numbers = 3 * config.hidden_size + 2 * qkv_width(config) + 3 * config.intermediate_size
    logits = 3 * sizes.max_logit_rows * config.vocab_size * FLOAT_BYTES
    return sizes.max_tokens * numbers * form.itemsize + logits
