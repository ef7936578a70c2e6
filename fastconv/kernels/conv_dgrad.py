"""Convolution backward to its input, for any stride and dilation in one launch and without atomics.

An input pixel's taps are those with tap · dilation ≡ row + padding (mod stride). Pixels of one such residue (a phase)
share their taps, so that a tile of one phase multiplies only what counts: stride 2 costs no more than stride 1 does.
SWAP and PACK are conv_fprop's.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import OUTSIDE, cast, flatten, inside, operand, phase_of_taps


@triton.jit
def _sum_taps(
    grad_ptrs, weight_ptrs, grad_mask, weight_mask, out_row, out_column, out_height, out_width,
    first_h, first_w, taps_h, taps_w, blocks_k,
    OUT_CHANNELS: tl.constexpr, GROUP_IN: tl.constexpr, PACK_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TAP_STEP_H: tl.constexpr, TAP_STEP_W: tl.constexpr, OUT_STEP_H: tl.constexpr, OUT_STEP_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product over a phase's taps × blocks of output channels: [BLOCK_N, BLOCK_M], without SWAP its transpose.

    grad_mask [1, BLOCK_K] or None and weight_mask [1 or BLOCK_K, BLOCK_N] hold for every step.
    """
    BLOCKS_K: tl.constexpr = (PACK_OUT + BLOCK_K - 1) // BLOCK_K
    out_channel = tl.arange(0, BLOCK_K)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    row_taps = tl.maximum(taps_w, 1)  # a phase without taps makes no step, yet its first loads are computed ahead
    for step in tl.range(0, taps_h * taps_w * blocks_k, num_stages=NUM_STAGES):
        tap = step // BLOCKS_K
        first = step % BLOCKS_K * BLOCK_K
        up = tap // row_taps * OUT_STEP_H
        back = tap % row_taps * OUT_STEP_W
        tap_h = first_h + tap // row_taps * TAP_STEP_H
        tap_w = first_w + tap % row_taps * TAP_STEP_W
        is_grad = (inside(out_row - up, out_height) & inside(out_column - back, out_width))[:, None]
        is_weight = weight_mask
        if grad_mask is not None:
            is_grad = is_grad & grad_mask
        elif PACK_OUT % BLOCK_K != 0:
            is_grad = is_grad & (first + out_channel < PACK_OUT)[None, :]
            is_weight = is_weight & (first + out_channel < PACK_OUT)[:, None]
        grad_offset = first - tl.cast(up * out_width + back, tl.int64) * OUT_CHANNELS
        weight_offset = (tl.cast(first, tl.int64) * (KH * KW) + tap_h * KW + tap_w) * GROUP_IN
        grad = tl.load(grad_ptrs + grad_offset, mask=is_grad, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs + weight_offset, mask=is_weight, other=0.0)  # [BLOCK_K, BLOCK_N]
        if SWAP:
            acc = tl.dot(tl.trans(operand(weight)), tl.trans(operand(grad)), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(operand(grad), operand(weight), acc, input_precision=PRECISION)
    return acc


# A trip count known to the compiler would unroll the loop over taps; maps and batches of every size share one binary.
@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "phase_height", "phase_width", "phase_pixels", "phase_tiles",
        "blocks_k",
    ]
)  # fmt: skip
def conv_dgrad_kernel(
    grad_ptr, weight_ptr, grad_x_ptr,
    height, width, out_height, out_width, phase_height, phase_width, phase_pixels, phase_tiles, blocks_k,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr, PACK: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_x[C, pixels of a phase] = sum over its taps of Wᵀ · gradᵀ.

    Grid: STRIDE_H · STRIDE_W phases × phase_tiles of BLOCK_M input pixels × packs of groups × tiles of BLOCK_N input
    channels. A phase is phase_height × phase_width pixels an image, the last row and column of which may lie beyond
    the map. A tap's gradients are read in blocks_k blocks of channels.
    """
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    PACK_IN: tl.constexpr = PACK * GROUP_IN
    PACK_OUT: tl.constexpr = PACK * GROUP_OUT
    PACKS: tl.constexpr = (GROUPS + PACK - 1) // PACK
    BLOCKS_N: tl.constexpr = (PACK_IN + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    pack = program // BLOCKS_N % PACKS
    tile = program // (BLOCKS_N * PACKS) % phase_tiles
    phase = program // (BLOCKS_N * PACKS) // phase_tiles

    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n, row, column, first_h, first_w, taps_h, taps_w, out_row, out_column = phase_of_taps(
        pixel, phase, phase_height, phase_width, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
        DILATION_H, DILATION_W, GCD_H, GCD_W, INVERSE_H, INVERSE_W,
    )  # fmt: skip
    is_pixel = (pixel < phase_pixels) & (row < height) & (column < width)

    out_channel = tl.arange(0, BLOCK_K)
    index = program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = pack * PACK_IN + index
    is_channel = (index < PACK_IN) & (channel < CHANNELS)
    out_pixel = flatten(n, out_row, out_column, out_height, out_width)
    grad_ptrs = grad_ptr + out_pixel[:, None] * OUT_CHANNELS + (pack * PACK_OUT + out_channel)[None, :]
    weight_row = (pack * PACK_OUT + out_channel).to(tl.int64)[:, None] * (KH * KW * GROUP_IN)
    out_row = tl.where(is_pixel, out_row, OUTSIDE)
    if PACK == 1:
        acc = _sum_taps(
            grad_ptrs, weight_ptr + weight_row + index[None, :], None, is_channel[None, :],
            out_row, out_column, out_height, out_width, first_h, first_w, taps_h, taps_w, blocks_k,
            OUT_CHANNELS, GROUP_IN, PACK_OUT, KH, KW,
            STRIDE_H // GCD_H, STRIDE_W // GCD_W, DILATION_H // GCD_H, DILATION_W // GCD_W,
            BLOCK_N, BLOCK_M, BLOCK_K, SWAP, NUM_STAGES, PRECISION,
        )  # fmt: skip
    else:
        tl.static_assert(PACK_OUT <= BLOCK_K and PACK_IN <= BLOCK_N)
        group = channel // GROUP_IN
        out_group = pack * PACK + out_channel // GROUP_OUT
        is_out_channel = (out_channel < PACK_OUT) & (pack * PACK_OUT + out_channel < OUT_CHANNELS)
        weight_ptrs = weight_ptr + weight_row + (index % GROUP_IN)[None, :]
        weight_mask = is_out_channel[:, None] & (out_group[:, None] == group[None, :]) & is_channel[None, :]
        acc = _sum_taps(
            grad_ptrs, weight_ptrs, is_out_channel[None, :], weight_mask,
            out_row, out_column, out_height, out_width, first_h, first_w, taps_h, taps_w, blocks_k,
            OUT_CHANNELS, GROUP_IN, PACK_OUT, KH, KW,
            STRIDE_H // GCD_H, STRIDE_W // GCD_W, DILATION_H // GCD_H, DILATION_W // GCD_W,
            BLOCK_N, BLOCK_M, BLOCK_K, SWAP, NUM_STAGES, PRECISION,
        )  # fmt: skip
        # 0 times a NaN or an infinity of another group is NaN: such a tile is computed again, group by group.
        if tl.max((acc != acc).to(tl.int32), axis=None) > 0:
            for member in range(PACK):
                is_member = (out_channel // GROUP_OUT == member) & is_out_channel
                exact = _sum_taps(
                    grad_ptrs, weight_ptrs, is_member[None, :], weight_mask,
                    out_row, out_column, out_height, out_width, first_h, first_w, taps_h, taps_w, blocks_k,
                    OUT_CHANNELS, GROUP_IN, PACK_OUT, KH, KW,
                    STRIDE_H // GCD_H, STRIDE_W // GCD_W, DILATION_H // GCD_H, DILATION_W // GCD_W,
                    BLOCK_N, BLOCK_M, BLOCK_K, SWAP, 1, PRECISION,
                )  # fmt: skip
                is_row = group == pack * PACK + member
                acc = tl.where(is_row[:, None] if SWAP else is_row[None, :], exact, acc)
    if SWAP:
        acc = tl.trans(acc)

    grad_x_offset = flatten(n, row, column, height, width)[:, None] * CHANNELS + channel[None, :]  # [BLOCK_M, BLOCK_N]
    grad_x_mask = is_pixel[:, None] & is_channel[None, :]
    tl.store(grad_x_ptr + grad_x_offset, cast(acc, grad_x_ptr.dtype.element_ty), mask=grad_x_mask)
