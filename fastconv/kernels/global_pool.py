"""Global average-pooling and its gradient, each in one launch."""

import triton
import triton.language as tl

from fastconv.kernels.coords import cast


@triton.jit
def global_avg_pool_kernel(
    x_ptr, y_ptr, area,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[N, C] = mean of x over an image's `area` pixels. Grid: (images, tiles of BLOCK_C channels)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    lane = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.range(0, area, BLOCK_M):
        pixel = first + lane
        x_ptrs = x_ptr + (image * area + pixel)[:, None] * CHANNELS + channel[None, :]
        x_mask = (pixel < area)[:, None] & is_channel[None, :]
        acc += tl.load(x_ptrs, mask=x_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    y = tl.sum(acc, axis=0) / tl.cast(area, tl.float32)
    tl.store(y_ptr + image * CHANNELS + channel, cast(y, y_ptr.dtype.element_ty), mask=is_channel)


@triton.jit
def global_avg_pool_backward_kernel(
    grad_ptr, grad_x_ptr, area, pixels,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x[N, area, C] = grad[N, C] / area. Grid: (tiles of BLOCK_M pixels, tiles of BLOCK_C channels)."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    grad_ptrs = grad_ptr + (pixel // area).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    grad_x = cast(grad / tl.cast(area, tl.float32), grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :], grad_x, mask=mask)
