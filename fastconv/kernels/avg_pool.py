"""Average-pooling of any window and its gradient, with torch's three divisors."""

import triton
import triton.language as tl

from fastconv.kernels.coords import cast, flatten, inside, unflatten


@triton.jit
def _divisor(
    top, left, height, width,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """What the sum of the window at (top, left) is divided by, float32.

    Padding counts only as far as `height + PAD_H`: ceil_mode's last windows may reach beyond it.
    """
    if DIVISOR is not None:
        size = tl.zeros_like(top) + DIVISOR
    elif COUNT_INCLUDE_PAD:
        size = (tl.minimum(top + KH, height + PAD_H) - top) * (tl.minimum(left + KW, width + PAD_W) - left)
    else:
        rows = tl.minimum(top + KH, height) - tl.maximum(top, 0)
        size = rows * (tl.minimum(left + KW, width) - tl.maximum(left, 0))
    return size.to(tl.float32)


@triton.jit
def avg_pool_kernel(
    x_ptr, y_ptr,
    height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = avg_pool2d(x). Grid: (tiles of BLOCK_M output pixels, tiles of BLOCK_C channels)."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, out_row, out_column = unflatten(pixel, out_height, out_width)
    is_pixel = pixel < pixels
    is_channel = channel < CHANNELS
    top = out_row * STRIDE_H - PAD_H
    left = out_column * STRIDE_W - PAD_W
    x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + channel[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for position in range(KH * KW):
        row = position // KW
        column = position % KW
        is_valid = is_pixel & inside(top + row, height) & inside(left + column, width)
        x_offset = tl.cast(row * width + column, tl.int64) * CHANNELS
        x_mask = is_valid[:, None] & is_channel[None, :]
        acc += tl.load(x_ptrs + x_offset, mask=x_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    # A window of padding alone sums to 0, and must not be divided by its count of none.
    divisor = _divisor(top, left, height, width, KH, KW, PAD_H, PAD_W, COUNT_INCLUDE_PAD, DIVISOR)
    y = acc / tl.where(divisor == 0.0, 1.0, divisor)[:, None]
    y_ptrs = y_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=is_pixel[:, None] & is_channel[None, :])


@triton.jit
def avg_pool_backward_kernel(
    grad_ptr, grad_x_ptr,
    height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x: every input element adds up, in order, its share of the windows that it lies in.

    Grid: (tiles of BLOCK_M input pixels, tiles of BLOCK_C channels).
    """
    WINDOWS_H: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    WINDOWS_W: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, row, column = unflatten(pixel, height, width)
    is_pixel = pixel < pixels
    is_channel = channel < CHANNELS
    row += PAD_H
    column += PAD_W
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for window in range(WINDOWS_H * WINDOWS_W):
        out_row = row // STRIDE_H - window // WINDOWS_W
        out_column = column // STRIDE_W - window % WINDOWS_W
        top = out_row * STRIDE_H
        left = out_column * STRIDE_W
        is_window = inside(out_row, out_height) & inside(out_column, out_width)
        is_window = is_window & (row - top < KH) & (column - left < KW) & is_pixel
        offset = flatten(n, out_row, out_column, out_height, out_width)[:, None] * CHANNELS + channel[None, :]
        mask = is_window[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        divisor = _divisor(top - PAD_H, left - PAD_W, height, width, KH, KW, PAD_H, PAD_W, COUNT_INCLUDE_PAD, DIVISOR)
        acc += grad / tl.where(is_window, divisor, 1.0)[:, None]
    grad_x_ptrs = grad_x_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(grad_x_ptrs, cast(acc, grad_x_ptr.dtype.element_ty), mask=is_pixel[:, None] & is_channel[None, :])
