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
def advance(n, row, column, step_n, step_row, step_column, height, width):
    """(n, row, column) one step further. All are digits, and carrying them costs less than a division would."""
    column += step_column
    carry = (column >= width).to(tl.int32)
    column -= carry * width
    row += step_row + carry
    carry = (row >= height).to(tl.int32)
    row -= carry * height
    return n + step_n + carry, row, column


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
def max_2x2(acc, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(maximum, code of the winner) of the 2×2 windows of acc[BLOCK_N, ROWS · COLUMNS], both [BLOCK_N, windows]."""
    left, right = tl.split(tl.reshape(acc, (BLOCK_N, ROWS // 2, 2, COLUMNS // 2, 2)))
    is_right = is_update(right, left)  # [BLOCK_N, ROWS / 2, 2, COLUMNS / 2]
    upper, lower = tl.split(tl.permute(tl.where(is_right, right, left), (0, 1, 3, 2)))
    upper_code, lower_code = tl.split(tl.permute(is_right.to(tl.int32), (0, 1, 3, 2)))
    is_lower = is_update(lower, upper)
    best = tl.where(is_lower, lower, upper)
    code = tl.where(is_lower, lower_code + 3, upper_code + 1)
    return tl.reshape(best, (BLOCK_N, ROWS * COLUMNS // 4)), tl.reshape(code, (BLOCK_N, ROWS * COLUMNS // 4))


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
def phase_of_taps(
    pixel, phase, phase_height, phase_width,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GCD_H: tl.constexpr, GCD_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
):  # fmt: skip
    """Input pixels by number within a phase, which is a residue of row + padding, column + padding modulo the strides.

    Returns:
        n, row, column: the input pixels; the last of a phase may lie outside of the map.
        first_h, first_w, taps_h, taps_w: the phase's taps, STRIDE / GCD apart.
        out_row, out_column: the outputs which the first tap leads to; each further tap leads DILATION / GCD back.
    """
    TAP_STEP_H: tl.constexpr = STRIDE_H // GCD_H
    TAP_STEP_W: tl.constexpr = STRIDE_W // GCD_W
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    n, row, column = unflatten(pixel, phase_height, phase_width)
    row = row * STRIDE_H + (phase_h + STRIDE_H * PAD_H - PAD_H) % STRIDE_H
    column = column * STRIDE_W + (phase_w + STRIDE_W * PAD_W - PAD_W) % STRIDE_W
    first_h = first_tap(phase_h, KH, STRIDE_H, GCD_H, INVERSE_H)
    first_w = first_tap(phase_w, KW, STRIDE_W, GCD_W, INVERSE_W)
    taps_h = (KH - first_h + TAP_STEP_H - 1) // TAP_STEP_H
    taps_w = (KW - first_w + TAP_STEP_W - 1) // TAP_STEP_W
    out_row = (row + PAD_H - first_h * DILATION_H) // STRIDE_H
    out_column = (column + PAD_W - first_w * DILATION_W) // STRIDE_W
    return n, row, column, first_h, first_w, taps_h, taps_w, out_row, out_column


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


@triton.jit
def store_map(
    acc, bias_ptr, residual_ptr, y_ptr, pixel, is_pixel, channel, is_channel,
    CHANNELS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y = acc[channels, pixels] + bias + residual, then ReLU; `bias_ptr` and `residual_ptr` may be None."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[:, None]
    y_offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]  # [pixels, channels]
    y_mask = is_pixel[:, None] & is_channel[None, :]
    if residual_ptr is not None:
        acc += tl.trans(tl.load(residual_ptr + y_offset, mask=y_mask, other=0.0)).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + y_offset, tl.trans(cast(acc, y_ptr.dtype.element_ty)), mask=y_mask)


@triton.jit
def store_pooled(
    acc, bias_ptr, y_ptr, code_ptr, first, pooled_pixels, channel, is_channel,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y = max_pool2d(relu(acc + bias), 2) and the winners' codes, of acc[BLOCK_N channels, BLOCK_M pooled_columns].

    Bias and ReLU are monotone: they come after the maximum, on a quarter of the values.
    """
    best, code = max_2x2(acc, BLOCK_N, BLOCK_M // 8, 8)  # [BLOCK_N, BLOCK_M / 4]
    if bias_ptr is not None:
        best += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[:, None]
    code = tl.where(best <= 0.0, 0, code)
    pixel = first + tl.arange(0, BLOCK_M // 4)
    y_offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    y_mask = (pixel < pooled_pixels)[:, None] & is_channel[None, :]
    tl.store(y_ptr + y_offset, tl.trans(cast(relu(best), y_ptr.dtype.element_ty)), mask=y_mask)
    tl.store(code_ptr + y_offset, tl.trans(code.to(tl.uint8)), mask=y_mask)
