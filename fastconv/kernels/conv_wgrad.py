"""Convolution backward to its weight: the pixels are split among programs, each of which writes a slab of its own.

Slabs are then added up in order (prep.sum_rows_kernel): the same result on every run, without atomics.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import OUTSIDE, advance, cast, flatten, inside, operand, unflatten


# Maps and batches of every size share one binary.
@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels", "split_pixels"])
def conv_wgrad_kernel(
    grad_ptr, x_ptr, slab_ptr,
    height, width, out_height, out_width, pixels, split_pixels,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PACK: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slab[split, O, taps · C / groups] = gradᵀ · x over the split's pixels.

    Grid: (packs of PACK groups × tiles of BLOCK_N output channels × tiles of BLOCK_C columns, splits of split_pixels
    output pixels). A column is a tap and an input channel of a pack; where BLOCK_C divides those channels a tile has a
    single tap, which keeps loads wide. Products between the groups of a pack are not stored. Without SWAP the product
    is xᵀ · grad, for tiles of fewer than 64 output channels (see conv_fprop).
    """
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    PACK_IN: tl.constexpr = PACK * GROUP_IN
    PACK_OUT: tl.constexpr = PACK * GROUP_OUT
    COLUMNS: tl.constexpr = KH * KW * PACK_IN
    BLOCKS_C: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    BLOCKS_N: tl.constexpr = (PACK_OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    split = tl.program_id(1)
    pack = program // (BLOCKS_C * BLOCKS_N)
    index = program // BLOCKS_C % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    out_channel = pack * PACK_OUT + index
    is_out_channel = (index < PACK_OUT) & (out_channel < OUT_CHANNELS)
    block = program % BLOCKS_C
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if PACK_IN % BLOCK_C == 0:
        # Counted in blocks, so that the compiler sees the alignment of the addresses.
        TAP_BLOCKS: tl.constexpr = PACK_IN // BLOCK_C
        tap = block // TAP_BLOCKS
        channel = block % TAP_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    else:
        tap = column // PACK_IN
        channel = column % PACK_IN
    is_column = (column < COLUMNS) & (pack * PACK_IN + channel < CHANNELS)
    tap_row = tap // KW * DILATION_H
    tap_column = tap % KW * DILATION_W
    tap_offset = tl.cast(tap_row * width + tap_column, tl.int64) * CHANNELS
    x_column_ptrs = x_ptr + (tap_offset + (pack * PACK_IN + channel))[None, :]
    if PACK_IN % BLOCK_C != 0:
        tap_row = tap_row[None, :]
        tap_column = tap_column[None, :]

    start = split * split_pixels
    end = start + tl.minimum(split_pixels, pixels - start)
    lane = tl.arange(0, BLOCK_P)
    n, row, col = unflatten(start + lane, out_height, out_width)
    step_n, step_row, step_col = unflatten(BLOCK_P, out_height, out_width)
    grad_ptrs = grad_ptr + (start + lane).to(tl.int64)[:, None] * OUT_CHANNELS + out_channel[None, :]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_N), dtype=tl.float32)
    for position in tl.range(start, end, BLOCK_P, num_stages=NUM_STAGES):
        is_pixel = position + lane < end
        top = row * STRIDE_H - PAD_H
        left = col * STRIDE_W - PAD_W
        pixel = flatten(n, top, left, height, width)
        top = tl.where(is_pixel, top, OUTSIDE)
        x_mask = inside(top[:, None] + tap_row, height) & inside(left[:, None] + tap_column, width)
        if COLUMNS % BLOCK_C != 0 or GROUPS % PACK != 0:
            x_mask = x_mask & is_column[None, :]
        grad_offset = tl.cast(position - start, tl.int64) * OUT_CHANNELS
        grad = tl.load(grad_ptrs + grad_offset, mask=is_pixel[:, None] & is_out_channel[None, :], other=0.0)
        x = tl.load(x_column_ptrs + pixel[:, None] * CHANNELS, mask=x_mask, other=0.0)  # [BLOCK_P, BLOCK_C]
        if SWAP:
            acc = tl.dot(tl.trans(operand(grad)), operand(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(operand(x)), operand(grad), acc, input_precision=PRECISION)
        n, row, col = advance(n, row, col, step_n, step_row, step_col, out_height, out_width)
    if not SWAP:
        acc = tl.trans(acc)

    slab_row = split.to(tl.int64) * OUT_CHANNELS + out_channel
    slab_column = tap * GROUP_IN + channel % GROUP_IN
    slab_mask = is_out_channel[:, None] & is_column[None, :]
    if PACK > 1:
        slab_mask = slab_mask & ((out_channel // GROUP_OUT)[:, None] == (pack * PACK + channel // GROUP_IN)[None, :])
    slab_ptrs = slab_ptr + slab_row[:, None] * (KH * KW * GROUP_IN) + slab_column[None, :]
    tl.store(slab_ptrs, cast(acc, slab_ptr.dtype.element_ty), mask=slab_mask)
