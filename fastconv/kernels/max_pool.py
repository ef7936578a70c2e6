"""Max-pooling of any window, NaN-exact, and its gradient as a gather by the winners' codes."""

import triton
import triton.language as tl

from fastconv.kernels.coords import cast, first_tap, flatten, inside, is_update, relu, unflatten


@triton.jit
def max_pool_kernel(
    x_ptr, y_ptr, code_ptr,
    height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = max_pool2d(relu(x) if RELU else x) and the winners' codes: 1 + row · KW + column, or 0 where ReLU closed.

    Grid: (tiles of BLOCK_M output pixels, tiles of BLOCK_C channels).
    """
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, out_row, out_column = unflatten(pixel, out_height, out_width)
    is_pixel = pixel < pixels
    is_channel = channel < CHANNELS
    top = out_row * STRIDE_H - PAD_H
    left = out_column * STRIDE_W - PAD_W
    x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + channel[None, :]
    # Where every value is −inf the first element inside the map wins.
    first_row = (tl.maximum(-top, 0) + DILATION_H - 1) // DILATION_H
    first_column = (tl.maximum(-left, 0) + DILATION_W - 1) // DILATION_W
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    # Dilation can step over a small map: such a window has no pixel and no winner.
    has_pixel = inside(top + first_row * DILATION_H, height) & inside(left + first_column * DILATION_W, width)
    first = tl.where(has_pixel, 1 + first_row * KW + first_column, 0)
    code = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32) + first[:, None]
    for position in range(KH * KW):
        row = position // KW * DILATION_H
        column = position % KW * DILATION_W
        is_valid = is_pixel & inside(top + row, height) & inside(left + column, width)
        x_offset = tl.cast(row * width + column, tl.int64) * CHANNELS
        x_mask = is_valid[:, None] & is_channel[None, :]
        x = tl.load(x_ptrs + x_offset, mask=x_mask, other=float("-inf")).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        is_winner = is_update(x, best)
        best = tl.where(is_winner, x, best)
        code = tl.where(is_winner, position + 1, code)
    if RELU:
        code = tl.where(best <= 0.0, 0, code)
        best = relu(best)
    y_offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    y_mask = is_pixel[:, None] & is_channel[None, :]
    tl.store(y_ptr + y_offset, cast(best, y_ptr.dtype.element_ty), mask=y_mask)
    tl.store(code_ptr + y_offset, code.to(code_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def max_pool_backward_kernel(
    grad_ptr, code_ptr, grad_x_ptr,
    height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x: every input element adds up, in order, the gradients of the windows that it won.

    Grid: (tiles of BLOCK_M input pixels, tiles of BLOCK_C channels).
    """
    TAP_STEP_H: tl.constexpr = STRIDE_H // GCD_H
    TAP_STEP_W: tl.constexpr = STRIDE_W // GCD_W
    WINDOWS_H: tl.constexpr = (KH + TAP_STEP_H - 1) // TAP_STEP_H
    WINDOWS_W: tl.constexpr = (KW + TAP_STEP_W - 1) // TAP_STEP_W
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, row, column = unflatten(pixel, height, width)
    is_pixel = pixel < pixels
    is_channel = channel < CHANNELS
    row += PAD_H
    column += PAD_W
    first_h = first_tap(row % STRIDE_H, KH, STRIDE_H, GCD_H, INVERSE_H)
    first_w = first_tap(column % STRIDE_W, KW, STRIDE_W, GCD_W, INVERSE_W)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for window in range(WINDOWS_H * WINDOWS_W):
        tap_h = first_h + window // WINDOWS_W * TAP_STEP_H
        tap_w = first_w + window % WINDOWS_W * TAP_STEP_W
        out_row = (row - tap_h * DILATION_H) // STRIDE_H
        out_column = (column - tap_w * DILATION_W) // STRIDE_W
        is_window = is_pixel & (tap_h < KH) & (tap_w < KW) & inside(out_row, out_height) & inside(out_column, out_width)
        offset = flatten(n, out_row, out_column, out_height, out_width)[:, None] * CHANNELS + channel[None, :]
        mask = is_window[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        code = tl.load(code_ptr + offset, mask=mask, other=0).to(tl.int32)
        acc += tl.where(code == (tap_h * KW + tap_w + 1)[:, None], grad, 0.0)
    grad_x_ptrs = grad_x_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(grad_x_ptrs, cast(acc, grad_x_ptr.dtype.element_ty), mask=is_pixel[:, None] & is_channel[None, :])
