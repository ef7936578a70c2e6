"""Depthwise convolution (one channel a group, as many out as in): passes over maps, bound by memory, not products.

Weights lie [KH · KW, C], so that a tap's are one vector as a pixel's channels are. Tiles are [BLOCK_M pixels, BLOCK_C
channels], and sums float32.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import OUTSIDE, advance, flatten, inside, phase_of_taps, store_map, unflatten


@triton.jit
def _channels(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, channel < CHANNELS


# Maps and batches of every size share one binary.
@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels"])
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, FLIP: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = conv2d(x, weight) + bias + residual, then ReLU; with FLIP the window is turned by 180°.

    Grid: (tiles of BLOCK_M output pixels, tiles of BLOCK_C channels).
    """
    channel, is_channel = _channels(CHANNELS, BLOCK_C)
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pixel = pixel < pixels
    n, out_row, out_column = unflatten(pixel, out_height, out_width)
    top = out_row * STRIDE_H - PAD_H
    left = out_column * STRIDE_W - PAD_W
    x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + channel[None, :]
    top = tl.where(is_pixel, top, OUTSIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tap_row in range(KH):
        row = tap_row * DILATION_H
        is_row = inside(top + row, height)
        for tap_column in tl.static_range(KW):
            x_mask = (is_row & inside(left + tap_column * DILATION_W, width))[:, None] & is_channel[None, :]
            x_offset = tl.cast(row * width + tap_column * DILATION_W, tl.int64) * CHANNELS
            x = tl.load(x_ptrs + x_offset, mask=x_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            tap = tap_row * KW + tap_column
            if FLIP:
                tap = KH * KW - 1 - tap
            weight = tl.load(weight_ptr + tap * CHANNELS + channel, mask=is_channel, other=0.0).to(tl.float32)
            acc += x * weight[None, :]
    store_map(tl.trans(acc), bias_ptr, residual_ptr, y_ptr, pixel, is_pixel, channel, is_channel, CHANNELS, RELU)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "tiles_h", "tiles_w"])
