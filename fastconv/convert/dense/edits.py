"""What a call in a graph becomes."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Drop:
    """Nothing: hand the input on."""


@dataclass(frozen=True)
class Window:
    """A pool of a fixed window."""

    kind: str  # "avg" or "max"
    kernel_size: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    @property
    def is_identity(self) -> bool:
        return self.kernel_size == self.stride == (1, 1)


@dataclass(frozen=True)
class Convolve:
    """A convolution as large as the map (C, H, W), in place of a Linear."""

    size: tuple[int, int, int]
    dilation: Pair = (1, 1)


@dataclass(frozen=True)
class Normalise2d:
    """BatchNorm2d in place of BatchNorm1d."""


@dataclass(frozen=True)
class OverClasses:
    """Softmax over dimension 1, which was the last."""


@dataclass(frozen=True)
class Spread:
    """Dilation and padding times `factor`; stride 1 for the pool within a fused layer if `unstrided`."""

    factor: Pair = (1, 1)
    unstrided: bool = False


Edit = Drop | Window | Convolve | Normalise2d | OverClasses | Spread
