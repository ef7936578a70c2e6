"""Batch normalisation with residual, ReLU and 2×2 max-pool behind it, and its gradients.

Forward is a pass for the statistics and a pass that normalises; backward a pass for two sums a channel and a pass that
writes the input's gradient. Statistics and sums are written as one row a program, and rows are combined in order.
Everything is computed in float32: a value's distance from the mean, never its square.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import cast, flatten, is_update, relu, unflatten


@triton.jit
def _values(ptr, channel, is_channel):
    """A value a channel, float32 [1, BLOCK_C]."""
    return tl.load(ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _combined(count, mean, squares):
    """(mean, sum of squared deviations) of groups of values given by theirs (Chan, Golub & LeVeque, 1979).

    Args:
        count: values of each group, float32 [R]; 0 is allowed, but not everywhere.
        mean, squares: [R, BLOCK_C].
    """
    share = (count / tl.sum(count, axis=0))[:, None]
    center = tl.sum(share * mean, axis=0)
    center += tl.sum(share * (mean - center[None, :]), axis=0)  # what rounding took from a mean far from 0
    deviation = mean - center[None, :]
    off = tl.sum(share * deviation, axis=0)  # what rounding left of the mean outside of `center`
    total = tl.sum(squares + count[:, None] * deviation * deviation, axis=0)
    return center, total - tl.sum(count, axis=0) * off * off


@triton.jit(do_not_specialize=["pixels", "program_pixels"])
def batch_statistics_kernel(
    x_ptr, mean_rows_ptr, squares_rows_ptr, pixels, program_pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of x − x[0] over each program's pixels, by Welford's update in every lane.

    Any value of a channel is nearer to its mean than 0 may be: what is summed has no more digits than the deviations.

    Grid: (runs of program_pixels pixels, tiles of BLOCK_C channels).
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    lane = tl.arange(0, BLOCK_M)
    start = program * program_pixels
    end = start + tl.minimum(program_pixels, pixels - start)
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    pivot = _values(x_ptr, channel, is_channel)
    for first in tl.range(start, end, BLOCK_M):
        pixel = first + lane
        is_pixel = (pixel < end)[:, None]
        x_ptrs = x_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptrs, mask=is_pixel & is_channel[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        x -= pivot
        seen = ((first - start) // BLOCK_M + 1).to(tl.float32)  # values of a lane, this one included
        delta = tl.where(is_pixel, x - mean, 0.0)
        mean += delta * (1.0 / seen)
        squares += delta * (x - mean)
    count = tl.maximum((end - start - lane + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)  # [BLOCK_M]
    center, total = _combined(count, mean, squares)
    row = program.to(tl.int64) * CHANNELS + channel
    tl.store(mean_rows_ptr + row, center, mask=is_channel)
    tl.store(squares_rows_ptr + row, total, mask=is_channel)


@triton.jit(do_not_specialize=["num_rows", "pixels", "program_pixels"])
def combine_statistics_kernel(
    x_ptr, mean_rows_ptr, squares_rows_ptr, mean_ptr, var_ptr, num_rows, pixels, program_pixels, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean[C] and biased var[C] from the rows of `batch_statistics_kernel`. Grid: tiles of BLOCK_C channels."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    lane = tl.arange(0, BLOCK_R)
    count = tl.zeros((BLOCK_R,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in tl.range(0, num_rows, BLOCK_R):
        row = first + lane
        is_row = row < num_rows
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = is_row[:, None] & is_channel[None, :]
        row_mean = tl.load(mean_rows_ptr + offset, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_C]
        row_squares = tl.load(squares_rows_ptr + offset, mask=mask, other=0.0)
        row_count = tl.where(is_row, tl.minimum(pixels - row * program_pixels, program_pixels), 0).to(tl.float32)
        share = (row_count / tl.maximum(count + row_count, 1.0))[:, None]
        delta = tl.where(is_row[:, None], row_mean - mean, 0.0)
        squares += row_squares + delta * delta * share * count[:, None]
        mean += delta * share
        count += row_count
    center, total = _combined(count, mean, squares)
    pivot = tl.load(x_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(mean_ptr + channel, pivot + center, mask=is_channel)
    tl.store(var_ptr + channel, total / tl.cast(pixels, tl.float32), mask=is_channel)


@triton.jit
def update_statistics_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, momentum, unbiased, channels,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """running = (1 − momentum) · running + momentum · batch, the batch's variance times `unbiased`.

    Grid: tiles of BLOCK_C channels.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    mean = tl.load(mean_ptr + channel, mask=is_channel, other=0.0)
    var = tl.load(var_ptr + channel, mask=is_channel, other=0.0) * unbiased
    running_mean = tl.load(running_mean_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    running_var = tl.load(running_var_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    mean = (1.0 - momentum) * running_mean + momentum * mean
    var = (1.0 - momentum) * running_var + momentum * var
    tl.store(running_mean_ptr + channel, cast(mean, running_mean_ptr.dtype.element_ty), mask=is_channel)
    tl.store(running_var_ptr + channel, cast(var, running_var_ptr.dtype.element_ty), mask=is_channel)


@triton.jit
def _inverse_deviation(var_ptr, channel, is_channel, eps):
    return 1.0 / tl.sqrt(_values(var_ptr, channel, is_channel) + eps)


@triton.jit
def _scale(var_ptr, weight_ptr, channel, is_channel, eps):
    scale = _inverse_deviation(var_ptr, channel, is_channel, eps)
    if weight_ptr is not None:
        scale *= _values(weight_ptr, channel, is_channel)
    return scale


@triton.jit(do_not_specialize=["pixels"])
def batch_norm_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, eps, pixels,
    CHANNELS: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = (x − mean) / √(var + eps) · weight + bias + residual, then ReLU; weight, bias and residual may be None.

    Grid: (tiles of BLOCK_M pixels, tiles of BLOCK_C channels).
    """
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    mask = (pixel < pixels)[:, None] & is_channel[None, :]
    y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    y = (y - _values(mean_ptr, channel, is_channel)) * _scale(var_ptr, weight_ptr, channel, is_channel, eps)
    if bias_ptr is not None:
        y += _values(bias_ptr, channel, is_channel)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + offset, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels"])
def batch_norm_pool_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, code_ptr, eps,
    height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = max_pool2d(relu(batch_norm(x) + residual), 2) and the winners' codes; the unpooled map is never written.

    Grid: (tiles of BLOCK_M pooled pixels, tiles of BLOCK_C channels).
    """
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    mask = (pixel < pixels)[:, None] & is_channel[None, :]
    n, row, column = unflatten(pixel, out_height, out_width)
    first = flatten(n, 2 * row, 2 * column, height, width)[:, None] * CHANNELS + channel[None, :]
    mean = _values(mean_ptr, channel, is_channel)
    scale = _scale(var_ptr, weight_ptr, channel, is_channel, eps)
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    code = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            offset = first + tl.cast(down * width + right, tl.int64) * CHANNELS
            y = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean) * scale  # [BLOCK_M, BLOCK_C]
            if bias_ptr is not None:
                y += _values(bias_ptr, channel, is_channel)
            if residual_ptr is not None:
                y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            is_winner = is_update(y, best)
            best = tl.where(is_winner, y, best)
            code = tl.where(is_winner, 1 + 2 * down + right, code)
    code = tl.where(best <= 0.0, 0, code)
    pooled = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(y_ptr + pooled, cast(relu(best), y_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + pooled, code.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["pixels", "program_pixels"])
def batch_norm_sums_kernel(
    grad_ptr, gate_ptr, x_ptr, mean_ptr, var_ptr, rows_ptr, eps, pixels, program_pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program's sums of g and of g · (x − mean) / √(var + eps), g = where(gate <= 0, 0, grad).

    `rows_ptr` is [programs, 2, CHANNELS]; `gate_ptr`, the output, may be None.

    Grid: (runs of program_pixels pixels, tiles of BLOCK_C channels).
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    lane = tl.arange(0, BLOCK_M)
    start = program * program_pixels
    end = start + tl.minimum(program_pixels, pixels - start)
    mean = _values(mean_ptr, channel, is_channel)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_x = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.range(start, end, BLOCK_M):
        pixel = first + lane
        offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        mask = (pixel < end)[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            grad = tl.where(tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32) <= 0.0, 0.0, grad)
        acc += grad
        acc_x += grad * (x - mean)
    _store_sums(rows_ptr, var_ptr, acc, acc_x, program, channel, is_channel, eps, CHANNELS)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pixels", "program_pixels"])
def batch_norm_pool_sums_kernel(
    grad_ptr, code_ptr, x_ptr, mean_ptr, var_ptr, rows_ptr, eps,
    height, width, out_height, out_width, pixels, program_pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`batch_norm_sums_kernel` over pooled pixels, whose gradients belong to the winners that the codes name."""
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    lane = tl.arange(0, BLOCK_M)
    start = program * program_pixels
    end = start + tl.minimum(program_pixels, pixels - start)
    mean = _values(mean_ptr, channel, is_channel)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc_x = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in tl.range(start, end, BLOCK_M):
        pixel = block + lane
        pooled = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        mask = (pixel < end)[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + pooled, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        code = tl.load(code_ptr + pooled, mask=mask, other=0).to(tl.int32)
        n, row, column = unflatten(pixel, out_height, out_width)
        first = flatten(n, 2 * row, 2 * column, height, width)[:, None] * CHANNELS + channel[None, :]
        winner = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                offset = first + tl.cast(down * width + right, tl.int64) * CHANNELS
                x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                winner = tl.where(code == 1 + 2 * down + right, x, winner)
        grad = tl.where(code == 0, 0.0, grad)
        acc += grad
        acc_x += grad * (winner - mean)
    _store_sums(rows_ptr, var_ptr, acc, acc_x, program, channel, is_channel, eps, CHANNELS)


@triton.jit
def _store_sums(rows_ptr, var_ptr, acc, acc_x, program, channel, is_channel, eps, CHANNELS: tl.constexpr):
    row_ptrs = rows_ptr + program.to(tl.int64) * (2 * CHANNELS) + channel
    inverse = tl.sum(_inverse_deviation(var_ptr, channel, is_channel, eps), axis=0)  # [BLOCK_C]
    tl.store(row_ptrs, tl.sum(acc, axis=0), mask=is_channel)
    tl.store(row_ptrs + CHANNELS, tl.sum(acc_x, axis=0) * inverse, mask=is_channel)


@triton.jit
def _input_grad(grad, x_ptr, offset, mask, mean, grad_mean, slope, scale):
    """scale · (grad − grad_mean − (x − mean) · slope); without `x_ptr` the statistics are constants: scale · grad."""
    if x_ptr is not None:
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = grad - grad_mean - (x - mean) * slope
    return grad * scale


@triton.jit
def _input_grad_terms(mean_ptr, var_ptr, sums_ptr, channel, is_channel, eps, inverse_count, CHANNELS: tl.constexpr):
    """(mean of x, mean of the gradient, what the gradient falls by for each unit of x), float32 [1, BLOCK_C]."""
    grad_mean = _values(sums_ptr, channel, is_channel) * inverse_count
    slope = _values(sums_ptr + CHANNELS, channel, is_channel) * inverse_count
    return _values(mean_ptr, channel, is_channel), grad_mean, slope * _inverse_deviation(var_ptr, channel, is_channel, eps)


@triton.jit(do_not_specialize=["pixels"])
def batch_norm_input_grad_kernel(
    grad_ptr, gate_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, sums_ptr, grad_x_ptr, residual_grad_ptr,
    eps, inverse_count, pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x, and residual_grad = where(gate <= 0, 0, grad) unless `residual_grad_ptr` is None.

    `sums_ptr` is [2, CHANNELS]; without `x_ptr` the statistics are constants, and it is not read.

    Grid: (tiles of BLOCK_M pixels, tiles of BLOCK_C channels).
    """
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    mask = (pixel < pixels)[:, None] & is_channel[None, :]
    scale = _scale(var_ptr, weight_ptr, channel, is_channel, eps)
    mean, grad_mean, slope = 0.0, 0.0, 0.0
    if x_ptr is not None:
        mean, grad_mean, slope = _input_grad_terms(
            mean_ptr, var_ptr, sums_ptr, channel, is_channel, eps, inverse_count, CHANNELS
        )
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    if gate_ptr is not None:
        grad = tl.where(tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32) <= 0.0, 0.0, grad)
    if residual_grad_ptr is not None:
        tl.store(residual_grad_ptr + offset, cast(grad, residual_grad_ptr.dtype.element_ty), mask=mask)
    grad_x = _input_grad(grad, x_ptr, offset, mask, mean, grad_mean, slope, scale)
    tl.store(grad_x_ptr + offset, cast(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "window_height", "window_width", "windows"])
def batch_norm_pool_input_grad_kernel(
    grad_ptr, code_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, sums_ptr, grad_x_ptr, residual_grad_ptr,
    eps, inverse_count, height, width, out_height, out_width, window_height, window_width, windows,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`batch_norm_input_grad_kernel` behind a 2×2 max-pool.

    Walks window_height × window_width = ⌈height / 2⌉ × ⌈width / 2⌉ windows an image: the row and column which an odd
    map leaves out of its pooling have a gradient through the statistics.

    Grid: (tiles of BLOCK_M windows, tiles of BLOCK_C channels).
    """
    window = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    is_window = window < windows
    n, row, column = unflatten(window, window_height, window_width)
    is_pooled = is_window & (row < out_height) & (column < out_width)
    pooled = flatten(n, row, column, out_height, out_width)[:, None] * CHANNELS + channel[None, :]
    pooled_mask = is_pooled[:, None] & is_channel[None, :]
    scale = _scale(var_ptr, weight_ptr, channel, is_channel, eps)
    mean, grad_mean, slope = 0.0, 0.0, 0.0
    if x_ptr is not None:
        mean, grad_mean, slope = _input_grad_terms(
            mean_ptr, var_ptr, sums_ptr, channel, is_channel, eps, inverse_count, CHANNELS
        )
    grad = tl.load(grad_ptr + pooled, mask=pooled_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    code = tl.load(code_ptr + pooled, mask=pooled_mask, other=0).to(tl.int32)
    first = flatten(n, 2 * row, 2 * column, height, width)[:, None] * CHANNELS + channel[None, :]
    for down in tl.range(0, 2):  # not unrolled: the operands of four pixels at once would not fit in registers
        for right in tl.static_range(2):
            is_inside = is_window & (2 * row + down < height) & (2 * column + right < width)
            mask = is_inside[:, None] & is_channel[None, :]
            offset = first + tl.cast(down * width + right, tl.int64) * CHANNELS
            won = tl.where(code == 1 + 2 * down + right, grad, 0.0)
            if residual_grad_ptr is not None:
                tl.store(residual_grad_ptr + offset, cast(won, residual_grad_ptr.dtype.element_ty), mask=mask)
            grad_x = _input_grad(won, x_ptr, offset, mask, mean, grad_mean, slope, scale)
            tl.store(grad_x_ptr + offset, cast(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
