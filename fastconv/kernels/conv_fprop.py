"""Convolution forward: bias, residual, ReLU and 2×2 max-pool in the epilogue of one product.

The product's rows are output channels and its columns pixels, acc[O, pixels] = W · Xᵀ: tensor cores then read both
factors from shared memory, and a pool's window stays in one thread. One loop runs over taps × blocks of input channels.

sm_90 multiplies 64 rows at a time: where a tile has fewer output channels, SWAP = 0 makes the pixels its rows. PACK
narrow groups make one tile, whose weights are zero where the groups differ.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import (
    OUTSIDE,
    flatten,
    inside,
    operand,
    pooled_columns,
    store_map,
    store_pooled,
    unflatten,
)


@triton.jit
def _tile(BLOCK_N: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr):
    """(tile of pixels, pack, its output channels, which of them exist): neighbours in the grid share their pixels."""
    PACK_OUT: tl.constexpr = OUT_CHANNELS // GROUPS * PACK
    BLOCKS_N: tl.constexpr = (PACK_OUT + BLOCK_N - 1) // BLOCK_N
    PACKS: tl.constexpr = (GROUPS + PACK - 1) // PACK
    program = tl.program_id(0)
    pack = program // BLOCKS_N % PACKS
    index = program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    out_channel = pack * PACK_OUT + index
    return program // (BLOCKS_N * PACKS), pack, out_channel, (index < PACK_OUT) & (out_channel < OUT_CHANNELS)


@triton.jit
def _sum_taps(
    x_ptrs, weight_ptrs, x_mask, weight_mask, top, left, height, width, steps,
    CHANNELS: tl.constexpr, GROUP_IN: tl.constexpr, PACK_IN: tl.constexpr, KW: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product over taps × blocks of channels: [BLOCK_N, BLOCK_M], without SWAP [BLOCK_M, BLOCK_N].

    x_mask [1, BLOCK_K] or None and weight_mask [BLOCK_N, 1 or BLOCK_K] hold for every step.
    """
    BLOCKS_K: tl.constexpr = (PACK_IN + BLOCK_K - 1) // BLOCK_K
    channel = tl.arange(0, BLOCK_K)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        tap = step // BLOCKS_K
        first = step % BLOCKS_K * BLOCK_K
        row = tap // KW * DILATION_H
        column = tap % KW * DILATION_W
        is_x = (inside(top + row, height) & inside(left + column, width))[:, None]
        is_weight = weight_mask
        if x_mask is not None:
            is_x = is_x & x_mask
        elif PACK_IN % BLOCK_K != 0:
            is_x = is_x & (first + channel < PACK_IN)[None, :]
            is_weight = is_weight & (first + channel < PACK_IN)[None, :]
        x_offset = tl.cast(row * width + column, tl.int64) * CHANNELS + first
        x = tl.load(x_ptrs + x_offset, mask=is_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs + (tap * GROUP_IN + first), mask=is_weight, other=0.0)  # [BLOCK_N, BLOCK_K]
        if SWAP:
            acc = tl.dot(operand(weight), tl.trans(operand(x)), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(operand(x), tl.trans(operand(weight)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _products(
    x_ptr, weight_ptr, n, out_row, out_column, is_pixel, pack, out_channel, is_channel, height, width, steps,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PACK: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The convolution's sums of one tile, float32 [BLOCK_N, BLOCK_M]."""
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    PACK_IN: tl.constexpr = PACK * GROUP_IN
    channel = tl.arange(0, BLOCK_K)
    top = out_row * STRIDE_H - PAD_H
    left = out_column * STRIDE_W - PAD_W
    x_ptrs = x_ptr + flatten(n, top, left, height, width)[:, None] * CHANNELS + (pack * PACK_IN + channel)[None, :]
    weight_row = out_channel.to(tl.int64)[:, None] * (KH * KW * GROUP_IN)
    top = tl.where(is_pixel, top, OUTSIDE)
    if PACK == 1:
        acc = _sum_taps(
            x_ptrs, weight_ptr + weight_row + channel[None, :], None, is_channel[:, None], top, left, height, width,
            steps, CHANNELS, GROUP_IN, PACK_IN, KW, DILATION_H, DILATION_W,
            BLOCK_N, BLOCK_M, BLOCK_K, SWAP, NUM_STAGES, PRECISION,
        )  # fmt: skip
    else:
        tl.static_assert(PACK_IN <= BLOCK_K and PACK * GROUP_OUT <= BLOCK_N)
        group = pack * PACK + channel // GROUP_IN
        out_group = out_channel // GROUP_OUT
        is_in_channel = (channel < PACK_IN) & (pack * PACK_IN + channel < CHANNELS)
        weight_ptrs = weight_ptr + weight_row + (channel % GROUP_IN)[None, :]
        weight_mask = is_channel[:, None] & (out_group[:, None] == group[None, :]) & is_in_channel[None, :]
        acc = _sum_taps(
            x_ptrs, weight_ptrs, is_in_channel[None, :], weight_mask, top, left, height, width,
            steps, CHANNELS, GROUP_IN, PACK_IN, KW, DILATION_H, DILATION_W,
            BLOCK_N, BLOCK_M, BLOCK_K, SWAP, NUM_STAGES, PRECISION,
        )  # fmt: skip
        # 0 times a NaN or an infinity of another group is NaN: such a tile is computed again, group by group.
        if tl.max((acc != acc).to(tl.int32), axis=None) > 0:
            for member in range(PACK):
                is_member = (channel // GROUP_IN == member) & is_in_channel
                exact = _sum_taps(
                    x_ptrs, weight_ptrs, is_member[None, :], weight_mask, top, left, height, width,
                    steps, CHANNELS, GROUP_IN, PACK_IN, KW, DILATION_H, DILATION_W,
                    BLOCK_N, BLOCK_M, BLOCK_K, SWAP, 1, PRECISION,
                )  # fmt: skip
                is_row = out_group == pack * PACK + member
                acc = tl.where(is_row[:, None] if SWAP else is_row[None, :], exact, acc)
    if not SWAP:
        acc = tl.trans(acc)
    return acc


# A trip count known to the compiler would unroll the loop; maps and batches of every size share one binary.
@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels", "steps"])
def conv_fprop_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    height, width, out_height, out_width, pixels, steps,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, RELU: tl.constexpr, PACK: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = conv2d(x, weight) + bias + residual, then ReLU; `bias_ptr` and `residual_ptr` may be None.

    Grid: tiles of BLOCK_M output pixels × packs of groups × tiles of BLOCK_N output channels.
    """
    tile, pack, out_channel, is_channel = _tile(BLOCK_N, OUT_CHANNELS, GROUPS, PACK)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pixel = pixel < pixels
    n, out_row, out_column = unflatten(pixel, out_height, out_width)
    acc = _products(
        x_ptr, weight_ptr, n, out_row, out_column, is_pixel, pack, out_channel, is_channel, height, width, steps,
        CHANNELS, OUT_CHANNELS, GROUPS, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, PACK, SWAP,
        BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION,
    )  # fmt: skip
    store_map(acc, bias_ptr, residual_ptr, y_ptr, pixel, is_pixel, out_channel, is_channel, OUT_CHANNELS, RELU)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pooled_pixels", "steps"])
def conv_fprop_pool_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, code_ptr,
    height, width, out_height, out_width, pooled_pixels, steps,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PACK: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = max_pool2d(relu(conv2d(x, weight) + bias), 2) and the winners' codes; the unpooled map is never written.

    Grid: tiles of BLOCK_M / 4 pooled pixels × packs of groups × tiles of BLOCK_N output channels.
    """
    POOLED: tl.constexpr = BLOCK_M // 4
    tile, pack, out_channel, is_channel = _tile(BLOCK_N, OUT_CHANNELS, GROUPS, PACK)
    pooled, window_row, window_column = pooled_columns(tile * POOLED, BLOCK_M)
    n, row, column = unflatten(pooled, out_height // 2, out_width // 2)
    acc = _products(
        x_ptr, weight_ptr, n, 2 * row + window_row, 2 * column + window_column, pooled < pooled_pixels,
        pack, out_channel, is_channel, height, width, steps,
        CHANNELS, OUT_CHANNELS, GROUPS, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, PACK, SWAP,
        BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION,
    )  # fmt: skip
    store_pooled(
        acc, bias_ptr, y_ptr, code_ptr, tile * POOLED, pooled_pixels, out_channel, is_channel,
        OUT_CHANNELS, BLOCK_N, BLOCK_M,
    )  # fmt: skip
