"""The sizes of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from fastconv.geometry.arguments import CACHE_SIZE, pair


def _check_weight_shape(op: str, weight_shape: Sequence[int]) -> None:
    if len(weight_shape) != 4:
        raise RuntimeError(
            f"{op}: Expected 4-dimensional weight (O, C / groups, KH, KW), but got weight of size {list(weight_shape)}"
        )


def conv_padding(
    op: str,
    padding: str | int | Sequence[int],
    weight_shape: Sequence[int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding as ((pad_h, pad_w), (extra_h, extra_w)): the symmetric part, and what 'same' adds at the bottom and right."""
    _check_weight_shape(op, weight_shape)
    if not isinstance(padding, str):
        return pair(op, "padding", padding), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise RuntimeError(f"{op}: Invalid padding string: padding={padding!r}; allowed: 'same', 'valid' or ints")
    if stride != (1, 1):
        raise RuntimeError(
            f"{op}: padding='same' is not supported for strided convolutions, got stride={stride}; allowed: stride=1"
        )
    total_h, total_w = (d * (k - 1) for d, k in zip(dilation, weight_shape[2:], strict=True))
    return (total_h // 2, total_w // 2), (total_h % 2, total_w % 2)


def conv_output_shape(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(N, O, OH, OW) of a convolution whose arguments are valid."""
    out_height, out_width = (
        (input_shape[2 + i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return (input_shape[0], weight_shape[0], out_height, out_width)


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-d convolution's sizes: input (N, C, H, W), weight (O, C / groups, KH, KW), output (N, O, OH, OW)."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    out_height: int
    out_width: int

    @classmethod
    def of(
        cls,
        op: str,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        bias_shape: Sequence[int] | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> ConvGeometry:
        """The checked geometry of a batched convolution.

        Raises:
            RuntimeError: a shape or parameter that torch.nn.functional.conv2d refuses too.
        """
        key = (
            op,
            tuple(input_shape),
            tuple(weight_shape),
            None if bias_shape is None else tuple(bias_shape),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            groups,
        )
        try:
            return _cached_conv(*key)
        except TypeError:  # torch.compile's symbolic sizes have no hash
            return _build_conv(*key)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # in every key of dispatch
        return self._hash

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.in_channels, self.height, self.width)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.group_in_channels, self.kernel_height, self.kernel_width)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.out_channels, self.out_height, self.out_width)

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
    def group_in_channels(self) -> int:
        return self.in_channels // self.groups

    @property
    def group_out_channels(self) -> int:
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return self.kernel_height * self.kernel_width

    @property
    def out_pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def is_empty(self) -> bool:
        """No image: nothing to launch."""
        return self.batch == 0

    def flops(self) -> int:
        """Multiply-adds counted as two; the same for forward, input gradient and weight gradient."""
        return 2 * self.out_pixels * self.out_channels * self.group_in_channels * self.taps

    def bytes_moved(self, itemsize: int) -> int:
        """The floor of traffic: each of input, weight and output once; the same for all three directions."""
        return itemsize * sum(map(math.prod, (self.input_shape, self.weight_shape, self.output_shape)))


def _build_conv(
    op: str,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> ConvGeometry:
    _check_weight_shape(op, weight_shape)
    if len(input_shape) != 4:
        raise RuntimeError(
            f"{op}: Expected 3D (unbatched) or 4D (batched) input for 4-dimensional weight, "
            f"but got input of size {list(input_shape)}"
        )
    n, c, h, w = input_shape
    o, cg, kh, kw = weight_shape
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    if sh <= 0 or sw <= 0:
        raise RuntimeError(f"{op}: non-positive stride is not supported, got stride={stride}; allowed: 1 and more")
    if ph < 0 or pw < 0:
        raise RuntimeError(f"{op}: negative padding is not supported, got padding={padding}; allowed: 0 and more")
    if dh <= 0 or dw <= 0:
        raise RuntimeError(f"{op}: dilation should be greater than zero, got dilation={dilation}")
    if groups <= 0:
        raise RuntimeError(f"{op}: non-positive groups is not supported, got groups={groups}; allowed: 1 and more")
    if kh <= 0 or kw <= 0:
        raise RuntimeError(f"{op}: kernel size should be greater than zero, got weight of size {list(weight_shape)}")
    if o < groups:
        raise RuntimeError(
            f"{op}: Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {list(weight_shape)} instead"
        )
    if o % groups != 0:
        raise RuntimeError(
            f"{op}: Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {list(weight_shape)} instead"
        )
    if c != cg * groups:
        raise RuntimeError(
            f"{op}: Given groups={groups}, weight of size {list(weight_shape)}, expected input{list(input_shape)} "
            f"to have {cg * groups} channels, but got {c} channels instead"
        )
    if bias_shape is not None and bias_shape != (o,):
        raise RuntimeError(
            f"{op}: Given weight of size {list(weight_shape)}, expected bias to be 1-dimensional with {o} elements, "
            f"but got bias of size {list(bias_shape)} instead"
        )
    reach_h, reach_w = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    if h + 2 * ph < reach_h or w + 2 * pw < reach_w:
        raise RuntimeError(
            f"{op}: Calculated padded input size per channel: ({h + 2 * ph} x {w + 2 * pw}). "
            f"Kernel size: ({reach_h} x {reach_w}). Kernel size can't be greater than actual input size; "
            f"got input of size {list(input_shape)}, weight of size {list(weight_shape)}, "
            f"padding={padding}, dilation={dilation}"
        )
    if c == 0 or h == 0 or w == 0:
        raise RuntimeError(
            f"{op}: Only a zero batch is supported, not zero channels, height or width; "
            f"got input of size {list(input_shape)}"
        )
    oh, ow = conv_output_shape(input_shape, weight_shape, stride, padding, dilation)[2:]
    return ConvGeometry(n, c, h, w, o, kh, kw, sh, sw, ph, pw, dh, dw, groups, oh, ow)


_cached_conv = lru_cache(CACHE_SIZE)(_build_conv)