def depthwise_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    height, width, out_height, out_width, tiles_h, tiles_w,
    CHANNELS: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, FLIP: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """depthwise_kernel for 3×3 windows of stride 1, four rows of outputs a program: 4.5 loads an output instead of 9.

    Grid: (images × tiles_h runs of four rows × tiles_w runs of BLOCK_M columns, tiles of BLOCK_C channels).
    """
    channel, is_channel = _channels(CHANNELS, BLOCK_C)
    tile = tl.program_id(0)
    out_column = tile % tiles_w * BLOCK_M + tl.arange(0, BLOCK_M)
    first_row = tile // tiles_w % tiles_h * 4
    n = tile // tiles_w // tiles_h
    top = first_row - PAD_H
    left = out_column - PAD_W
    x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + channel[None, :]
    acc_0 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_3 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    # A column of the window lies a row of taps apart; with FLIP it is read from the last tap back.
    TAPS_APART: tl.constexpr = -3 * CHANNELS if FLIP else 3 * CHANNELS
    for column in tl.static_range(3):
        weight_ptrs = weight_ptr + (8 - column if FLIP else column) * CHANNELS + channel
        weight_0 = tl.load(weight_ptrs, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        weight_1 = tl.load(weight_ptrs + TAPS_APART, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        weight_2 = tl.load(weight_ptrs + 2 * TAPS_APART, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        for row in tl.static_range(6):
            row_width = tl.where(inside(top + row, height), width, 0)
            x_mask = inside(left + column, row_width)[:, None] & is_channel[None, :]
            x_offset = tl.cast(row * width + column, tl.int64) * CHANNELS
            x = tl.load(x_ptrs + x_offset, mask=x_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            if row <= 2:
                acc_0 += x * (weight_0 if row == 0 else (weight_1 if row == 1 else weight_2))
            if row >= 1 and row <= 3:
                acc_1 += x * (weight_0 if row == 1 else (weight_1 if row == 2 else weight_2))
            if row >= 2 and row <= 4:
                acc_2 += x * (weight_0 if row == 2 else (weight_1 if row == 3 else weight_2))
            if row >= 3:
                acc_3 += x * (weight_0 if row == 3 else (weight_1 if row == 4 else weight_2))
    pixel = (n * out_height + first_row) * out_width + out_column
    for row in tl.static_range(4):
        acc = acc_0 if row == 0 else (acc_1 if row == 1 else (acc_2 if row == 2 else acc_3))
        is_pixel = out_column < tl.where(first_row + row < out_height, out_width, 0)
        store_map(
            tl.trans(acc), bias_ptr, residual_ptr, y_ptr, pixel + row * out_width, is_pixel, channel, is_channel,
            CHANNELS, RELU,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "phase_height", "phase_width", "phase_pixels", "phase_tiles",
    ]
)  # fmt: skip
def depthwise_dgrad_kernel(
    grad_ptr, weight_ptr, grad_x_ptr,
    height, width, out_height, out_width, phase_height, phase_width, phase_pixels, phase_tiles,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x, for strides: a program's pixels are of one phase, and read no more than that phase's taps.

    Grid: (STRIDE_H · STRIDE_W phases × phase_tiles of BLOCK_M input pixels, tiles of BLOCK_C channels).
    """
    channel, is_channel = _channels(CHANNELS, BLOCK_C)
    pixel = tl.program_id(0) % phase_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n, row, column, first_h, first_w, taps_h, taps_w, out_row, out_column = phase_of_taps(
        pixel, tl.program_id(0) // phase_tiles, phase_height, phase_width, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
        DILATION_H, DILATION_W, GCD_H, GCD_W, INVERSE_H, INVERSE_W,
    )  # fmt: skip
    is_pixel = (pixel < phase_pixels) & (row < height) & (column < width)
    out_pixel = flatten(n, out_row, out_column, out_height, out_width)
    grad_ptrs = grad_ptr + out_pixel[:, None] * CHANNELS + channel[None, :]
    out_row = tl.where(is_pixel, out_row, OUTSIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tap in range(taps_h * taps_w):
        up = tap // taps_w * (DILATION_H // GCD_H)
        back = tap % taps_w * (DILATION_W // GCD_W)
        tap_h = first_h + tap // taps_w * (STRIDE_H // GCD_H)
        tap_w = first_w + tap % taps_w * (STRIDE_W // GCD_W)
        is_grad = inside(out_row - up, out_height) & inside(out_column - back, out_width)
        grad_offset = tl.cast(up * out_width + back, tl.int64) * CHANNELS
        grad = tl.load(grad_ptrs - grad_offset, mask=is_grad[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        weight_ptrs = weight_ptr + (tap_h * KW + tap_w) * CHANNELS + channel
        acc += grad * tl.load(weight_ptrs, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    pixel = (n * height + row) * width + column
    store_map(tl.trans(acc), None, None, grad_x_ptr, pixel, is_pixel, channel, is_channel, CHANNELS, False)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels", "split_pixels"])
def depthwise_wgrad_kernel(
    grad_ptr, x_ptr, slab_ptr,
    height, width, out_height, out_width, pixels, split_pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """slab[split, C, taps] of one tap a program. Grid: (splits of split_pixels pixels, tiles of BLOCK_C channels, taps)."""
    channel, is_channel = _channels(CHANNELS, BLOCK_C)
    split = tl.program_id(0)
    tap = tl.program_id(2)
    start = split * split_pixels
    end = start + tl.minimum(split_pixels, pixels - start)
    lane = tl.arange(0, BLOCK_M)
    n, row, column = unflatten(start + lane, out_height, out_width)
    step_n, step_row, step_column = unflatten(BLOCK_M, out_height, out_width)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for position in range(start, end, BLOCK_M):
        pixel = position + lane
        is_pixel = pixel < end
        top = row * STRIDE_H - PAD_H + tap // KW * DILATION_H
        left = column * STRIDE_W - PAD_W + tap % KW * DILATION_W
        is_x = is_pixel & inside(top, height) & inside(left, width)
        grad_ptrs = grad_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + channel[None, :]
        # Where x is padding the gradient is still read: 0 times its NaN is NaN.
        grad_mask = is_pixel[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptrs, mask=grad_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        acc += grad * tl.load(x_ptrs, mask=is_x[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        n, row, column = advance(n, row, column, step_n, step_row, step_column, out_height, out_width)
    slab_ptrs = slab_ptr + (split.to(tl.int64) * CHANNELS + channel) * (KH * KW) + tap
    tl.store(slab_ptrs, tl.sum(acc, axis=0), mask=is_channel)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels", "split_pixels"])
def depthwise_wgrad_3x3_kernel(
    grad_ptr, x_ptr, slab_ptr,
    height, width, out_height, out_width, pixels, split_pixels,
    CHANNELS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """slab[split, C, 9]: every gradient is read once. Grid: (splits of split_pixels pixels, tiles of BLOCK_C channels)."""
    channel, is_channel = _channels(CHANNELS, BLOCK_C)
    split = tl.program_id(0)
    start = split * split_pixels
    end = start + tl.minimum(split_pixels, pixels - start)
    lane = tl.arange(0, BLOCK_M)
    n, row, column = unflatten(start + lane, out_height, out_width)
    step_n, step_row, step_column = unflatten(BLOCK_M, out_height, out_width)
    acc_0 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_1 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_3 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_4 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_5 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_6 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_7 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_8 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for position in range(start, end, BLOCK_M):
        pixel = position + lane
        top = tl.where(pixel < end, row * STRIDE_H - PAD_H, OUTSIDE)
        left = column * STRIDE_W - PAD_W
        grad_ptrs = grad_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        grad_mask = (pixel < end)[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptrs, mask=grad_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        x_pixel = flatten(n, row * STRIDE_H - PAD_H, left, height, width)
        x_ptrs = x_ptr + x_pixel[:, None] * CHANNELS + channel[None, :]
        for tap in tl.static_range(9):
            tap_row = tap // 3 * DILATION_H
            tap_column = tap % 3 * DILATION_W
            x_mask = (inside(top + tap_row, height) & inside(left + tap_column, width))[:, None] & is_channel[None, :]
            x_offset = tl.cast(tap_row * width + tap_column, tl.int64) * CHANNELS
            product = grad * tl.load(x_ptrs + x_offset, mask=x_mask, other=0.0).to(tl.float32)
            if tap == 0:
                acc_0 += product
            if tap == 1:
                acc_1 += product
            if tap == 2:
                acc_2 += product
            if tap == 3:
                acc_3 += product
            if tap == 4:
                acc_4 += product
            if tap == 5:
                acc_5 += product
            if tap == 6:
                acc_6 += product
            if tap == 7:
                acc_7 += product
            if tap == 8:
                acc_8 += product
        n, row, column = advance(n, row, column, step_n, step_row, step_column, out_height, out_width)
    slab_ptrs = slab_ptr + (split.to(tl.int64) * CHANNELS + channel) * 9
    tl.store(slab_ptrs, tl.sum(acc_0, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 1, tl.sum(acc_1, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 2, tl.sum(acc_2, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 3, tl.sum(acc_3, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 4, tl.sum(acc_4, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 5, tl.sum(acc_5, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 6, tl.sum(acc_6, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 7, tl.sum(acc_7, axis=0), mask=is_channel)
    tl.store(slab_ptrs + 8, tl.sum(acc_8, axis=0), mask=is_channel)
