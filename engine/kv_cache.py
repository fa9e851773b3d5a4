"""The memory of keys and values: one pool of blocks a layer, plain or quantized, with its scales beside it.

Owns the tensors. Which block belongs to whom is `blocks`' business, what a block costs `memory_sizes`'; the arithmetic
of quantizing, appending and reading is the kernels'.
"""

import torch

from .config import QuantPolicy
from .model_config import ModelConfig

_SCALE_DTYPE = torch.bfloat16


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for every layer.

    A layer's data is [2 (key, value), num_blocks, num_kv_heads, block_size, width]: head_dim elements of `dtype` for
    quant_policy 0, head_dim bytes for 8, head_dim / 2 bytes for 4 (two values a byte). Quantized layers have scales
    [2, num_blocks, num_kv_heads, block_size, 2]: scale and minimum of each token and head, bfloat16 for any compute
    type. bfloat16 has float32's range, so nothing overflows, and codes are computed from the stored scale, so its
    short mantissa costs little (numbers in `reference.quantize_kv`). All blocks start as zeros, because attention
    multiplies unused places by zero.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        quant_policy: QuantPolicy,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.quant_policy = quant_policy
        self.bits = quant_policy or dtype.itemsize * 8
        self.dtype = dtype
        places = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size)
        width = config.head_dim // 2 if quant_policy == 4 else config.head_dim
        data_dtype = dtype if quant_policy == 0 else torch.uint8
        self._data = torch.zeros((*places, width), dtype=data_dtype, device=device).unbind(0)
        self._scales: tuple[torch.Tensor | None, ...] = (None,) * config.num_layers
        if quant_policy != 0:
            self._scales = torch.zeros((*places, 2), dtype=_SCALE_DTYPE, device=device).unbind(0)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a layer's data and scales (None when not quantized), as the kernels take them."""
        return self._data[layer], self._scales[layer]
