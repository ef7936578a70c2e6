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
def box_origin(box, boxes_h, boxes_w, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(image, row, column) of the first pixel of a box of BLOCK_B images × BLOCK_H rows × BLOCK_W columns."""
    rest = box // boxes_w
    return rest // boxes_h * BLOCK_B, rest % boxes_h * BLOCK_H, box % boxes_w * BLOCK_W


@triton.jit
def load_box(
    desc, n, row, column, tap_row, tap_column, channel,
    CHANNELS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BATCH_INNER: tl.constexpr,
):  # fmt: skip
    """What a tap sees of a map from the box of outputs at (n, row, column): zeros outside of the map.

    The map is a descriptor of (N, H, W, C), of (H, N, W, C) with BATCH_INNER, or, with strides, of
    (N, H / SH, SH, W / SW, SW · C), in which every SH-th row and SW-th column is one box again.
    """
    if STRIDE_H * STRIDE_W > 1:
        # row · S + tap − pad in blocks of S rows; pad · S is added, so that the dividend is never negative.
        tap_row += PAD_H * (STRIDE_H - 1)
        tap_column += PAD_W * (STRIDE_W - 1)
        row += tap_row // STRIDE_H - PAD_H
        column += tap_column // STRIDE_W - PAD_W
        box = desc.load([n, row, tap_row % STRIDE_H, column, tap_column % STRIDE_W * CHANNELS + channel])
    elif BATCH_INNER:
        box = desc.load([row + tap_row - PAD_H, n, column + tap_column - PAD_W, channel])
    else:
        box = desc.load([n, row + tap_row - PAD_H, column + tap_column - PAD_W, channel])
    return box


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
