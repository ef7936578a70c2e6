"""Pools."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastconv import functional, geometry


class MaxPool2d(torch.nn.MaxPool2d):
    """Max-pool: `torch.nn.MaxPool2d` with the same arguments; int64 indices are made only for return_indices=True.

    Inputs of integers go to torch.

    Equal to:
        torch.nn.functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    """

    @classmethod
    def from_torch(cls, module: torch.nn.MaxPool2d) -> MaxPool2d:
        """A module of this class with `module`'s settings."""
        made = cls(
            module.kernel_size, module.stride, module.padding, module.dilation, module.return_indices, module.ceil_mode
        )
        return made.train(module.training)

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if input.dtype not in geometry.DTYPES:
            return cast(Tensor, super().forward(input))
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """Average pool: `torch.nn.AvgPool2d` with the same arguments. Inputs of integers go to torch.

    Equal to:
        torch.nn.functional.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    """

    @classmethod
    def from_torch(cls, module: torch.nn.AvgPool2d) -> AvgPool2d:
        """A module of this class with `module`'s settings."""
        made = cls(
            module.kernel_size,
            module.stride,
            module.padding,
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
        return made.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in geometry.DTYPES:
            return super().forward(input)
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class GlobalAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """The mean of each map: `torch.nn.AdaptiveAvgPool2d(1)`.

    Shapes:
        input [N, C, H, W] or [C, H, W]; output [N, C, 1, 1] or [C, 1, 1].

    Raises:
        ValueError: an output size other than 1.

    Equal to:
        torch.nn.functional.adaptive_avg_pool2d(input, 1)
    """

    def __init__(self, output_size: int | tuple[int, int] = 1) -> None:
        if output_size not in (1, (1, 1)):
            raise ValueError(
                f"GlobalAvgPool2d: output_size must be 1, got output_size={output_size!r}; "
                f"use torch.nn.AdaptiveAvgPool2d for other sizes"
            )
        super().__init__(output_size)

    @classmethod
    def from_torch(cls, module: torch.nn.AdaptiveAvgPool2d) -> GlobalAvgPool2d:
        """A module of this class with `module`'s output size, which must be 1."""
        return cls(cast(int, module.output_size)).train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        return functional.global_avg_pool2d(input)


def spatial_mean(input: Tensor, dim: tuple[int, int], keepdim: bool = False) -> Tensor:
    """`input.mean(dim, keepdim)` for the two dimensions of a map, by the kernel of global_avg_pool2d where there is one.

    Shapes:
        input [N, C, H, W]; output [N, C], with keepdim [N, C, 1, 1]. Inputs of other dimensions go to torch.
    """
    if input.dim() != 4 or input.dtype not in geometry.DTYPES:
        return input.mean(dim, keepdim)
    output = functional.global_avg_pool2d(input)
    return output if keepdim else output.flatten(1)
