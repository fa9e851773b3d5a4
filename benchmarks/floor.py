"""The least time that a model's work can take on a device: bytes that must be read over bandwidth, flops over peak.

Owns the arithmetic of the floors in the benchmark tables, from a model's geometry alone. Phases follow one another, and
each takes the longer of its bytes and its flops: the layers' products, the head, attention. A weight of 4 bits with a
16-bit scale and a 4-bit zero point for 128 inputs is 4.156 bits; a quantized key or value costs its bits and 4 bytes of
scale and minimum a head; the head is read at 16 bits or 8. Norms, sampling, embeddings and launches cost nothing here.
"""

from dataclasses import dataclass

from lmdserve.engine.model_config import ModelConfig

SCALE_BYTES = 4  # of a token's key, or value, of one head in a quantized cache


@dataclass(frozen=True, slots=True)
class Device:
    """What a device does at best."""

    bandwidth: float  # bytes a second
    flops: float  # multiplications and additions a second, 16 bit


# Measured on that GPU: a copy's bytes read and written, and a bf16 product of 8192 x 8192 x 8192.
KNOWN_DEVICES = {"NVIDIA H200": Device(bandwidth=4.3e12, flops=790e12)}


@dataclass(frozen=True, slots=True)
class Floor:
    """The floors of one model with one width of KV cache on one device."""

    model: ModelConfig
    kv_bits: int  # 16 for a cache that is not quantized
    device: Device
    head_bits: int = 16

    def prefill_s(self, num_tokens: int) -> float:
        """Return the time of a prompt up to its first token."""
        model = self.model
        # A causal query sees half of the prompt on average; its scores and its sum take two flops an element each.
        attention = 2 * model.num_layers * model.num_heads * model.head_dim * num_tokens**2
        return self._products_s(num_tokens) + self._head_s(1) + attention / self.device.flops

    def decode_step_s(self, num_rows: int, context_len: float) -> float:
        """Return the time of a step that gives `num_rows` sequences of `context_len` tokens one more each."""
        read_kv = num_rows * context_len * self.kv_bytes_per_token
        return self._products_s(num_rows) + self._head_s(num_rows) + read_kv / self.device.bandwidth

    def batch_s(self, num_sequences: int, input_len: int, output_len: int) -> float:
        """Return the time of a whole run: every prompt, then all sequences' further tokens, step by step."""
        steps = output_len - 1
        decoding = steps * self.decode_step_s(num_sequences, input_len + output_len / 2)
        return num_sequences * self.prefill_s(input_len) + decoding

    @property
    def kv_bytes_per_token(self) -> float:
        """Return what all layers keep of one token."""
        head_bytes = self.model.head_dim * self.kv_bits / 8 + (SCALE_BYTES if self.kv_bits < 16 else 0)
        return 2 * self.model.num_layers * self.model.num_kv_heads * head_bytes

    @property
    def linear_weights(self) -> int:
        """Return the number of weights in the layers' products."""
        model = self.model
        attention = 2 * model.head_dim * (model.num_heads + model.num_kv_heads)
        return model.num_layers * model.hidden_size * (attention + 3 * model.intermediate_size)

    def _products_s(self, num_rows: int) -> float:
        quantization = self.model.quantization
        bits = 16.0 if quantization is None else 4 + (16 + 4) / quantization.schemes[0].group_size
        return self._product_s(self.linear_weights, bits / 8, num_rows)

    def _head_s(self, num_rows: int) -> float:
        return self._product_s(self.model.hidden_size * self.model.vocab_size, self.head_bits / 8, num_rows)

    def _product_s(self, num_weights: int, weight_bytes: float, num_rows: int) -> float:
        return max(num_weights * weight_bytes / self.device.bandwidth, 2 * num_weights * num_rows / self.device.flops)
