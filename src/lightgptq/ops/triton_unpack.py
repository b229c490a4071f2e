"""Integer codes to exact float16 or bfloat16 values in registers, for every kernel in Triton.

A word of 32 bits holds two halves of 16; each half holds ``16 // bits`` fields, and the fields at one place of
both halves are two neighbours along K (a *pair*). OR-ing the exponent of ``2^(m - p)`` onto a field at place p of a
mantissa of m bits gives the float ``2^(m - p) + code`` without a conversion, for both halves of a word at
once; subtracting ``2^(m - p) + zero`` leaves ``code - zero``, exactly, as all three are small integers.

At 3 bits a half holds five fields and a spare top bit, and the top bits of three words make a sixteenth
code: 32 codes in 3 words, and no code straddles two words.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairs(
    w0: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    PLACE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
) -> tl.tensor:
    """The fields of one plane, moved right by SHIFT bits to bit PLACE of each half; other bits are 0."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    if BITS == 3 and PLANE == 15:
        pairs = ((w0 >> 15) & 0x00010001) | ((w1 >> 14) & 0x00020002) | ((w2 >> 13) & 0x00040004)
    else:
        if BITS == 3 and PLANE >= 10:
            word = w2
        elif BITS == 3 and PLANE >= 5:
            word = w1
        else:
            word = w0
        pairs = (word >> SHIFT) & (MASK | (MASK << 16))
    return pairs


@triton.jit
def plane_values(
    w0: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    zero: tl.tensor,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
) -> tl.tensor:
    """``code - zero`` of one plane, exact.

    w0, w1, w2  (N, P) uint32 words; only 3 bits looks at more than the first
    zero        (N,) int32
    IN_FLOAT32  subtract in float32 and cut the result to bfloat16: for 8 bits, which its mantissa of 7 cannot
                take in, and for GPUs without bfloat16 arithmetic
    Returns (N, 2 P) of DTYPE.
    """
    SPARE: tl.constexpr = BITS == 3 and PLANE == 15
    FIELD: tl.constexpr = 0 if SPARE else (PLANE % 5 * BITS if BITS == 3 else PLANE * BITS)
    if IN_FLOAT32:
        fields = _pairs(w0, w1, w2, FIELD, 0, BITS, PLANE)
        ONES: tl.constexpr = (127 + 23 - FIELD) << 23
        shift = zero[:, None].to(tl.float32) + (1 << (23 - FIELD))
        low = ((fields & 0xFFFF) | ONES).to(tl.float32, bitcast=True) - shift
        high = ((fields >> 16) | ONES).to(tl.float32, bitcast=True) - shift
        even = (low.to(tl.uint32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        odd = (high.to(tl.uint32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        values = tl.reshape(tl.join(even, odd), (w0.shape[0], 2 * w0.shape[1]))
    else:
        MANTISSA: tl.constexpr = 10 if tl.float16 == DTYPE else 7
        EXPONENT: tl.constexpr = 15 if tl.float16 == DTYPE else 127
        # Fields that fit below the mantissa's end stay where they are, so that a word is moved once or twice
        # for all of its planes.
        PER_SHIFT: tl.constexpr = MANTISSA // BITS * BITS
        SHIFT: tl.constexpr = FIELD // PER_SHIFT * PER_SHIFT
        PLACE: tl.constexpr = FIELD - SHIFT
        HALF: tl.constexpr = (EXPONENT + MANTISSA - PLACE) << MANTISSA
        pairs = _pairs(w0, w1, w2, PLACE, SHIFT, BITS, PLANE) | (HALF | (HALF << 16))
        even = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        # Subtracted after the join: the compiler then works on both halves of a register at once.
        values = tl.reshape(tl.join(even, odd), (w0.shape[0], 2 * w0.shape[1]))
        values -= (zero + (1 << (MANTISSA - PLACE))).to(DTYPE)[:, None]
    return values
