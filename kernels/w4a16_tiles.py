"""The order of 4-bit weights in GPU memory: packs them once at load, unpacks them in registers. Nothing else knows it.

A weight [out_features, in_features] is cut into records of 64 rows x 128 inputs, ordered [rows / 64, inputs / 128], so
that a program that walks along the inputs reads one contiguous run. A record holds 1024 words of eight values each,
then one word a row and scale group: the 16-bit scale below, the zero point above it (a 4-byte word, because narrower
loads cannot be copied asynchronously). 0.531 bytes a weight at group size 128.

The words are in the order in which a tensor core instruction wants its left operand in registers (PTX ISA, "Matrix
Fragments for mma.m16n8k16"), so a thread's 16-byte load becomes its fragment with no exchange between threads:
- row r5 r4r3 r2r1r0 of a record (six bits) is row r4r3 r5 r2r1r0 of the weight's 64;
- word c * 4 + b of a row: c is the thread's place among the four that share a row, b a block of 32 inputs;
- value `high mid low` (three bits) of a word lies at bit 8 * high + 4 * mid + 16 * low, so that one mask takes a pair.
Which of the 32 inputs a value is depends on how many neighbours of a row a thread holds, the fragment's width: input
`high mid c low` for wgmma (width 2), `high c mid low` for mma.sync as Triton lays it out (width 4). Inputs are summed,
so a product may take them in either order if its right operand takes the same one.

SwiGLU's weights are packed with rows of gate and up in turns of eight, so that both lie in one thread.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

RECORD_ROWS = 64
RECORD_INPUTS = 128
WORDS_PER_RECORD = RECORD_ROWS * RECORD_INPUTS // 8
# Rows are padded to the widest tile that a product uses.
ROW_PADDING = 128
INTERLEAVED_ROWS = 8
_LARGEST_ZERO = 16  # GPTQ stores zero points less one, so 16 occurs
_ROWS_AT_A_TIME = 2048  # while packing: bounds the temporaries to 24 bytes a weight of so many rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A 4-bit weight in record order. `interleaved`: rows of gate and up in turns of eight, for `w4a16_swiglu`."""

    records: torch.Tensor  # int32 [padded out_features / 64, in_features / 128, words]
    out_features: int
    in_features: int
    group_size: int  # 32, 64 or 128; larger groups repeat their scale in each record
    dtype: torch.dtype
    fragment_width: int
    interleaved: bool
    # What launchers found out once for this weight: tiles by operation and bucket of rows, descriptors.
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def padded_out_features(self) -> int:
        """Return the number of rows that the records hold."""
        return self.records.shape[0] * RECORD_ROWS


def can_pack(out_features: int, in_features: int, group_size: int) -> bool:
    """Say whether `pack_weight` takes this shape: in_features by 128, out_features by 16, whole groups.

    group_size -1 is one group for all inputs.
    """
    if group_size == -1:
        group_size = in_features
    fits = group_size in (32, 64) or (group_size > 0 and group_size % RECORD_INPUTS == 0)
    return fits and in_features % RECORD_INPUTS == 0 and in_features % group_size == 0 and out_features % 16 == 0


def has_wgmma(device: torch.device) -> bool:
    """Say whether the device multiplies by warp groups, which only Hopper does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def mma_sync_width() -> int:
    """Return the fragment width that this version of Triton lays mma.sync's operands out in: 4 up to 3.7, then 2."""
    major, minor = map(int, triton.__version__.split(".")[:2])
    return 4 if (major, minor) <= (3, 7) else 2


