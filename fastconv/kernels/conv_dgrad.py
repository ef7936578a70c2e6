"""Convolution backward to its input, for any stride and dilation in one launch and without atomics.

An input pixel's taps are those with tap · dilation ≡ row + padding (mod stride). Pixels of one such residue (a phase)
share their taps, so that a tile of one phase multiplies only what counts: stride 2 costs no more than stride 1 does.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import OUTSIDE, cast, first_tap, flatten, inside, operand, unflatten


# A trip count known to the compiler would unroll the loop over taps.
@triton.jit(do_not_specialize=["blocks_k"])
def conv_dgrad_kernel(
    grad_ptr, weight_ptr, grad_x_ptr,
    height, width, out_height, out_width, phase_height, phase_width, phase_pixels, phase_tiles, blocks_k,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_x[C, pixels of a phase] = sum over its taps of Wᵀ · gradᵀ.

    Grid: STRIDE_H · STRIDE_W phases × phase_tiles of BLOCK_M input pixels × groups × tiles of BLOCK_N input channels. A
    phase is phase_height × phase_width pixels an image, the last row and column of which may lie beyond the map. A
    tap's gradients are read in blocks_k blocks of channels.
    """
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = OUT_CHANNELS // GROUPS
    BLOCKS_N: tl.constexpr = (GROUP_IN + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (GROUP_OUT + BLOCK_K - 1) // BLOCK_K
    TAP_STEP_H: tl.constexpr = STRIDE_H // GCD_H
    TAP_STEP_W: tl.constexpr = STRIDE_W // GCD_W
    program = tl.program_id(0)
    group = program // BLOCKS_N % GROUPS
    tile = program // (BLOCKS_N * GROUPS) % phase_tiles
    phase = program // (BLOCKS_N * GROUPS) // phase_tiles
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W

    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n, row, column = unflatten(pixel, phase_height, phase_width)
    row = row * STRIDE_H + (phase_h + STRIDE_H * PAD_H - PAD_H) % STRIDE_H
    column = column * STRIDE_W + (phase_w + STRIDE_W * PAD_W - PAD_W) % STRIDE_W
    is_pixel = (pixel < phase_pixels) & (row < height) & (column < width)

    first_h = first_tap(phase_h, KH, STRIDE_H, GCD_H, INVERSE_H)
    first_w = first_tap(phase_w, KW, STRIDE_W, GCD_W, INVERSE_W)
    taps_h = (KH - first_h + TAP_STEP_H - 1) // TAP_STEP_H
    taps_w = (KW - first_w + TAP_STEP_W - 1) // TAP_STEP_W
    out_row = (row + PAD_H - first_h * DILATION_H) // STRIDE_H
    out_column = (column + PAD_W - first_w * DILATION_W) // STRIDE_W

    out_channel = tl.arange(0, BLOCK_K)
    channel = program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel = channel < GROUP_IN
    out_pixel = flatten(n, out_row, out_column, out_height, out_width)
    grad_ptrs = grad_ptr + out_pixel[:, None] * OUT_CHANNELS + (group * GROUP_OUT + out_channel)[None, :]
    weight_row = (group * GROUP_OUT + out_channel).to(tl.int64) * (KH * KW * GROUP_IN)
    weight_ptrs = weight_ptr + weight_row[:, None] + channel[None, :]
    out_row = tl.where(is_pixel, out_row, OUTSIDE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, taps_h * taps_w * blocks_k, num_stages=NUM_STAGES):
        tap = step // BLOCKS_K
        first = step % BLOCKS_K * BLOCK_K
        up = tap // taps_w * (DILATION_H // GCD_H)
        back = tap % taps_w * (DILATION_W // GCD_W)
        tap_h = first_h + tap // taps_w * TAP_STEP_H
        tap_w = first_w + tap % taps_w * TAP_STEP_W
        grad_mask = (inside(out_row - up, out_height) & inside(out_column - back, out_width))[:, None]
        weight_mask = is_channel[None, :]
        if GROUP_OUT % BLOCK_K != 0:
            grad_mask = grad_mask & (first + out_channel < GROUP_OUT)[None, :]
            weight_mask = weight_mask & (first + out_channel < GROUP_OUT)[:, None]
        grad_offset = first - tl.cast(up * out_width + back, tl.int64) * OUT_CHANNELS
        weight_offset = (tl.cast(first, tl.int64) * (KH * KW) + tap_h * KW + tap_w) * GROUP_IN
        grad = tl.load(grad_ptrs + grad_offset, mask=grad_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs + weight_offset, mask=weight_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(operand(weight)), tl.trans(operand(grad)), acc, input_precision=PRECISION)

    grad_x = tl.trans(cast(acc, grad_x_ptr.dtype.element_ty))  # [BLOCK_M, BLOCK_N]
    grad_x_offset = flatten(n, row, column, height, width)[:, None] * CHANNELS + (group * GROUP_IN + channel)[None, :]
    tl.store(grad_x_ptr + grad_x_offset, grad_x, mask=is_pixel[:, None] & is_channel[None, :])
