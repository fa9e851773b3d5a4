"""Tiles of the cache as operands of a matrix product: codes to 16-bit numbers in a few register operations.

A code is not converted but put into the mantissa of a float16 whose exponent makes its last bits count one: 0x6400 | c
is 1024 + c, and 0x5400 | (c << 4) is 64 + c (Kim et al., "Who Says Elephants Can't Run", 2022). That bias is the same
for all codes of a half of a head, so it leaves a product as one sum per row, which the caller takes off.

The order of elements is chosen so that a word's codes are the fragment that a thread holds of the operand
(mma.m16n8k16: lane 4r + c holds column r and rows around c), and no exchange between threads is needed: keys come with
their elements permuted, which a product with equally permuted queries does not see, values with their columns permuted,
undone once at the end. Where inline assembly is not to be had, plain Triton computes the same numbers.
"""

import triton
import triton.language as tl

# Biases of the two halves of a head. Keys: a few products, so 1024 costs no accuracy. Values: thousands of them are
# summed, and 64 keeps 16 times more of what float32 holds.
KEY_BIAS_FIRST = tl.constexpr(1024.0)
KEY_BIAS_SECOND_4 = tl.constexpr(64.0)
VALUE_BIAS_4 = tl.constexpr(64.0)
VALUE_BIAS_8 = tl.constexpr(1024.0)


@triton.jit
def multiply(a, b, accumulator, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a @ b + accumulator in fp32. The interpreter would multiply bfloat16's bits as integers."""
    if COMPILED:
        return tl.dot(a, b, accumulator)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)


@triton.jit
def exp2(x, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 2**x, zero where that is below the normal numbers: one instruction, where tl.math.exp2 takes four."""
    if COMPILED:
        return _approximate(x, "ex2.approx.ftz.f32 $0, $1;")
    else:
        return tl.math.exp2(x)


@triton.jit
def log2(x, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return log2(x) of normal numbers."""
    if COMPILED:
        return _approximate(x, "lg2.approx.ftz.f32 $0, $1;")
    else:
        return tl.math.log2(x)


@triton.jit
def reciprocal(x, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 1 / x of normal numbers, within one unit of the last place."""
    if COMPILED:
        return _approximate(x, "rcp.approx.ftz.f32 $0, $1;")
    else:
        return 1.0 / x


@triton.jit
def _approximate(x, INSTRUCTION: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _nibble(words, INDEX: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    return (((words >> (4 * INDEX)) & 0xF).to(tl.float32) + BIAS).to(tl.float16)


@triton.jit
def _byte(words, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    return (((words >> (8 * INDEX)) & 0xFF).to(tl.float32) + 1024.0).to(tl.float16)


@triton.jit
def _key_nibbles(words, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the nibbles 0, 4, 1, 5, 2, 6, 3, 7 of words: even ones biased by 1024, odd ones by 64."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, s;
            shr.u32 s, $8, 8;
            lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 b, $8, 0x00f000f0, 0x54005400, 0xea;
            lop3.b32 c, s, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 d, s, 0x00f000f0, 0x54005400, 0xea;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            mov.b32 {$4, $5}, c;
            mov.b32 {$6, $7}, d;
            }""",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r",
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _nibble(words, 0, 1024.0),
            _nibble(words, 4, 1024.0),
            _nibble(words, 1, 64.0),
            _nibble(words, 5, 64.0),
            _nibble(words, 2, 1024.0),
            _nibble(words, 6, 1024.0),
            _nibble(words, 3, 64.0),
            _nibble(words, 7, 64.0),
        )


@triton.jit
def _key_bytes(words, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the four bytes of words, biased by 1024."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $4, 0x64646464, 0x4140;
            prmt.b32 b, $4, 0x64646464, 0x4342;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            }""",
            "=&h,=&h,=&h,=&h,r",
            [words],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=1,
        )
    else:
        return _byte(words, 0), _byte(words, 1), _byte(words, 2), _byte(words, 3)


@triton.jit
def _value_nibbles(even, odd, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return nibble 0 of even and of odd, then nibble 1 of both, ..., all biased by 64.

    even and odd are words of two neighbouring tokens: a register of the operand holds both tokens' same element.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 x, y, s, a, b, c, d, e, f, g, h;
            prmt.b32 x, $16, $17, 0x5410;
            prmt.b32 y, $16, $17, 0x7632;
            shl.b32 s, x, 4;
            lop3.b32 a, s, 0x00f000f0, 0x54005400, 0xea;
            lop3.b32 b, x, 0x00f000f0, 0x54005400, 0xea;
            shr.u32 s, x, 4;
            lop3.b32 c, s, 0x00f000f0, 0x54005400, 0xea;
            shr.u32 s, x, 8;
            lop3.b32 d, s, 0x00f000f0, 0x54005400, 0xea;
            shl.b32 s, y, 4;
            lop3.b32 e, s, 0x00f000f0, 0x54005400, 0xea;
            lop3.b32 f, y, 0x00f000f0, 0x54005400, 0xea;
            shr.u32 s, y, 4;
            lop3.b32 g, s, 0x00f000f0, 0x54005400, 0xea;
            shr.u32 s, y, 8;
            lop3.b32 h, s, 0x00f000f0, 0x54005400, 0xea;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            mov.b32 {$4, $5}, c;
            mov.b32 {$6, $7}, d;
            mov.b32 {$8, $9}, e;
            mov.b32 {$10, $11}, f;
            mov.b32 {$12, $13}, g;
            mov.b32 {$14, $15}, h;
            }""",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r",
            [even, odd],
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _nibble(even, 0, 64.0),
            _nibble(odd, 0, 64.0),
            _nibble(even, 1, 64.0),
            _nibble(odd, 1, 64.0),
            _nibble(even, 2, 64.0),
            _nibble(odd, 2, 64.0),
            _nibble(even, 3, 64.0),
            _nibble(odd, 3, 64.0),
            _nibble(even, 4, 64.0),
            _nibble(odd, 4, 64.0),
            _nibble(even, 5, 64.0),
            _nibble(odd, 5, 64.0),
            _nibble(even, 6, 64.0),
            _nibble(odd, 6, 64.0),
            _nibble(even, 7, 64.0),
            _nibble(odd, 7, 64.0),
        )


