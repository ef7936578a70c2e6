"""Convolutions of few input channels, first layers above all: a tap's channels would fill too little of a load.

`pack_first_kernel` copies x into [N, HP, WP, CP]: zeros around the map, and CP channels, a power of two of at least 16
bytes. What a row of taps reads is then one run of KW · CP elements, aligned and without a mask; so the product's inner
dimension runs over rows of taps × blocks of such a run, of which only the last one's tail is masked.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import (
    advance,
    cast,
    flatten,
    inside,
    operand,
    pooled_columns,
    store_map,
    store_pooled,
    unflatten,
)


@triton.jit
def _pack_x(
    x_ptr, padded_ptr, tile, height, width, padded_height, padded_width, pixels,
    CHANNELS: tl.constexpr, PADDED_CHANNELS: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, PADDED_CHANNELS)
    n, row, column = unflatten(pixel, padded_height, padded_width)
    row -= PAD_H
    column -= PAD_W
    x_ptrs = x_ptr + flatten(n, row, column, height, width)[:, None] * CHANNELS + channel[None, :]
    is_x = (pixel < pixels) & inside(row, height) & inside(column, width)
    x = tl.load(x_ptrs, mask=is_x[:, None] & (channel < CHANNELS)[None, :], other=0.0)  # [BLOCK_M, PADDED_CHANNELS]
    padded_ptrs = padded_ptr + pixel.to(tl.int64)[:, None] * PADDED_CHANNELS + channel[None, :]
    tl.store(padded_ptrs, x, mask=(pixel < pixels)[:, None])


@triton.jit
def _pack_weight(
    weight_ptr, packed_ptr, tile,
    CHANNELS: tl.constexpr, PADDED_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS_K: tl.constexpr = (KW * PADDED_CHANNELS + BLOCK_K - 1) // BLOCK_K
    index = tile * BLOCK + tl.arange(0, BLOCK)
    step = index // (OUT_CHANNELS * BLOCK_K)
    out_channel = index // BLOCK_K % OUT_CHANNELS
    k = step % BLOCKS_K * BLOCK_K + index % BLOCK_K
    channel = k % PADDED_CHANNELS
    tap = step // BLOCKS_K * KW + k // PADDED_CHANNELS
    weight_ptrs = weight_ptr + (out_channel * (KH * KW) + tap) * CHANNELS + channel
    is_packed = step < KH * BLOCKS_K
    is_weight = is_packed & (k < KW * PADDED_CHANNELS) & (channel < CHANNELS)
    tl.store(packed_ptr + index, tl.load(weight_ptrs, mask=is_weight, other=0.0), mask=is_packed)


@triton.jit(do_not_specialize=["height", "width", "padded_height", "padded_width", "pixels", "x_tiles"])
def pack_first_kernel(
    x_ptr, weight_ptr, padded_ptr, packed_ptr,
    height, width, padded_height, padded_width, pixels, x_tiles,
    CHANNELS: tl.constexpr, PADDED_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """padded[N, HP, WP, CP] of x and, unless they are None, packed[KH · blocks, O, BLOCK_K] of the weight.

    Both are filled up with zeros. Grid: x_tiles of BLOCK_M padded pixels, then tiles of as many elements of `packed`.
    """
    tile = tl.program_id(0)
    if packed_ptr is None:
        _pack_x(
            x_ptr, padded_ptr, tile, height, width, padded_height, padded_width, pixels,
            CHANNELS, PADDED_CHANNELS, PAD_H, PAD_W, BLOCK_M,
        )  # fmt: skip
    elif tile < x_tiles:
        _pack_x(
            x_ptr, padded_ptr, tile, height, width, padded_height, padded_width, pixels,
            CHANNELS, PADDED_CHANNELS, PAD_H, PAD_W, BLOCK_M,
        )  # fmt: skip
    else:
        _pack_weight(
            weight_ptr, packed_ptr, tile - x_tiles,
            CHANNELS, PADDED_CHANNELS, OUT_CHANNELS, KH, KW, BLOCK_K, BLOCK_M * PADDED_CHANNELS,
        )  # fmt: skip


@triton.jit
def _tile(BLOCK_N: tl.constexpr, OUT_CHANNELS: tl.constexpr):
    """(tile of pixels, output channels): neighbours in the grid share their pixels."""
    BLOCKS_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    return program // BLOCKS_N, program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _products(
    padded_ptr, packed_ptr, n, out_row, out_column, is_pixel, out_channel, padded_height, padded_width, steps,
    PADDED_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The convolution's sums of one tile, float32 [BLOCK_N, BLOCK_M]."""
    RUN: tl.constexpr = KW * PADDED_CHANNELS
    BLOCKS_K: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    pixel = flatten(n, out_row * STRIDE_H, out_column * STRIDE_W, padded_height, padded_width)
    padded_ptrs = padded_ptr + pixel[:, None] * PADDED_CHANNELS + k[None, :]
    packed_ptrs = packed_ptr + out_channel[:, None] * BLOCK_K + k[None, :]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        first = step % BLOCKS_K * BLOCK_K
        x_mask = is_pixel[:, None]
        if RUN % BLOCK_K != 0:
            # Beyond the run lies a neighbour, whose NaN a weight of zero would not stop.
            x_mask = x_mask & (first + k < RUN)[None, :]
        x_offset = tl.cast(step // BLOCKS_K * DILATION_H * padded_width, tl.int64) * PADDED_CHANNELS + first
        weight_offset = step * (OUT_CHANNELS * BLOCK_K)
        x = tl.load(padded_ptrs + x_offset, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight_mask = (out_channel < OUT_CHANNELS)[:, None]
        weight = tl.load(packed_ptrs + weight_offset, mask=weight_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        if SWAP:
            acc = tl.dot(operand(weight), tl.trans(operand(x)), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(operand(x), tl.trans(operand(weight)), acc, input_precision=PRECISION)
    if not SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit(do_not_specialize=["padded_height", "padded_width", "out_height", "out_width", "pixels", "steps"])
def conv_first_kernel(
    padded_ptr, packed_ptr, bias_ptr, residual_ptr, y_ptr,
    padded_height, padded_width, out_height, out_width, pixels, steps,
    PADDED_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, RELU: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = conv2d(x, weight) + bias + residual, then ReLU; `bias_ptr` and `residual_ptr` may be None.

    Grid: tiles of BLOCK_M output pixels × tiles of BLOCK_N output channels.
    """
    tile, out_channel = _tile(BLOCK_N, OUT_CHANNELS)
    is_channel = out_channel < OUT_CHANNELS
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pixel = pixel < pixels
    n, out_row, out_column = unflatten(pixel, out_height, out_width)
    acc = _products(
        padded_ptr, packed_ptr, n, out_row, out_column, is_pixel, out_channel, padded_height, padded_width, steps,
        PADDED_CHANNELS, OUT_CHANNELS, KW, STRIDE_H, STRIDE_W, DILATION_H, SWAP,
        BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION,
    )  # fmt: skip
    store_map(acc, bias_ptr, residual_ptr, y_ptr, pixel, is_pixel, out_channel, is_channel, OUT_CHANNELS, RELU)


@triton.jit(do_not_specialize=["padded_height", "padded_width", "out_height", "out_width", "pooled_pixels", "steps"])
def conv_first_pool_kernel(
    padded_ptr, packed_ptr, bias_ptr, y_ptr, code_ptr,
    padded_height, padded_width, out_height, out_width, pooled_pixels, steps,
    PADDED_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = max_pool2d(relu(conv2d(x, weight) + bias), 2) and the winners' codes; the unpooled map is never written.

    Grid: tiles of BLOCK_M / 4 pooled pixels × tiles of BLOCK_N output channels.
    """
    POOLED: tl.constexpr = BLOCK_M // 4
    tile, out_channel = _tile(BLOCK_N, OUT_CHANNELS)
    is_channel = out_channel < OUT_CHANNELS
    pooled, window_row, window_column = pooled_columns(tile * POOLED, BLOCK_M)
    n, row, column = unflatten(pooled, out_height // 2, out_width // 2)
    acc = _products(
        padded_ptr, packed_ptr, n, 2 * row + window_row, 2 * column + window_column, pooled < pooled_pixels,
        out_channel, padded_height, padded_width, steps,
        PADDED_CHANNELS, OUT_CHANNELS, KW, STRIDE_H, STRIDE_W, DILATION_H, SWAP,
        BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES, PRECISION,
    )  # fmt: skip
    store_pooled(
        acc, bias_ptr, y_ptr, code_ptr, tile * POOLED, pooled_pixels, out_channel, is_channel,
        OUT_CHANNELS, BLOCK_N, BLOCK_M,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "padded_height", "padded_width", "out_height", "out_width", "tiles_h", "tiles_w", "tiles", "split_tiles",
    ]
)  # fmt: skip
def conv_first_wgrad_kernel(
    grad_ptr, padded_ptr, slab_ptr,
    padded_height, padded_width, out_height, out_width, tiles_h, tiles_w, tiles, split_tiles,
    CHANNELS: tl.constexpr, PADDED_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slab[split, O, taps · C] = gradᵀ · x over the split's pixels; columns are taps × CP, of which C are stored.

    A step takes BLOCK_H × BLOCK_W output pixels of one image, so that addresses advance by one scalar.

    Grid: (tiles of BLOCK_N output channels × tiles of BLOCK_C columns, splits of split_tiles of those pixels' tiles).
    """
    COLUMNS: tl.constexpr = KH * KW * PADDED_CHANNELS
    BLOCKS_C: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    split = tl.program_id(1)
    out_channel = program // BLOCKS_C * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out_channel = out_channel < OUT_CHANNELS
    column = program % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = column < COLUMNS
    tap = column // PADDED_CHANNELS
    channel = column % PADDED_CHANNELS
    tap_pixel = (tap // KW * DILATION_H * padded_width + tap % KW).to(tl.int64)

    lane = tl.arange(0, BLOCK_H * BLOCK_W)
    lane_row = lane // BLOCK_W
    lane_col = lane % BLOCK_W
    lane_pixel = (lane_row * STRIDE_H * padded_width + lane_col * STRIDE_W).to(tl.int64)
    x_ptrs = padded_ptr + lane_pixel[:, None] * PADDED_CHANNELS + (tap_pixel * PADDED_CHANNELS + channel)[None, :]
    grad_ptrs = grad_ptr + (lane_row * out_width + lane_col).to(tl.int64)[:, None] * OUT_CHANNELS + out_channel[None, :]
    start = split * split_tiles
    end = start + tl.minimum(split_tiles, tiles - start)
    n, tile_h, tile_w = unflatten(start, tiles_h, tiles_w)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(start, end, num_stages=NUM_STAGES):
        row = tile_h * BLOCK_H
        col = tile_w * BLOCK_W
        is_pixel = (lane_row < out_height - row) & (lane_col < out_width - col)
        x_mask = is_pixel[:, None]
        if COLUMNS % BLOCK_C != 0:
            x_mask = x_mask & is_column[None, :]
        grad_offset = flatten(n, row, col, out_height, out_width) * OUT_CHANNELS
        x_offset = flatten(n, row * STRIDE_H, col * STRIDE_W, padded_height, padded_width) * PADDED_CHANNELS
        grad = tl.load(grad_ptrs + grad_offset, mask=is_pixel[:, None] & is_out_channel[None, :], other=0.0)
        x = tl.load(x_ptrs + x_offset, mask=x_mask, other=0.0)  # [BLOCK_H · BLOCK_W, BLOCK_C]
        if SWAP:
            acc = tl.dot(tl.trans(operand(grad)), operand(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(operand(x)), operand(grad), acc, input_precision=PRECISION)
        n, tile_h, tile_w = advance(n, tile_h, tile_w, 0, 0, 1, tiles_h, tiles_w)
    if not SWAP:
        acc = tl.trans(acc)

    slab_row = split.to(tl.int64) * OUT_CHANNELS + out_channel
    slab_ptrs = slab_ptr + slab_row[:, None] * (KH * KW * CHANNELS) + (tap * CHANNELS + channel)[None, :]
    slab_mask = is_out_channel[:, None] & (is_column & (channel < CHANNELS))[None, :]
    tl.store(slab_ptrs, cast(acc, slab_ptr.dtype.element_ty), mask=slab_mask)
