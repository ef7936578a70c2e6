"""Convolution backward to its weight: the pixels are split among programs, each of which writes a slab of its own.

Slabs are then added up in order (prep.sum_rows_kernel): the same result on every run, without atomics.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import OUTSIDE, cast, flatten, inside, operand, unflatten


@triton.jit
def conv_wgrad_kernel(
    grad_ptr, x_ptr, slab_ptr,
    height, width, out_height, out_width, pixels, split_pixels,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slab[split, O, taps · C / groups] = gradᵀ · x over the split's pixels.

    Grid: (groups × tiles of BLOCK_N output channels × tiles of BLOCK_C columns, splits of split_pixels output pixels).
    A column is a tap and an input channel; where BLOCK_C divides the channels a tile has a single tap, which keeps
    loads wide.
    """
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    COLUMNS: tl.constexpr = KH * KW * GROUP_IN
    BLOCKS_C: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    BLOCKS_N: tl.constexpr = (GROUP_OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    split = tl.program_id(1)
    group = program // (BLOCKS_C * BLOCKS_N)
    out_channel = program // BLOCKS_C % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out_channel = out_channel < GROUP_OUT
    block = program % BLOCKS_C
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if GROUP_IN % BLOCK_C == 0:
        # Counted in blocks, so that the compiler sees the alignment of the addresses.
        TAP_BLOCKS: tl.constexpr = GROUP_IN // BLOCK_C
        tap = block // TAP_BLOCKS
        channel = block % TAP_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    else:
        tap = column // GROUP_IN
        channel = column % GROUP_IN
    tap_row = tap // KW * DILATION_H
    tap_column = tap % KW * DILATION_W
    tap_offset = tl.cast(tap_row * width + tap_column, tl.int64) * CHANNELS
    x_column_ptrs = x_ptr + (tap_offset + (group * GROUP_IN + channel))[None, :]
    if GROUP_IN % BLOCK_C != 0:
        tap_row = tap_row[None, :]
        tap_column = tap_column[None, :]

    start = split * split_pixels
    end = tl.minimum(start + split_pixels, pixels)
    lane = tl.arange(0, BLOCK_P)
    # Coordinates are carried from step to step as digits, since a division costs more than a step's product.
    n, row, col = unflatten(start + lane, out_height, out_width)
    step_n, step_row, step_col = unflatten(BLOCK_P, out_height, out_width)
    grad_ptrs = grad_ptr + (start + lane).to(tl.int64)[:, None] * OUT_CHANNELS
    grad_ptrs += (group * GROUP_OUT + out_channel)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for position in tl.range(start, end, BLOCK_P, num_stages=NUM_STAGES):
        is_pixel = position + lane < end
        top = row * STRIDE_H - PAD_H
        left = col * STRIDE_W - PAD_W
        pixel = flatten(n, top, left, height, width)
        top = tl.where(is_pixel, top, OUTSIDE)
        x_mask = inside(top[:, None] + tap_row, height) & inside(left[:, None] + tap_column, width)
        if COLUMNS % BLOCK_C != 0:
            x_mask = x_mask & (column < COLUMNS)[None, :]
        grad_offset = tl.cast(position - start, tl.int64) * OUT_CHANNELS
        grad = tl.load(grad_ptrs + grad_offset, mask=is_pixel[:, None] & is_out_channel[None, :], other=0.0)
        x = tl.load(x_column_ptrs + pixel[:, None] * CHANNELS, mask=x_mask, other=0.0)  # [BLOCK_P, BLOCK_C]
        acc = tl.dot(tl.trans(operand(grad)), operand(x), acc, input_precision=PRECISION)
        col += step_col
        carry = (col >= out_width).to(tl.int32)
        col -= carry * out_width
        row += step_row + carry
        carry = (row >= out_height).to(tl.int32)
        row -= carry * out_height
        n += step_n + carry

    slab_row = split.to(tl.int64) * OUT_CHANNELS + group * GROUP_OUT + out_channel
    slab_ptrs = slab_ptr + slab_row[:, None] * COLUMNS + column[None, :]
    slab_mask = is_out_channel[:, None] & (column < COLUMNS)[None, :]
    tl.store(slab_ptrs, cast(acc, slab_ptr.dtype.element_ty), mask=slab_mask)