def pack_weight(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    *,
    interleave_halves: bool = False,
    fragment_width: int | None = None,
) -> PackedWeight:
    """Reorder a 4-bit weight for `w4a16_matmul`, or with interleave_halves (rows: gate, then up) for `w4a16_swiglu`.

    codes uint8 [out_features, in_features / 2] in row order (`layout.pack_rows`); zeros (integers 0..16 of any dtype)
    and scales [out_features, groups]; dtype float16 or bfloat16, of scales and activations. fragment_width is the
    device's own unless given. Raises ValueError for shapes that `can_pack` refuses.
    """
    out_features, in_features = codes.shape[0], codes.shape[1] * 2
    group_size = in_features // scales.shape[1]
    if not can_pack(out_features, in_features, group_size):
        raise ValueError(
            f"a 4-bit weight of {out_features}x{in_features} in groups of {group_size} cannot be packed: in_features "
            f"have to be a multiple of {RECORD_INPUTS}, out_features of 16, groups 32, 64 or a multiple of 128"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"4-bit products compute in float16 or bfloat16, not {dtype}")
    width = fragment_width
    if width is None:
        width = 2 if has_wgmma(codes.device) else mma_sync_width()
    record_group = min(group_size, RECORD_INPUTS)
    num_groups = in_features // record_group
    words = scale_words(zeros, scales, dtype).repeat_interleave(num_groups // scales.shape[1], 1)
    groups_per_record = RECORD_INPUTS // record_group
    padded = -(-out_features // ROW_PADDING) * ROW_PADDING
    records = torch.zeros(
        padded // RECORD_ROWS,
        in_features // RECORD_INPUTS,
        WORDS_PER_RECORD + RECORD_ROWS * groups_per_record,
        dtype=torch.int32,
        device=codes.device,
    )
    order = _row_order(out_features, padded, codes.device, interleave_halves)
    for start in range(0, padded, _ROWS_AT_A_TIME):
        rows = order[start : start + _ROWS_AT_A_TIME]
        part = records[start // RECORD_ROWS : (start + rows.shape[0]) // RECORD_ROWS]
        is_padding = (rows < 0).unsqueeze(1)
        rows = rows.clamp(min=0)
        _fill_records(part, codes[rows].masked_fill_(is_padding, 0), words[rows].masked_fill_(is_padding, 0), width)
    return PackedWeight(
        records=records,
        out_features=out_features,
        in_features=in_features,
        group_size=record_group,
        dtype=dtype,
        fragment_width=width,
        interleaved=interleave_halves,
    )


def scale_words(zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return int32 words, scale bits below and zero point above, of zeros and scales of one shape."""
    if bool(((zeros < 0) | (zeros > _LARGEST_ZERO)).any()):
        raise ValueError(f"zero points of a 4-bit weight are 0 to {_LARGEST_ZERO}")
    bits = scales.to(dtype).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return bits | (zeros.to(torch.int32) << 16)


def _row_order(out_features: int, padded: int, device: torch.device, interleave_halves: bool) -> torch.Tensor:
    """Return which row of the weight each row of the records is, in reading order of the records; -1 is padding."""
    rows = torch.arange(padded, device=device)
    if interleave_halves:
        turn, half, place = rows // (2 * INTERLEAVED_ROWS), rows // INTERLEAVED_ROWS % 2, rows % INTERLEAVED_ROWS
        sources = half * (out_features // 2) + turn * INTERLEAVED_ROWS + place
    else:
        sources = rows
    sources = sources.masked_fill(rows >= out_features, -1)
    return sources.view(-1, 4, 2, 8).transpose(1, 2).reshape(-1)


def _fill_records(records: torch.Tensor, codes: torch.Tensor, words: torch.Tensor, width: int) -> None:
    """Write records from rows in the records' order: codes uint8 [rows, in / 2], scale words int32 [rows, groups]."""
    num_tiles, num_blocks, _ = records.shape
    values = torch.cat((codes & 0xF, codes >> 4), 1)
    if width == 2:  # inputs of a block of 32: high, mid, c, low
        values = values.view(num_tiles, RECORD_ROWS, num_blocks, 4, 2, 2, 4, 2).permute(0, 2, 1, 6, 3, 4, 5, 7)
    else:  # high, c, mid, low
        values = values.view(num_tiles, RECORD_ROWS, num_blocks, 4, 2, 4, 2, 2).permute(0, 2, 1, 5, 3, 4, 6, 7)
    target = records[..., :WORDS_PER_RECORD].view(num_tiles, num_blocks, RECORD_ROWS, 4, 4)
    for high in range(2):
        for mid in range(2):
            for low in range(2):
                target |= values[..., high, mid, low].to(torch.int32) << (8 * high + 4 * mid + 16 * low)
    scales = words.view(num_tiles, RECORD_ROWS, num_blocks, -1).transpose(1, 2)
    records[..., WORDS_PER_RECORD:] = scales.flatten(2)


# Eight values of a word as pairs of 16-bit numbers: a mask and an exponent make 1024 + value (fp16; for the upper
# nibble of a byte 1024 + 16 * value) or 128 + value (bf16) in one instruction, from which the zero point is taken.
_FP16_PAIRS = """
    .reg .b32 t, a, b, c, d, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 b, $8, 0x00f000f0, 0x64006400, 0xea;
    shr.u32 t, $8, 8;
    lop3.b32 c, t, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 d, t, 0x00f000f0, 0x64006400, 0xea;
    sub.f16x2 a, a, $9;
    fma.rn.f16x2 b, b, sixteenth, $10;
    sub.f16x2 c, c, $9;
    fma.rn.f16x2 d, d, sixteenth, $10;
"""
# sub.bf16x2 and mul.bf16x2 need sm_90; fma with 1 and with -0 do the same from sm_80 on.
_BF16_PAIRS = """
    .reg .b32 t, a, b, c, d, one, nothing;
    mov.b32 one, 0x3f803f80;
    mov.b32 nothing, 0x80008000;
    lop3.b32 a, $8, 0x000f000f, 0x43004300, 0xea;
    shr.u32 t, $8, 4;
    lop3.b32 b, t, 0x000f000f, 0x43004300, 0xea;
    shr.u32 t, $8, 8;
    lop3.b32 c, t, 0x000f000f, 0x43004300, 0xea;
    shr.u32 t, $8, 12;
    lop3.b32 d, t, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 a, a, one, $9;
    fma.rn.bf16x2 b, b, one, $9;
    fma.rn.bf16x2 c, c, one, $9;
    fma.rn.bf16x2 d, d, one, $9;
"""
_FP16_SCALE = "".join(f"mul.f16x2 {pair}, {pair}, $11;\n" for pair in "abcd")
_BF16_SCALE = "".join(f"fma.rn.bf16x2 {pair}, {pair}, $10, nothing;\n" for pair in "abcd")
_RETURN_PAIRS = "".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};\n" for i, pair in enumerate("abcd"))
_EIGHT = "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r"

FP16_ASM = tl.constexpr("{" + _FP16_PAIRS + _RETURN_PAIRS + "}")
FP16_SCALED_ASM = tl.constexpr("{" + _FP16_PAIRS + _FP16_SCALE + _RETURN_PAIRS + "}")
BF16_ASM = tl.constexpr("{" + _BF16_PAIRS + _RETURN_PAIRS + "}")
BF16_SCALED_ASM = tl.constexpr("{" + _BF16_PAIRS + _BF16_SCALE + _RETURN_PAIRS + "}")
ONE_ARGUMENT = tl.constexpr(_EIGHT + ",r")
TWO_ARGUMENTS = tl.constexpr(_EIGHT + ",r,r")
THREE_ARGUMENTS = tl.constexpr(_EIGHT + ",r,r,r")


@triton.jit
def scales_of(words, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scales in scale words as fp32, same shape."""
    if DTYPE.is_bf16():
        scales = (words << 16).to(tl.float32, bitcast=True)
    else:
        scales = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scales


@triton.jit
def _pairs(words, scale_words, DTYPE: tl.constexpr, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack with packed arithmetic: eight tensors of the words' shape."""
    zeros = scale_words >> 16
    scales = (scale_words & 0xFFFF) * 0x00010001
    if DTYPE.is_bf16():
        negative = zeros * 0x00010001 - 0x3CFF3D00  # -(128 + zero), twice: 0xC300C300 + zero
        if SCALED:
            pairs = tl.inline_asm_elementwise(
                BF16_SCALED_ASM, TWO_ARGUMENTS, [words, negative, scales], (tl.bfloat16,) * 8, is_pure=True, pack=1
            )
        else:
            pairs = tl.inline_asm_elementwise(
                BF16_ASM, ONE_ARGUMENT, [words, negative], (tl.bfloat16,) * 8, is_pure=True, pack=1
            )
    else:
        low = zeros * 0x00010001 + 0x64006400  # 1024 + zero, twice
        high = zeros * 0x00100010 - 0x2BFF2C00  # -(64 + zero), twice: 0xD400D400 + 16 * zero
        if SCALED:
            pairs = tl.inline_asm_elementwise(
                FP16_SCALED_ASM, THREE_ARGUMENTS, [words, low, high, scales], (tl.float16,) * 8, is_pure=True, pack=1
            )
        else:
            pairs = tl.inline_asm_elementwise(
                FP16_ASM, TWO_ARGUMENTS, [words, low, high], (tl.float16,) * 8, is_pure=True, pack=1
            )
    return pairs


@triton.jit
def _value(words, scale_words, SHIFT: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack the value at bit SHIFT of each word with plain operations."""
    value = (((words >> SHIFT) & 0xF) - (scale_words >> 16)).to(tl.float32)
    if SCALED:
        value *= scales_of(scale_words, DTYPE)
    return value.to(DTYPE)


@triton.jit
def unpack_tile(  # type: ignore[no-untyped-def]
    words,
    scale_words,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return values less their zero points, and with SCALED times their scales, [BLOCK_N, 128] of DTYPE.

    words int32 [BLOCK_N, 16], BLOCK_N / 64 records below one another; scale_words int32 [BLOCK_N, 16] or [BLOCK_N, 1].
    Rows come in the weight's order, inputs in the order of fragment width WIDTH: the weight's own if it was packed so,
    else see `input_order`.
    """
    if not INTERPRETED:
        v0, v1, v2, v3, v4, v5, v6, v7 = _pairs(words, tl.broadcast_to(scale_words, (BLOCK_N, 16)), DTYPE, SCALED)
    else:
        v0 = _value(words, scale_words, 0, DTYPE, SCALED)
        v1 = _value(words, scale_words, 16, DTYPE, SCALED)
        v2 = _value(words, scale_words, 4, DTYPE, SCALED)
        v3 = _value(words, scale_words, 20, DTYPE, SCALED)
        v4 = _value(words, scale_words, 8, DTYPE, SCALED)
        v5 = _value(words, scale_words, 24, DTYPE, SCALED)
        v6 = _value(words, scale_words, 12, DTYPE, SCALED)
        v7 = _value(words, scale_words, 28, DTYPE, SCALED)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    # record, r5, r4r3, r2r1r0, c, block of 32, high, mid, low
    values = tl.join(even, odd).reshape(BLOCK_N // 64, 2, 4, 8, 4, 4, 2, 2, 2)
    if WIDTH == 2:
        return values.permute(0, 2, 1, 3, 5, 6, 7, 4, 8).reshape(BLOCK_N, 128)
    return values.permute(0, 2, 1, 3, 5, 6, 4, 7, 8).reshape(BLOCK_N, 128)


@triton.jit
def weight_row_order(words, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring [BLOCK_N] words, one a row of the records, into the order of the weight's rows."""
    return words.reshape(BLOCK_N // 64, 2, 4, 8).permute(0, 2, 1, 3).reshape(BLOCK_N)


@triton.jit
def input_order(PACKED_WIDTH: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which of 128 inputs each column of `unpack_tile` is, for words packed with PACKED_WIDTH."""
    k = tl.arange(0, 128)
    # The hints stand on the sums themselves: behind a call they would be lost, and with them asynchronous copies.
    if PACKED_WIDTH == 2 and WIDTH == 4:  # a column is `high c mid low`
        k = tl.multiple_of(tl.max_contiguous((k & 0x71) | ((k & 2) << 2) | ((k & 12) >> 1), 2), 2)
    if PACKED_WIDTH == 4 and WIDTH == 2:  # a column is `high mid c low`
        k = tl.multiple_of(tl.max_contiguous((k & 0x71) | ((k & 8) >> 2) | ((k & 6) << 1), 2), 2)
    return k
