"""The sizes of a pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import torch

from fastconv.geometry.arguments import CACHE_SIZE

_LARGE_WINDOW = 255  # codes 0 (closed by ReLU) and 1 ... positions must fit one byte


@dataclass(frozen=True)
class PoolGeometry:
    """A 2-d pooling's sizes: input (N, C, H, W), window KH × KW, output (N, C, OH, OW)."""

    batch: int
    channels: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    ceil_mode: bool
    out_height: int
    out_width: int

    @classmethod
    def of(
        cls,
        op: str,
        input_shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        prefix: str = "",
    ) -> PoolGeometry:
        """The checked geometry of a batched pooling.

        Args:
            prefix: what the operator's arguments have before their names, for errors.

        Raises:
            RuntimeError: a shape or parameter that torch.nn.functional.max_pool2d refuses too.
        """
        window = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
        key = (op, tuple(input_shape), *window, ceil_mode, prefix)
        try:
            return _cached_pool(*key)
        except TypeError:  # torch.compile's symbolic sizes have no hash
            return _build_pool(*key)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # in every key of dispatch
        return self._hash

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.height, self.width)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.out_height, self.out_width)

    @property
    def kernel_size(self) -> tuple[int, int]:
        return (self.kernel_height, self.kernel_width)

    @property
    def stride(self) -> tuple[int, int]:
        return (self.stride_h, self.stride_w)

    @property
    def padding(self) -> tuple[int, int]:
        return (self.pad_h, self.pad_w)

    @property
    def dilation(self) -> tuple[int, int]:
        return (self.dilation_h, self.dilation_w)

    @property
    def positions(self) -> int:
        return self.kernel_height * self.kernel_width

    @property
    def code_dtype(self) -> torch.dtype:
        """The winner's code: 0 is closed by ReLU, else 1 + row · KW + column of the window."""
        return torch.uint8 if self.positions < _LARGE_WINDOW else torch.int32

    @property
    def is_2x2(self) -> bool:
        """The 2×2 pooling with stride 2 that convolution kernels fuse."""
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        exact = not self.ceil_mode or (self.height % 2 == 0 and self.width % 2 == 0)
        return window == ((2, 2), (2, 2), (0, 0), (1, 1)) and exact

    @property
    def is_overlapping(self) -> bool:
        """Whether an input element can belong to several windows."""
        reach_h = self.dilation_h * (self.kernel_height - 1)
        reach_w = self.dilation_w * (self.kernel_width - 1)
        return reach_h >= self.stride_h or reach_w >= self.stride_w

    @property
    def is_empty(self) -> bool:
        """No image: nothing to launch."""
        return self.batch == 0

    def bytes_moved(self, itemsize: int) -> int:
        """The floor of traffic of a max-pool: the input, the output and the codes once."""
        outputs = math.prod(self.output_shape)
        return itemsize * (math.prod(self.input_shape) + outputs) + self.code_dtype.itemsize * outputs


def single_elements(op: str, shape: Sequence[int]) -> PoolGeometry:
    """The geometry of an element-wise pass: a window of one element."""
    one, zero = (1, 1), (0, 0)
    return PoolGeometry.of(op, shape, one, one, zero, one, False)


def global_pool(op: str, input_shape: Sequence[int]) -> PoolGeometry:
    """The geometry of a pooling whose one window is the whole map."""
    whole = tuple(input_shape[2:])
    return PoolGeometry.of(op, input_shape, whole, whole, (0, 0), (1, 1), False)


def _build_pool(
    op: str,
    input_shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
    prefix: str,
) -> PoolGeometry:
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    if kh <= 0 or kw <= 0:
        raise RuntimeError(f"{op}: kernel size should be greater than zero, got {prefix}kernel_size={kernel_size}")
    if sh <= 0 or sw <= 0:
        raise RuntimeError(f"{op}: stride should be greater than zero, got {prefix}stride={stride}")
    if dh <= 0 or dw <= 0:
        raise RuntimeError(f"{op}: dilation should be greater than zero, got {prefix}dilation={dilation}")
    if ph < 0 or pw < 0:
        raise RuntimeError(f"{op}: pad must be non-negative, got {prefix}padding={padding}")
    reach_h, reach_w = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    if 2 * ph > kh or 2 * pw > kw:
        raise RuntimeError(
            f"{op}: pad should be at most half of kernel size, got {prefix}padding={padding}, "
            f"{prefix}kernel_size={kernel_size}"
        )
    if len(input_shape) != 4 or any(size == 0 for size in input_shape[1:]):
        raise RuntimeError(
            f"{op}: Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got input of size {list(input_shape)}"
        )
    n, c, h, w = input_shape
    oh = _pooled_size(h, reach_h, sh, ph, ceil_mode)
    ow = _pooled_size(w, reach_w, sw, pw, ceil_mode)
    if oh < 1 or ow < 1:
        raise RuntimeError(
            f"{op}: Given input size: ({c}x{h}x{w}). Calculated output size: ({c}x{oh}x{ow}). Output size is too small; "
            f"got {prefix}kernel_size={kernel_size}, {prefix}padding={padding}, {prefix}dilation={dilation}"
        )
    return PoolGeometry(n, c, h, w, kh, kw, sh, sw, ph, pw, dh, dw, ceil_mode, oh, ow)


def _pooled_size(size: int, reach: int, stride: int, pad: int, ceil_mode: bool) -> int:
    """torch's pooling_output_shape: with ceil_mode the last window must still start inside the input or its left padding."""
    out = (size + 2 * pad - reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out -= 1
    return out


_cached_pool = lru_cache(CACHE_SIZE)(_build_pool)
