"""Words to weights, in registers: of each decoder, the weights of one position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from puzzlemoe_vllm.format.codes import Decoder
from puzzlemoe_vllm.format.codes.trellis import MULTIPLIER

INTERPRETED = triton.knobs.runtime.interpret
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
"""What products multiply.  The interpreter has no bf16 products; float32 holds every bf16."""

PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED)
"""Whether kernels may hold PTX, which decodes two 16-bit words per instruction; Triton's own operators take one."""

MASK16 = tl.constexpr(int(Decoder.MASK16))
ANGLE16 = tl.constexpr(int(Decoder.ANGLE16))
TABLE6 = tl.constexpr(int(Decoder.TABLE6))
TRELLIS8 = tl.constexpr(int(Decoder.TRELLIS8))
"""The first of the trellises, which end the list."""
FACTOR = tl.constexpr(MULTIPLIER)


@triton.jit
def load_words(words, rows, column, stop, K, DECODER: tl.constexpr, BITS: tl.constexpr):
    """Words of some rows [N, 1] and columns [1, K] of a pair, one an element; of a trellis, their states."""
    keep = column < stop
    if DECODER == TABLE6:
        # Of every 16 columns, eight bytes hold the upper four bits and four the lower two.
        place = words + rows * (K // 16 * 12) + column // 16 * 12
        upper = tl.load(place + column % 16 // 2, mask=keep, other=0).to(tl.int32) >> column % 2 * 4 & 15
        lower = tl.load(place + 8 + column % 16 // 4, mask=keep, other=0).to(tl.int32) >> column % 4 * 2 & 3
        return upper << 2 | lower
    elif DECODER >= TRELLIS8:
        place = 32 * (rows % 8) + column % 8 // 2 * 8 + column % 32 // 16 * 4 + column % 16 // 8 * 2 + column % 2
        STATE: tl.constexpr = min(16, 5 * BITS)
        # A tile is 16 * BITS numbers of 16 bits; a state lies in one of them and the next, around its end.
        first = (place + 1) * BITS + (256 * BITS - STATE)
        tile = words.to(tl.pointer_type(tl.uint16)) + rows // 8 * (K // 2 * BITS) + column // 32 * (16 * BITS)
        lower = tl.load(tile + first // 16 % (16 * BITS), mask=keep, other=0).to(tl.uint32)
        upper = tl.load(tile + (first // 16 + 1) % (16 * BITS), mask=keep, other=0).to(tl.uint32)
        return (lower | upper << 16) >> (first % 16).to(tl.uint32) & (1 << STATE) - 1
    else:
        return tl.load(words + rows * K + column, mask=keep, other=0)


@triton.jit
def _angle16_weights(words, position: tl.constexpr):
    direction = (words >> 12 & 3).to(tl.float32)
    multiplier = (15 - 4 * direction if position == 0 else 3 + 4 * direction) * 2.0**-4
    bits = (words & 0x0FFF).to(tl.int32)
    normal = ((bits << 16) + (112 << 23)).to(tl.float32, bitcast=True)
    weight = tl.where(bits < 128, bits.to(tl.float32) * 2.0**-21, normal) * multiplier
    return tl.where((words << position) < 0, -weight, weight).to(OPERAND)


@triton.jit
def _mask16_weights(words, position):
    """Times 2^16: with the mask as the top exponent bit, the stored exponent is 16 too high for an active weight and
    leaves a masked one below 4e-34, so no select and no addition is needed.
    """
    position = tl.full((), position, words.dtype)
    if PTX:
        # Bits that cross between the two words of a register land where the masks drop them.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 shift, sign, mask, low;
            and.b32 shift, $2, 1;
            shl.b32 sign, $1, shift;
            shl.b32 mask, sign, 1;
            and.b32 sign, sign, 0x80008000;
            and.b32 mask, mask, 0x40004000;
            and.b32 low, $1, 0x0FFF0FFF;
            or.b32 low, low, sign;
            or.b32 $0, low, mask; }""",
            "=r,r,r", [words, position], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    sign = (words << position) & -0x8000
    mask = (words << (position + 1)) & 0x4000
    return (sign | mask | (words & 0x0FFF)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _table_weights(words, position: tl.constexpr, steps, table):
    """Weights of one position of words with steps."""
    value = tl.load(table + words.to(tl.int32) * 2 + position)
    return (value.to(tl.float32) * steps.to(tl.float32)).to(OPERAND)


@triton.jit
def _trellis_weights(states, position: tl.constexpr, steps):
    """Weights of one position of states; puzzlemoe_vllm/format/codes/trellis.py has the formula."""
    x = states * FACTOR
    if position == 0:
        value = (x & 31) + (x >> 8 & 31) + (x >> 16 & 31) + (x >> 24 & 31)
    else:
        value = (x >> 3 & 31) + (x >> 19 & 31) + 62 - (x >> 11 & 31) - (x >> 27)
    return ((value.to(tl.float32) - 62) * steps.to(tl.float32)).to(OPERAND)


@triton.jit
def decode(tile, position: tl.constexpr, steps, table, DECODER: tl.constexpr):
    """Weights of one position, those of MASK16 times 2^16; without a position the tile is weights already."""
    if position is None:
        return tile
    elif DECODER == MASK16:
        return _mask16_weights(tile, position)
    elif DECODER == ANGLE16:
        return _angle16_weights(tile, position)
    elif DECODER >= TRELLIS8:
        return _trellis_weights(tile, position, steps)
    else:
        return _table_weights(tile, position, steps, table)