@triton.jit
def _value_bytes(even, odd, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return byte 0 of even and of odd, then byte 1 of both, ..., all biased by 1024."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 x, y, a, b, c, d;
            prmt.b32 x, $8, $9, 0x5410;
            prmt.b32 y, $8, $9, 0x7632;
            prmt.b32 a, x, 0x64646464, 0x4240;
            prmt.b32 b, x, 0x64646464, 0x4341;
            prmt.b32 c, y, 0x64646464, 0x4240;
            prmt.b32 d, y, 0x64646464, 0x4341;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            mov.b32 {$4, $5}, c;
            mov.b32 {$6, $7}, d;
            }""",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r",
            [even, odd],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _byte(even, 0),
            _byte(odd, 0),
            _byte(even, 1),
            _byte(odd, 1),
            _byte(even, 2),
            _byte(odd, 2),
            _byte(even, 3),
            _byte(odd, 3),
        )


@triton.jit
def query_operand(first, second, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Order queries, given as halves [rows, HEAD_DIM / 2], as `key_operand` orders keys; [rows, HEAD_DIM]."""
    ROWS: tl.constexpr = first.shape[0]
    halves = tl.join(first, second)  # [rows, HALF, half]
    if BITS == 4:
        blocks = halves.reshape(ROWS, 4, HEAD_DIM // 32, 2, 2, 2)  # lane, block, pair member, quad, half
        return blocks.permute(0, 2, 4, 1, 5, 3).reshape(ROWS, HEAD_DIM)
    elif BITS == 8:
        natural = halves.permute(0, 2, 1).reshape(ROWS, HEAD_DIM // 64, 4, 4, 4)  # part, lane, block, byte
        return natural.permute(0, 1, 3, 2, 4).reshape(ROWS, HEAD_DIM)
    else:
        return halves.permute(0, 2, 1).reshape(ROWS, HEAD_DIM)


@triton.jit
def key_operand(words, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turn tiles of the cache's words [tiles, tokens, HEAD_DIM * BITS / 32] into biased codes, fp16 [.., HEAD_DIM]."""
    TILES: tl.constexpr = words.shape[0]
    TOKENS: tl.constexpr = words.shape[1]
    if BITS == 4:
        n0, n4, n1, n5, n2, n6, n3, n7 = _key_nibbles(words, ASSEMBLY)
        evens = tl.join(tl.join(n0, n2), tl.join(n1, n3))
        odds = tl.join(tl.join(n4, n6), tl.join(n5, n7))
        codes = tl.join(evens, odds).reshape(TILES, TOKENS, 4, HEAD_DIM // 32, 2, 4)  # lane, block, quad, member
        return codes.permute(0, 1, 3, 4, 2, 5).reshape(TILES, TOKENS, HEAD_DIM)
    else:
        b0, b1, b2, b3 = _key_bytes(words, ASSEMBLY)
        codes = tl.join(tl.join(b0, b2), tl.join(b1, b3)).reshape(TILES, TOKENS, HEAD_DIM // 64, 4, 4, 4)
        return codes.permute(0, 1, 2, 4, 3, 5).reshape(TILES, TOKENS, HEAD_DIM)


@triton.jit
def value_operand(words, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turn tiles of the cache's words into biased codes, transposed, fp16 [tiles, HEAD_DIM, tokens].

    Elements are ordered as `natural_order` knows.
    """
    TILES: tl.constexpr = words.shape[0]
    TOKENS: tl.constexpr = words.shape[1]
    WORDS: tl.constexpr = words.shape[2]
    even, odd = tl.split(words.reshape(TILES, TOKENS // 2, 2, WORDS).permute(0, 1, 3, 2))
    if BITS == 4:
        e0, o0, e1, o1, e2, o2, e3, o3, e4, o4, e5, o5, e6, o6, e7, o7 = _value_nibbles(even, odd, ASSEMBLY)
        evens = tl.join(tl.join(tl.join(e0, e4), tl.join(e2, e6)), tl.join(tl.join(e1, e5), tl.join(e3, e7)))
        odds = tl.join(tl.join(tl.join(o0, o4), tl.join(o2, o6)), tl.join(tl.join(o1, o5), tl.join(o3, o7)))
        codes = tl.join(evens, odds).reshape(TILES, TOKENS // 2, 8, WORDS // 8, 8, 2)  # lane, word, nibble, token
    else:
        e0, o0, e1, o1, e2, o2, e3, o3 = _value_bytes(even, odd, ASSEMBLY)
        evens = tl.join(tl.join(e0, e2), tl.join(e1, e3))
        odds = tl.join(tl.join(o0, o2), tl.join(o1, o3))
        codes = tl.join(evens, odds).reshape(TILES, TOKENS // 2, 8, WORDS // 8, 4, 2)  # lane, word, byte, token
    return codes.permute(0, 3, 4, 2, 1, 5).reshape(TILES, HEAD_DIM, TOKENS)


@triton.jit
def natural_order(elements, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring a product of `value_operand` [HEAD_DIM, heads] back to natural order, turned: [heads, HEAD_DIM]."""
    HEADS: tl.constexpr = elements.shape[1]
    if BITS == 4:
        blocks = elements.reshape(HEAD_DIM // 64, 4, 2, 8, HEADS)  # word, byte, half, lane
        return blocks.permute(4, 2, 3, 0, 1).reshape(HEADS, HEAD_DIM)
    elif BITS == 8:
        return elements.reshape(HEAD_DIM // 32, 4, 8, HEADS).permute(3, 2, 0, 1).reshape(HEADS, HEAD_DIM)
    else:
        return elements.T


@triton.jit
def value_column(first, second, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Order a value, given as halves [1, HEAD_DIM / 2], as `value_operand`'s columns are; [HEAD_DIM, 1]."""
    halves = tl.join(first, second)
    if BITS == 4:
        blocks = halves.reshape(8, HEAD_DIM // 64, 4, 2)  # lane, word, byte, half
        return blocks.permute(1, 2, 3, 0).reshape(HEAD_DIM, 1)
    elif BITS == 8:
        natural = halves.permute(0, 2, 1).reshape(8, HEAD_DIM // 32, 4)
        return natural.permute(1, 2, 0).reshape(HEAD_DIM, 1)
    else:
        return halves.permute(0, 2, 1).reshape(HEAD_DIM, 1)
