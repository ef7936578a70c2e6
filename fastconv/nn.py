"""Modules: torch.nn's own, with fastconv's kernels behind `forward`.

Every class here subclasses the torch.nn module that it stands for: same constructor, same `state_dict`, so checkpoints
move freely in both directions. `from_torch` makes one from an existing torch.nn module and shares its Parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastconv import functional

IntPair = int | Sequence[int]

_C = TypeVar("_C", bound="Conv2d")


class Conv2d(torch.nn.Conv2d):
    """Convolution: `torch.nn.Conv2d` with the same arguments and keys (weight, bias).

    Shapes:
        input [N, C, H, W] or [C, H, W]; output [N, O, OH, OW] or [O, OH, OW]; dtype as the input's.

    Equal to:
        torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    """

    @classmethod
    def from_torch(cls: type[_C], module: torch.nn.Conv2d, **pool: Any) -> _C:
        """A module of this class with `module`'s settings and its Parameter objects themselves (shared, not copied).

        Args:
            module: any convolution with torch.nn.Conv2d's settings.
            pool: the pooling's arguments, for ConvReLUMaxPool2d.
        """
        # On the meta device nothing is allocated and no random number is drawn: a net keeps its seeded initialisation.
        made = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
            **pool,
        )
        made.weight = module.weight
        made.bias = module.bias
        return made.train(module.training)

    def _padded(self, input: Tensor) -> tuple[Tensor, str | IntPair]:
        """The input and the padding left to the kernel: modes other than zeros are padded beforehand, as torch does."""
        if self.padding_mode == "zeros":
            return input, self.padding
        widths = self._reversed_padding_repeated_twice
        return torch.nn.functional.pad(input, widths, mode=self.padding_mode), 0

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._padded(input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvReLU2d(Conv2d):
    """Convolution, bias, optional residual and ReLU in one pass; constructor and keys of `torch.nn.Conv2d`.

    Shapes:
        input [N, C, H, W] or [C, H, W]; residual, where given, exactly the output's shape [N, O, OH, OW] or [O, OH, OW].

    Equal to:
        relu(conv2d(input, weight, bias, stride, padding, dilation, groups) + residual)
    """

    def _layer(self) -> functional.ConvLayer:
        """This layer for functional.conv_chain, zero padding assumed."""
        return functional.ConvLayer(self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        input, padding = self._padded(input)
        return functional.conv2d_relu(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, residual=residual
        )


class ConvReLUMaxPool2d(Conv2d):
    """Convolution, bias, ReLU and max-pool in one pass; keys of `torch.nn.Conv2d`.

    Args:
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode: as `torch.nn.MaxPool2d`'s arguments
            of the same names without `pool_`. All others: as `torch.nn.Conv2d`'s.

    Shapes:
        input [N, C, H, W] or [C, H, W]; output [N, O, PH, PW] or [O, PH, PW], the pooled map.

    Equal to:
        max_pool2d(relu(conv2d(input, weight, bias, stride, padding, dilation, groups)), pool_kernel_size, ...)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: str | IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pool_kernel_size: IntPair = 2,
        pool_stride: IntPair | None = None,
        pool_padding: IntPair = 0,
        pool_dilation: IntPair = 1,
        pool_ceil_mode: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.pool_dilation = pool_dilation
        self.pool_ceil_mode = pool_ceil_mode

    def _layer(self) -> functional.ConvLayer:
        """This layer for functional.conv_chain, zero padding assumed."""
        return functional.ConvLayer(
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.pool_kernel_size,
            self.pool_stride,
            self.pool_padding,
            self.pool_dilation,
            self.pool_ceil_mode,
        )

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return functional.conv2d_relu_max_pool2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_dilation=self.pool_dilation,
            pool_ceil_mode=self.pool_ceil_mode,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}, "
            f"pool_padding={self.pool_padding}, pool_dilation={self.pool_dilation}, pool_ceil_mode={self.pool_ceil_mode}"
        )


class ConvChain(torch.nn.Sequential):
    """`torch.nn.Sequential` whose neighbouring ConvReLU2d and ConvReLUMaxPool2d run as one `functional.conv_chain`.

    Same constructor, keys, slices and results. Identities between two layers do not part them. A member is run by itself,
    with everything that its call implies, where it is of another class (a subclass or parametrized layer included), has
    hooks, a patched forward or a padding_mode other than 'zeros'; and all members are while global hooks are registered
    and while torch.compile traces.

    Backward is one node of the graph: the gradients of all layers of a run arrive together.

    Equal to:
        for module in self:
            input = module(input)
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or _has_any_global_hook():
            return cast(Tensor, super().forward(input))
        for part in self.parts(self):
            if len(part) == 1:
                input = part[0](input)
            else:
                input = functional.conv_chain(input, [cast(_Chainable, layer)._layer() for layer in part])
        return input

    @staticmethod
    def parts(modules: Iterable[torch.nn.Module]) -> Iterator[list[torch.nn.Module]]:
        """`modules` as a ConvChain runs them: lists of the layers of a chain, and of one module that runs by itself."""
        layers: list[torch.nn.Module] = []
        for module in modules:
            if isinstance(module, torch.nn.Identity) and _is_nothing_but(module, torch.nn.Identity):
                continue
            if _is_chainable(module):
                layers.append(module)
                continue
            if layers:
                yield layers
            yield [module]
            layers = []
        if layers:
            yield layers


_Chainable = ConvReLU2d | ConvReLUMaxPool2d


def _is_chainable(module: torch.nn.Module) -> bool:
    return _is_nothing_but(module, ConvReLU2d, ConvReLUMaxPool2d) and module.padding_mode == "zeros"


def _is_nothing_but(module: torch.nn.Module, *kinds: type[torch.nn.Module]) -> bool:
    """Whether calling `module`, of exactly one of `kinds`, runs the forward of its class and nothing else."""
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


class MaxPool2d(torch.nn.MaxPool2d):
    """Max-pool: `torch.nn.MaxPool2d` with the same arguments; int64 indices are made only for return_indices=True.

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
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """Average pool: `torch.nn.AvgPool2d` with the same arguments.

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
