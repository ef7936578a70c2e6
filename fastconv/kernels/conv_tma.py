"""Convolution by tensor descriptors (sm_90 and later): the copy engine gathers tiles, and fills padding with zeros.

The product is conv_fprop's, acc[O, pixels] = W · Xᵀ, and a tile's pixels are a box of images × rows × columns. What lies
outside a map reads as zero and is not stored, so that nothing needs a mask.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import box_origin, cast, load_box, max_2x2, operand, relu


# Sizes of maps and batches share one binary.
@triton.jit(do_not_specialize=["boxes_h", "boxes_w", "steps"])
def conv_tma_kernel(
    x_desc, weight_desc, bias_ptr, residual_desc, gate_desc, y_desc, code_desc, partial_ptr, boxes_h, boxes_w, steps,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr, RELU: tl.constexpr,
    BATCH_INNER: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = conv2d(x, weight) + bias + residual, then ReLU, then a 2×2 max-pool where `code_desc` takes its codes.

    The weight's descriptor is of (taps, O, C); with TRANSPOSED of (taps, C, O), its taps are read in reverse, and the
    product is the input gradient of a convolution of stride 1 and padding dilation · (kernel − 1) − PAD. Then
    `gate_desc` may name what the gradient's ReLU has read, which closes it where that is not positive, and
    `partial_ptr` takes the sums over each box, [boxes, O]. Descriptors and pointers may be None but x, weight and y.

    Grid: boxes × tiles of BLOCK_N output channels, which share their pixels.
    """
    BLOCKS_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    BLOCK_M: tl.constexpr = BLOCK_B * BLOCK_H * BLOCK_W
    program = tl.program_id(0)
    first_out = program % BLOCKS_N * BLOCK_N
    box = program // BLOCKS_N
    n, row, column = box_origin(box, boxes_h, boxes_w, BLOCK_B, BLOCK_H, BLOCK_W)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        tap = step // BLOCKS_K
        channel = step % BLOCKS_K * BLOCK_K
        tap_row = tap // KW * DILATION_H
        tap_column = tap % KW * DILATION_W
        x = load_box(
            x_desc, n, row, column, tap_row, tap_column, channel, CHANNELS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, BATCH_INNER
        )
        x = tl.reshape(x, (BLOCK_M, BLOCK_K))
        if TRANSPOSED:
            weight = weight_desc.load([KH * KW - 1 - tap, channel, first_out])
            weight = tl.trans(tl.reshape(weight, (BLOCK_K, BLOCK_N)))
        else:
            weight = tl.reshape(weight_desc.load([tap, first_out, channel]), (BLOCK_N, BLOCK_K))
        acc = tl.dot(operand(weight), tl.trans(operand(x)), acc, input_precision=PRECISION)

    if code_desc is not None:
        # Bias and ReLU are monotone: they come after the maximum, on a quarter of the values.
        if BATCH_INNER:
            acc, code = max_2x2(acc, BLOCK_N, BLOCK_H, BLOCK_B * BLOCK_W)
        else:
            acc, code = max_2x2(acc, BLOCK_N, BLOCK_B * BLOCK_H, BLOCK_W)
    if bias_ptr is not None:
        out_channel = first_out + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + out_channel, mask=out_channel < OUT_CHANNELS, other=0.0).to(tl.float32)[:, None]
    if residual_desc is not None:
        residual = tl.reshape(residual_desc.load([n, row, column, first_out]), (BLOCK_M, BLOCK_N))
        acc += tl.trans(residual).to(tl.float32)
    if gate_desc is not None:
        gate = tl.reshape(gate_desc.load([n, row, column, first_out]), (BLOCK_M, BLOCK_N))
        acc = tl.where(tl.trans(gate).to(tl.float32) <= 0.0, 0.0, acc)
    if partial_ptr is not None:
        out_channel = first_out + tl.arange(0, BLOCK_N)
        partial_ptrs = partial_ptr + tl.cast(box, tl.int64) * OUT_CHANNELS + out_channel
        tl.store(partial_ptrs, tl.sum(acc, axis=1), mask=out_channel < OUT_CHANNELS)
    if code_desc is not None:
        code = tl.trans(tl.where(acc <= 0.0, 0, code).to(tl.uint8))
        y = tl.trans(cast(relu(acc), y_desc.dtype))  # [BLOCK_M / 4, BLOCK_N]
        if BATCH_INNER:
            place = [row // 2, n, column // 2, first_out]
            y_desc.store(place, tl.reshape(y, (BLOCK_H // 2, BLOCK_B, BLOCK_W // 2, BLOCK_N)))
            code_desc.store(place, tl.reshape(code, (BLOCK_H // 2, BLOCK_B, BLOCK_W // 2, BLOCK_N)))
        else:
            place = [n, row // 2, column // 2, first_out]
            y_desc.store(place, tl.reshape(y, (BLOCK_B, BLOCK_H // 2, BLOCK_W // 2, BLOCK_N)))
            code_desc.store(place, tl.reshape(code, (BLOCK_B, BLOCK_H // 2, BLOCK_W // 2, BLOCK_N)))
    else:
        if RELU:
            acc = relu(acc)
        y = tl.trans(cast(acc, y_desc.dtype))  # [BLOCK_M, BLOCK_N]
        y_desc.store([n, row, column, first_out], tl.reshape(y, (BLOCK_B, BLOCK_H, BLOCK_W, BLOCK_N)))


@triton.jit(do_not_specialize=["boxes_h", "boxes_w", "phase_boxes", "blocks_k"])
def conv_dgrad_strided_tma_kernel(
    grad_desc, weight_desc, gate_desc, grad_x_desc, partial_ptr, boxes_h, boxes_w, phase_boxes, blocks_k,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The input gradient of a convolution with strides and without dilation, gated and summed as in conv_tma_kernel.

    Input pixels that share row + padding and column + padding modulo the strides (a phase) share their taps, and are
    boxes of the view (N, H / SH, SH, W / SW, SW · C). Phases with most taps come first.

    Grid: STRIDE_H · STRIDE_W phases × phase_boxes × tiles of BLOCK_N input channels.
    """
    BLOCKS_N: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K
    BLOCK_M: tl.constexpr = BLOCK_B * BLOCK_H * BLOCK_W
    program = tl.program_id(0)
    first_channel = program % BLOCKS_N * BLOCK_N
    box = program // BLOCKS_N
    phase = box // phase_boxes
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    n, row, column = box_origin(box % phase_boxes, boxes_h, boxes_w, BLOCK_B, BLOCK_H, BLOCK_W)
    down = (phase_h + STRIDE_H * PAD_H - PAD_H) % STRIDE_H
    right = (phase_w + STRIDE_W * PAD_W - PAD_W) % STRIDE_W
    out_row = row + (down + PAD_H - phase_h) // STRIDE_H
    out_column = column + (right + PAD_W - phase_w) // STRIDE_W
    taps_h = (KH - phase_h + STRIDE_H - 1) // STRIDE_H
    taps_w = (KW - phase_w + STRIDE_W - 1) // STRIDE_W

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    row_taps = tl.maximum(taps_w, 1)  # a phase without taps makes no step, yet its first loads are computed ahead
    for step in tl.range(0, taps_h * taps_w * blocks_k, num_stages=NUM_STAGES):
        tap = step // BLOCKS_K
        out_channel = step % BLOCKS_K * BLOCK_K
        up = tap // row_taps
        back = tap % row_taps
        weight_tap = (phase_h + up * STRIDE_H) * KW + phase_w + back * STRIDE_W
        grad = tl.reshape(grad_desc.load([n, out_row - up, out_column - back, out_channel]), (BLOCK_M, BLOCK_K))
        weight = tl.reshape(weight_desc.load([weight_tap, out_channel, first_channel]), (BLOCK_K, BLOCK_N))
        acc = tl.dot(tl.trans(operand(weight)), tl.trans(operand(grad)), acc, input_precision=PRECISION)

    place = [n, row, down, column, right * CHANNELS + first_channel]
    channel = first_channel + tl.arange(0, BLOCK_N)
    if gate_desc is not None:
        gate = tl.reshape(gate_desc.load(place), (BLOCK_M, BLOCK_N))
        acc = tl.where(tl.trans(gate).to(tl.float32) <= 0.0, 0.0, acc)
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + tl.cast(box, tl.int64) * CHANNELS + channel
        tl.store(partial_ptrs, tl.sum(acc, axis=1), mask=channel < CHANNELS)
    grad_x = tl.trans(cast(acc, grad_x_desc.dtype))  # [BLOCK_M, BLOCK_N]
    grad_x_desc.store(place, tl.reshape(grad_x, (BLOCK_B, BLOCK_H, 1, BLOCK_W, BLOCK_N)))


@triton.jit
def _sum_boxes(
    grad_desc, x_desc, boxes_h, boxes_w, start, end, first_out, first_channel, tap_row, tap_column, out_height, out_width,
    CHANNELS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ROWS_JOIN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradᵀ · x [BLOCK_N, BLOCK_C] over boxes start to end; with MASKED, over pixels of the gradient's map only."""
    BLOCK_P: tl.constexpr = BLOCK_B * BLOCK_H * BLOCK_W
    # Coordinates are carried from box to box, since a division costs more than a step's product.
    n, row, column = box_origin(start, boxes_h, boxes_w, BLOCK_B, BLOCK_H, BLOCK_W)
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for _ in tl.range(start, end, num_stages=NUM_STAGES):
        if ROWS_JOIN:
            grad = grad_desc.load([(n * boxes_h * BLOCK_H + row) * BLOCK_W, first_out])
        else:
            grad = tl.reshape(grad_desc.load([n, row, column, first_out]), (BLOCK_P, BLOCK_N))
        x = load_box(
            x_desc, n, row, column, tap_row, tap_column, first_channel, CHANNELS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, False
        )
        x = tl.reshape(x, (BLOCK_P, BLOCK_C))
        if MASKED:
            pixel = tl.arange(0, BLOCK_P)
            is_inside = (row + pixel // BLOCK_W % BLOCK_H < out_height) & (column + pixel % BLOCK_W < out_width)
            x = tl.where(is_inside[:, None], x, 0.0)
        acc = tl.dot(tl.trans(operand(grad)), operand(x), acc, input_precision=PRECISION)
        column += BLOCK_W
        carry = (column >= boxes_w * BLOCK_W).to(tl.int32)
        column *= 1 - carry
        row += carry * BLOCK_H
        carry = (row >= boxes_h * BLOCK_H).to(tl.int32)
        row *= 1 - carry
        n += carry * BLOCK_B
    return acc


@triton.jit(do_not_specialize=["boxes_h", "boxes_w", "boxes", "split_boxes", "out_height", "out_width"])
def conv_wgrad_tma_kernel(
    grad_desc, x_desc, slab_ptr, boxes_h, boxes_w, boxes, split_boxes, out_height, out_width,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ROWS_JOIN: tl.constexpr, OVERHANGS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slab[split, O, taps · C] = gradᵀ · x over the split's boxes of output pixels.

    The tensor cores read gradᵀ from shared memory only if its box has one side of pixels: a single row of a map, or, with
    ROWS_JOIN, whole rows (and maps) of a gradient whose descriptor is of (N · OH · OW, O). Else it goes by registers.

    Grid: (taps × tiles of BLOCK_C input channels × tiles of BLOCK_N output channels, splits of split_boxes boxes).
    """
    BLOCKS_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    split = tl.program_id(1)
    first_out = program % BLOCKS_N * BLOCK_N
    first_channel = program // BLOCKS_N % BLOCKS_C * BLOCK_C
    tap = program // (BLOCKS_N * BLOCKS_C)
    tap_row = tap // KW * DILATION_H
    tap_column = tap % KW * DILATION_W

    start = split * split_boxes
    end = start + tl.minimum(split_boxes, boxes - start)
    acc = _sum_boxes(
        grad_desc, x_desc, boxes_h, boxes_w, start, end, first_out, first_channel, tap_row, tap_column, 0, 0,
        CHANNELS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ROWS_JOIN, False,
        BLOCK_B, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_C, NUM_STAGES, PRECISION,
    )  # fmt: skip
    if OVERHANGS:
        # What a tap sees from beyond the gradient's border is multiplied by zero, which is not zero where it is infinite.
        if tl.max((acc != acc).to(tl.int32), axis=None) > 0:
            acc = _sum_boxes(
                grad_desc, x_desc, boxes_h, boxes_w, start, end, first_out, first_channel, tap_row, tap_column,
                out_height, out_width, CHANNELS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ROWS_JOIN, True,
                BLOCK_B, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_C, 1, PRECISION,
            )  # fmt: skip

    out_channel = first_out + tl.arange(0, BLOCK_N)
    channel = first_channel + tl.arange(0, BLOCK_C)
    slab_row = tl.cast(split, tl.int64) * OUT_CHANNELS + out_channel
    slab_ptrs = slab_ptr + slab_row[:, None] * (KH * KW * CHANNELS) + (tap * CHANNELS + channel)[None, :]
    slab_mask = (out_channel < OUT_CHANNELS)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(slab_ptrs, cast(acc, slab_ptr.dtype.element_ty), mask=slab_mask)
