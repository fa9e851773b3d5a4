"""The order of 4-bit values inside bytes and words: pack, unpack, dequantize. Nothing else knows it.

Except w4a16_tiles.py, which owns the one further order: that of weights in GPU memory, made from the row order here.

Three layouts. In the plain order of GPTQ, compressed-tensors and AWQ's "gemv" eight neighbours share a 32-bit word, the
first in its lowest bits; which axis they are neighbours on is the format's business. AWQ's "gemm" order interleaves the
eight. The row order is ours, in memory: a row's first half in the low nibbles and its second half in the high nibbles,
so that unpacking is two contiguous writes.
"""

import torch

NIBBLES_PER_WORD = 8
# Nibble i (bits 4i..4i+3) of an AWQ word holds output column 8c + AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(values: torch.Tensor) -> torch.Tensor:
    """Pack integers 0..15, [..., n], into words in plain order, int32 [..., n / 8]: nibble i of word c is 8c + i."""
    if values.shape[-1] % NIBBLES_PER_WORD:
        raise ValueError(f"a word packs {NIBBLES_PER_WORD} values; a row of {values.shape[-1]} values does not divide")
    pairs = values.to(torch.uint8).reshape(*values.shape[:-1], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).flatten().view(torch.int32).view(*values.shape[:-1], -1)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Unpack words in plain order, int32 [..., n / 8], into integers 0..15, uint8 [..., n]."""
    word_bytes = words.flatten().view(torch.uint8)
    values = torch.empty(len(word_bytes), 2, dtype=torch.uint8, device=words.device)
    values[:, 0] = word_bytes & 0xF
    values[:, 1] = word_bytes >> 4
    return values.view(*words.shape[:-1], -1)


def pack_awq(values: torch.Tensor) -> torch.Tensor:
    """Pack integers 0..15, [rows, columns], into AWQ words, int32 [rows, columns / 8]."""
    rows, columns = values.shape
    if columns % NIBBLES_PER_WORD:
        raise ValueError(f"AWQ packs columns by {NIBBLES_PER_WORD}; {columns} columns do not divide")
    words = values.to(torch.uint8).reshape(rows, columns // NIBBLES_PER_WORD, NIBBLES_PER_WORD)
    return pack_words(words[..., list(AWQ_ORDER)].reshape(rows, columns))


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Unpack AWQ words, int32 [rows, columns / 8], into integers 0..15, uint8 [rows, columns].

    Column 4a + 2b + c of a word's eight is nibble 2a + b + 4c: the low (b = 0) or high half of byte a + 2c. So bytes
    are taken apart as they are, and nothing wider is ever in memory: a load's peak is made here.
    """
    word_bytes = words.contiguous().view(torch.uint8).view(*words.shape, 2, 2).transpose(-1, -2)  # [..., a, c]
    columns = torch.empty(*words.shape, 2, 2, 2, dtype=torch.uint8, device=words.device)
    columns[..., 0, :] = word_bytes & 0xF
    columns[..., 1, :] = word_bytes >> 4
    return columns.view(*words.shape[:-1], -1)


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """Pack integers 0..15, uint8 [..., n], into bytes [..., n / 2]: value j low, value j + n / 2 high."""
    half = values.shape[-1] // 2
    if values.shape[-1] != 2 * half:
        raise ValueError(f"two values share a byte; a row of {values.shape[-1]} values does not divide")
    return values[..., :half] | (values[..., half:] << 4)


def unpack_rows(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Unpack bytes [..., n / 2] into `out` [..., n] of any numeric dtype, and return it."""
    half = packed.shape[-1]
    out[..., :half] = packed & 0xF
    out[..., half:] = packed >> 4
    return out


def dequantize_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor | None, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight [out_features, in_features] of an AWQ linear: (q - zero) * scale.

    qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] (None: all zero points are 8), scales [groups, out].
    """
    groups, out_features = scales.shape
    codes = unpack_awq(qweight).to(dtype).view(groups, -1, out_features)
    zeros = torch.full_like(scales, 8, dtype=dtype) if qzeros is None else unpack_awq(qzeros).to(dtype)
    weight = (codes - zeros.unsqueeze(1)) * scales.to(dtype).unsqueeze(1)
    return weight.reshape(-1, out_features).t().contiguous()
