"""What kernels share: from numbers of pixels to coordinates, from taps to residues, and conversions of values."""

import triton
import triton.language as tl

# Triton's interpreter multiplies and rounds bfloat16 wrongly, so that both are done by hand there.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

# A row of a pixel beyond the end: outside every map whichever tap is added to it.
OUTSIDE = tl.constexpr(-(1 << 30))


@triton.jit
def unflatten(pixel, height, width):
    """(n, row, column) of a pixel's number in an N × height × width map."""
    column = pixel % width
    rest = pixel // width
    return rest // height, rest % height, column


@triton.jit
def flatten(n, row, column, height, width):
    """A pixel's number, 64 bits wide so that it can be multiplied by the channels."""
    return ((n * height + row) * width + column).to(tl.int64)


@triton.jit
def inside(index, size):
    return tl.cast(index, tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def pooled_columns(first, BLOCK: tl.constexpr):
    """(pooled pixel, row, column in its 2×2 window) of a tile's BLOCK columns, the first pooled pixel being `first`.

    Column 16·g + 8·row + 2·p + column belongs to pooled pixel 4·g + p: the four values of a window then lie in one
    thread's accumulators of a tensor-core product.
    """
    index = tl.arange(0, BLOCK)
    return first + index // 16 * 4 + index % 8 // 2, index // 8 % 2, index % 2


@triton.jit
def first_tap(residue, TAPS: tl.constexpr, STRIDE: tl.constexpr, GCD: tl.constexpr, INVERSE: tl.constexpr):
    """The least tap with tap · dilation ≡ residue (mod stride), or TAPS where no tap is.

    The taps of a residue are STRIDE / GCD apart, and the outputs they lead to dilation / GCD.

    Args:
        GCD: of stride and dilation.
        INVERSE: of dilation / GCD modulo STRIDE / GCD.
    """
    tap = residue // GCD * INVERSE % (STRIDE // GCD)
    return tl.where(residue % GCD == 0, tap, TAPS)


@triton.jit
def relu(value):
    """max(value, 0) with NaN kept."""
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def is_update(value, best):
    """Whether a scan for the maximum moves on to `value`: as torch's, the first of equals and the last NaN win."""
    return (value > best) | (value != value)


@triton.jit
def operand(value):
    """A factor of tl.dot."""
    if INTERPRET:
        value = value.to(tl.float32)
    return value


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value != value, value, bits.to(tl.float32, bitcast=True))
    return value.to(dtype)
