"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

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


class FrozenConv2d(torch.nn.Module):
    """A snapshot of a Conv2d, ConvReLU2d or ConvReLUMaxPool2d of 2×2 windows for inference, its weight prepared.

    `fastconv.freeze` makes them. Weight and bias are buffers of the same names; the prepared weight is made anew from them
    when the module is moved, cast, loaded or unpickled, and not when they are written to.

    Shapes:
        As of the module that it stands for.
    """

    weight: Tensor
    bias: Tensor | None
    prepared: Tensor | None

    def __init__(self, module: Conv2d) -> None:
        super().__init__()
        self.stride, self.padding = module.stride, module.padding
        self.dilation, self.groups = module.dilation, module.groups
        self.relu = isinstance(module, (ConvReLU2d, ConvReLUMaxPool2d))
        self.max_pool = isinstance(module, ConvReLUMaxPool2d)
        self.training = module.training
        self.register_buffer("weight", module.weight.detach().clone())
        self.register_buffer("bias", None if module.bias is None else module.bias.detach().clone())
        self._prepare()

    @staticmethod
    def serves(module: torch.nn.Module) -> bool:
        """Whether `module` is exactly of one of the three classes, with arguments that this one has."""
        if type(module) not in (Conv2d, ConvReLU2d, ConvReLUMaxPool2d) or module.padding_mode != "zeros":
            return False
        if isinstance(module, ConvReLUMaxPool2d):
            pair = torch.nn.modules.utils._pair
            pooling = (module.pool_kernel_size, module.pool_stride, module.pool_padding, module.pool_dilation)
            if [pair(value) for value in pooling] != [(2, 2), (2, 2), (0, 0), (1, 1)] or module.pool_ceil_mode:
                return False
        return True

    def _prepare(self) -> None:
        with torch.no_grad():
            prepared = functional.prepare_conv2d(self.weight, self.stride, self.dilation, self.groups)
        self.register_buffer("prepared", prepared, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenConv2d:
        self.prepared = None
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {**self._buffers, "prepared": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.run(input, residual, self.relu, self.max_pool)

    def run(self, input: Tensor, residual: Tensor | None, relu: bool, max_pool: bool) -> Tensor:
        """The convolution with another end than its own."""
        return functional.conv2d_prepared(
            input,
            self.weight,
            self.prepared,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            relu=relu,
            residual=residual,
            max_pool=max_pool,
        )

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {out_channels}, padding={self.padding}, relu={self.relu}, max_pool={self.max_pool}"


class ConvReLU2d(Conv2d):
    """Convolution, bias, optional residual and ReLU in one pass; constructor and keys of `torch.nn.Conv2d`.

    Shapes:
        input [N, C, H, W] or [C, H, W]; residual, where given, exactly the output's shape [N, O, OH, OW] or [O, OH, OW].

    Equal to:
        relu(conv2d(input, weight, bias, stride, padding, dilation, groups) + residual)
    """

    def layer(self) -> functional.ConvLayer:
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

    def layer(self) -> functional.ConvLayer:
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
