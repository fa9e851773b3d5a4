"""A token's heads on their way to attention and to the cache: RMS norm, rotation, quantization, storing.

Device functions shared by `kv_cache.append_kv` and `paged_attention.decode_attention`. A head travels as two halves,
elements [0, head_dim / 2) and the rest: rotation pairs element j with element j + head_dim / 2, and the packed 4-bit
order (`layout.pack_rows`) puts the same two into one byte. Rounding follows `reference.quantize_kv` bit for bit.

A row that is not finite throughout is stored as a scale and a minimum of NaN (unquantized: as it is). The sequence that
overflowed then sees NaN and can be told so. Nobody else does: attention reads no place past a sequence's end, so what a
block's former owner left there cannot matter.
"""

import triton
import triton.language as tl

# reference.quantize_kv: widens stored steps so that rounding to bfloat16 never cuts a value off.
_ROUND_OUT = tl.constexpr(2.0**-8)
_SMALLEST_SCALE = tl.constexpr(1e-30)
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def load_rotated(first_half, mask, cosines, sines, norm, eps, HALF: tl.constexpr, HAS_NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load heads, normalize and rotate them (rotate_half, NeoX order); return both halves in fp32.

    first_half: pointers to the heads' first halves [..., HALF]; cosines, sines broadcast to it; norm: pointer to the
    norm's weight [2 * HALF].
    """
    first = tl.load(first_half, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_half + HALF, mask=mask, other=0.0).to(tl.float32)
    return rotated(first, second, cosines, sines, norm, eps, HALF, HAS_NORM)


@triton.jit
def rotated(first, second, cosines, sines, norm, eps, HALF: tl.constexpr, HAS_NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Normalize heads given as halves, if asked to, and rotate them; arguments as in `load_rotated`."""
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=-1, keep_dims=True)
        inverse = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
        elements = tl.arange(0, HALF)
        first = first * inverse * tl.load(norm + elements).to(tl.float32)
        second = second * inverse * tl.load(norm + HALF + elements).to(tl.float32)
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def quantize_rows(first, second, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantize rows given as halves [rows, HALF]; return codes of both halves, scale and minimum [rows, 1], all fp32.

    Scale and minimum are bfloat16 values, rounded outwards.
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    SHARE: tl.constexpr = (1 + 2.0**-8) / (2**BITS - 1)
    # What is not finite becomes -inf, which the minimum finds.
    first = tl.where(tl.abs(first) < float("inf"), first, float("-inf"))
    second = tl.where(tl.abs(second) < float("inf"), second, float("-inf"))
    smallest = tl.min(tl.minimum(first, second), axis=1, keep_dims=True)
    largest = tl.max(tl.maximum(first, second), axis=1, keep_dims=True)
    is_bad = smallest == float("-inf")
    smallest = tl.where(is_bad, 0.0, smallest)
    largest = tl.where(is_bad, 0.0, largest)
    first = tl.where(is_bad, 0.0, first)
    second = tl.where(is_bad, 0.0, second)
    minimum = to_bfloat16(smallest - tl.abs(smallest) * _ROUND_OUT)
    scale = to_bfloat16(tl.maximum((largest - minimum) * SHARE, _SMALLEST_SCALE))
    first_codes, second_codes = _codes(first, scale, minimum, LEVELS), _codes(second, scale, minimum, LEVELS)
    minimum = tl.where(is_bad, float("nan"), minimum)
    return first_codes, second_codes, tl.where(is_bad, float("nan"), scale), minimum


@triton.jit
def to_bfloat16(x):  # type: ignore[no-untyped-def]
    """Round finite fp32 values to the nearest bfloat16, ties to even, and return them as fp32.

    Spelled out because the interpreter's conversion truncates.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _codes(values, scale, minimum, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    steps = tl.math.div_rn(values - minimum, tl.broadcast_to(scale, values.shape))
    return tl.minimum(tl.maximum((steps + _TO_INTEGER) - _TO_INTEGER, 0.0), LEVELS)


@triton.jit
def pack_scales(scale, minimum):  # type: ignore[no-untyped-def]
    """Return the cache's word of a place: the bfloat16 scale below, the bfloat16 minimum above; int32."""
    low = scale.to(tl.uint32, bitcast=True) >> 16
    return (low | (minimum.to(tl.uint32, bitcast=True) & 0xFFFF0000)).to(tl.int32, bitcast=True)


@triton.jit
def unpack_scales(words):  # type: ignore[no-untyped-def]
    """Return scale and minimum, fp32, of the cache's words."""
    bits = words.to(tl.uint32, bitcast=True)
    return (bits << 16).to(tl.float32, bitcast=True), (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def store_rows(data, scales, places, mask, first, second, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantize rows given as halves [rows, HEAD_DIM / 2] and write them to the cache's `places` [rows, 1], int64.

    data: pointer to 16-bit elements, or to int32 words of codes; scales: pointer to int32 words (unused at 16 bits);
    mask [rows, 1]. Returns what was stored as codes of both halves, scale and minimum (at 16 bits: the rounded values,
    one and zero).
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    elements = tl.arange(0, HALF)[None, :]
    row_mask = tl.broadcast_to(mask, first.shape)
    if BITS == 16:
        target = data + places * HEAD_DIM + elements
        first_stored = first.to(data.dtype.element_ty)
        second_stored = second.to(data.dtype.element_ty)
        tl.store(target, first_stored, mask=row_mask)
        tl.store(target + HALF, second_stored, mask=row_mask)
        ones = tl.full(mask.shape, 1.0, tl.float32)
        return first_stored.to(tl.float32), second_stored.to(tl.float32), ones, ones * 0.0
    else:
        first_codes, second_codes, scale, minimum = quantize_rows(first, second, BITS)
        first_bytes, second_bytes = first_codes.to(tl.uint8), second_codes.to(tl.uint8)
        target = data.to(tl.pointer_type(tl.uint8)) + places * (HEAD_DIM * BITS // 8) + elements
        if BITS == 4:
            tl.store(target, first_bytes | (second_bytes << 4), mask=row_mask)
        else:
            tl.store(target, first_bytes, mask=row_mask)
            tl.store(target + HALF, second_bytes, mask=row_mask)
        tl.store(scales + places, pack_scales(scale, minimum), mask=mask)
        return first_codes, second_codes, scale, minimum
