"""What a backward does before its products: close gradients by ReLU or un-pool them, and sum them for the bias.

Sums are written as one row of partial sums a program, and `sum_rows_kernel` adds the rows up in order.
"""

import triton
import triton.language as tl

from fastconv.kernels.coords import cast, flatten, unflatten


@triton.jit(do_not_specialize=["pixels", "program_pixels"])
def relu_backward_kernel(
    grad_ptr, gate_ptr, masked_ptr, partial_ptr, pixels, program_pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """masked = where(gate <= 0, 0, grad) and its partial sums over pixels; a NaN lets the gradient pass, as in torch.

    Each of `gate_ptr` (no mask), `masked_ptr` (sums only) and `partial_ptr` (no sums) may be None; a max-pool's codes
    are a gate too. Grid: (runs of program_pixels pixels, tiles of BLOCK_C channels).
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    lane = tl.arange(0, BLOCK_M)
    start = program * program_pixels
    end = start + tl.minimum(program_pixels, pixels - start)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.range(start, end, BLOCK_M):
        pixel = first + lane
        offset = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        mask = (pixel < end)[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        if gate_ptr is not None:
            grad = tl.where(tl.load(gate_ptr + offset, mask=mask, other=0).to(tl.float32) <= 0.0, 0.0, grad)
        if masked_ptr is not None:
            tl.store(masked_ptr + offset, cast(grad, masked_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            acc += grad
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + program.to(tl.int64) * CHANNELS + channel
        tl.store(partial_ptrs, tl.sum(acc, axis=0), mask=is_channel)


@triton.jit(
    do_not_specialize=[
        "height",
        "width",
        "out_height",
        "out_width",
        "window_height",
        "window_width",
        "windows",
        "program_windows",
    ]
)
def unpool_kernel(
    grad_ptr, code_ptr, grad_x_ptr, partial_ptr,
    height, width, out_height, out_width, window_height, window_width, windows, program_windows,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a 2×2 max-pool with stride 2, and partial sums of it unless `partial_ptr` is None.

    Walks window_height × window_width = ⌈height / 2⌉ × ⌈width / 2⌉ windows an image, so that the row and column which
    an odd map leaves out of its pooling become 0 in the same launch.

    Grid: (runs of program_windows windows, tiles of BLOCK_C channels).
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    lane = tl.arange(0, BLOCK_M)
    start = program * program_windows
    end = start + tl.minimum(program_windows, windows - start)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.range(start, end, BLOCK_M):
        window = first + lane
        is_window = window < end
        n, row, column = unflatten(window, window_height, window_width)
        is_pooled = is_window & (row < out_height) & (column < out_width)
        pooled = flatten(n, row, column, out_height, out_width)
        offset = pooled[:, None] * CHANNELS + channel[None, :]
        mask = is_pooled[:, None] & is_channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        code = tl.load(code_ptr + offset, mask=mask, other=0).to(tl.int32)
        if partial_ptr is not None:
            acc += tl.where(code == 0, 0.0, grad)
        pixel = flatten(n, 2 * row, 2 * column, height, width)
        grad_x_ptrs = grad_x_ptr + pixel[:, None] * CHANNELS + channel[None, :]
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                is_inside = is_window & (2 * row + down < height) & (2 * column + right < width)
                value = cast(tl.where(code == 1 + 2 * down + right, grad, 0.0), grad_x_ptr.dtype.element_ty)
                neighbour = tl.cast(down * width + right, tl.int64) * CHANNELS
                tl.store(grad_x_ptrs + neighbour, value, mask=is_inside[:, None] & is_channel[None, :])
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + program.to(tl.int64) * CHANNELS + channel
        tl.store(partial_ptrs, tl.sum(acc, axis=0), mask=is_channel)


# As many rows as there are splits, which follow the size of a map: one binary sums them all.
@triton.jit(do_not_specialize=["num_rows"])
def sum_rows_kernel(
    rows_ptr, sum_ptr, num_rows, num_columns,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum[num_columns] of rows[num_rows, num_columns], added up in a fixed order. Grid: tiles of BLOCK_C columns."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = column < num_columns
    lane = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in tl.range(0, num_rows, BLOCK_R):
        row = first + lane
        row_ptrs = rows_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        acc += tl.load(row_ptrs, mask=(row < num_rows)[:, None] & is_column[None, :], other=0.0)
    tl.store(sum_ptr + column, cast(tl.sum(acc, axis=0), sum_ptr.dtype.element_ty), mask=is_column)
