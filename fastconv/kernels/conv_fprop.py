"""Convolution forward: bias, residual, ReLU and 2×2 max-pool in the epilogue of one product.

The product's rows are output channels and its columns pixels, acc[O, pixels] = W · Xᵀ: tensor cores then read both
factors from shared memory, and a pool's window stays in one thread. One loop runs over taps × blocks of input channels.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import OUTSIDE, cast, flatten, inside, is_update, operand, pooled_columns, relu, unflatten


@triton.jit
def _tile(BLOCK_N: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """(tile of pixels, group, its output channels, which of them exist): neighbours in the grid share their pixels."""
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    BLOCKS_N: tl.constexpr = (GROUP_OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // BLOCKS_N % GROUPS
    index = program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    return program // (BLOCKS_N * GROUPS), group, group * GROUP_OUT + index, index < GROUP_OUT


@triton.jit
def _products(
    x_ptr, weight_ptr, n, out_row, out_column, is_pixel, group, out_channel, is_channel, height, width, steps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The convolution's sums of one tile, float32 [BLOCK_N, BLOCK_M]."""
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    BLOCKS_K: tl.constexpr = (GROUP_IN + BLOCK_K - 1) // BLOCK_K
    channel = tl.arange(0, BLOCK_K)
    top = out_row * STRIDE_H - PAD_H
    left = out_column * STRIDE_W - PAD_W
    x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + (group * GROUP_IN + channel)[None, :]
    weight_ptrs = weight_ptr + out_channel.to(tl.int64)[:, None] * (KH * KW * GROUP_IN) + channel[None, :]
    top = tl.where(is_pixel, top, OUTSIDE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        tap = step // BLOCKS_K
        first = step % BLOCKS_K * BLOCK_K
        row = tap // KW * DILATION_H
        column = tap % KW * DILATION_W
        x_mask = (inside(top + row, height) & inside(left + column, width))[:, None]
        weight_mask = is_channel[:, None]
        if GROUP_IN % BLOCK_K != 0:
            x_mask = x_mask & (first + channel < GROUP_IN)[None, :]
            weight_mask = weight_mask & (first + channel < GROUP_IN)[None, :]
        x_offset = tl.cast(row * width + column, tl.int64) * CHANNELS + first
        x = tl.load(x_ptrs + x_offset, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs + (tap * GROUP_IN + first), mask=weight_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(operand(weight), tl.trans(operand(x)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def conv_fprop_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    height, width, out_height, out_width, pixels, steps,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = conv2d(x, weight) + bias + residual, then ReLU; `bias_ptr` and `residual_ptr` may be None.

    Grid: tiles of BLOCK_M output pixels × groups × tiles of BLOCK_N output channels.
    """
    tile, group, out_channel, is_channel = _tile(BLOCK_N, OUT_CHANNELS, GROUPS)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pixel = pixel < pixels
    n, out_row, out_column = unflatten(pixel, out_height, out_width)
    acc = _products(
        x_ptr, weight_ptr, n, out_row, out_column, is_pixel, group, out_channel, is_channel, height, width, steps,
        CHANNELS, GROUPS, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out_channel, mask=is_channel, other=0.0).to(tl.float32)[:, None]
    y_offset = pixel.to(tl.int64)[:, None] * OUT_CHANNELS + out_channel[None, :]  # [BLOCK_M, BLOCK_N]
    y_mask = is_pixel[:, None] & is_channel[None, :]
    if residual_ptr is not None:
        acc += tl.trans(tl.load(residual_ptr + y_offset, mask=y_mask, other=0.0)).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + y_offset, tl.trans(cast(acc, y_ptr.dtype.element_ty)), mask=y_mask)


@triton.jit
def conv_fprop_pool_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, code_ptr,
    height, width, out_height, out_width, pooled_pixels, steps,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = max_pool2d(relu(conv2d(x, weight) + bias), 2) and the winners' codes; the unpooled map is never written.

    Grid: tiles of BLOCK_M / 4 pooled pixels × groups × tiles of BLOCK_N output channels.
    """
    POOLED: tl.constexpr = BLOCK_M // 4
    tile, group, out_channel, is_channel = _tile(BLOCK_N, OUT_CHANNELS, GROUPS)
    pooled, window_row, window_column = pooled_columns(tile * POOLED, BLOCK_M)
    n, row, column = unflatten(pooled, out_height // 2, out_width // 2)
    acc = _products(
        x_ptr, weight_ptr, n, 2 * row + window_row, 2 * column + window_column, pooled < pooled_pixels,
        group, out_channel, is_channel, height, width, steps,
        CHANNELS, GROUPS, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION,
    )  # fmt: skip
    # Bias and ReLU are monotone: they come after the maximum, on a quarter of the values.
    left, right = tl.split(tl.reshape(acc, (BLOCK_N, BLOCK_M // 16, 2, 4, 2)))
    is_right = is_update(right, left)  # [BLOCK_N, BLOCK_M / 16, 2 rows, 4]
    upper, lower = tl.split(tl.permute(tl.where(is_right, right, left), (0, 1, 3, 2)))
    upper_code, lower_code = tl.split(tl.permute(is_right.to(tl.int32), (0, 1, 3, 2)))
    is_lower = is_update(lower, upper)
    best = tl.reshape(tl.where(is_lower, lower, upper), (BLOCK_N, POOLED))
    code = tl.reshape(tl.where(is_lower, lower_code + 3, upper_code + 1), (BLOCK_N, POOLED))
    if bias_ptr is not None:
        best += tl.load(bias_ptr + out_channel, mask=is_channel, other=0.0).to(tl.float32)[:, None]
    code = tl.where(best <= 0.0, 0, code)
    y = tl.trans(cast(relu(best), y_ptr.dtype.element_ty))  # [POOLED, BLOCK_N]
    pixel = tile * POOLED + tl.arange(0, POOLED)
    y_offset = pixel.to(tl.int64)[:, None] * OUT_CHANNELS + out_channel[None, :]
    y_mask = (pixel < pooled_pixels)[:, None] & is_channel[None, :]
    tl.store(y_ptr + y_offset, y, mask=y_mask)
    tl.store(code_ptr + y_offset, tl.trans(code.to(tl.uint8)), mask=y_mask)
