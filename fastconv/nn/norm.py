"""Batch normalisation."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastconv import functional
from fastconv.nn.conv import IntPair

_B = TypeVar("_B", bound="BatchNormReLU2d")


def arguments(norm: torch.nn.BatchNorm2d, input: Tensor) -> tuple[Any, ...]:
    """What torch.nn.BatchNorm2d hands to batch_norm."""
    norm._check_input_dim(input)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    tracking = norm.training and norm.track_running_stats
    if tracking and norm.num_batches_tracked is not None and norm.momentum is None:  # the cumulative average
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0)
    statistics = (norm.running_mean, norm.running_var) if tracking or not norm.training else (None, None)
    return input, *statistics, norm.weight, norm.bias, uses_batch(norm), momentum, norm.eps


def uses_batch(norm: torch.nn.BatchNorm2d) -> bool:
    """Whether it normalises by the statistics of the batch."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def count(norm: torch.nn.BatchNorm2d) -> None:
    """Count the batch, once the statistics are updated: a call that raises, or that a checkpoint stops, does neither."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


class BatchNormReLU2d(torch.nn.BatchNorm2d):
    """Batch normalisation, optional residual and ReLU in one pass; constructor and keys of `torch.nn.BatchNorm2d`.

    It is a BatchNorm2d to those who look for one, and to `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and the folding of
    norms into convolutions too: these would drop the ReLU, so they come before this module, see `fastconv.convert`.

    Shapes:
        input [N, C, H, W]; residual, where given, and output exactly the same.

    Equal to:
        relu(batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps) + residual)
    """

    @classmethod
    def from_torch(cls: type[_B], module: torch.nn.BatchNorm2d, **pool: Any) -> _B:
        """A module of this class with `module`'s settings and its Parameters and buffers themselves (shared, not copied).

        Args:
            module: any batch normalisation with torch.nn.BatchNorm2d's settings.
            pool: the pooling's arguments, for BatchNormReLUMaxPool2d.
        """
        settings = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        made = cls(*settings, device="meta", **pool)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(made, name, getattr(module, name))
        return made.train(module.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = functional.batch_norm_relu(*arguments(self, input), residual=residual)
        count(self)
        return output


class BatchNormReLUMaxPool2d(BatchNormReLU2d):
    """Batch normalisation, optional residual, ReLU and max-pool in one pass; keys of `torch.nn.BatchNorm2d`.

    Args:
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode: as `torch.nn.MaxPool2d`'s arguments
            of the same names without `pool_`. All others: as `torch.nn.BatchNorm2d`'s, `settings` those of its keywords
            that only some releases have (bias).

    As of BatchNormReLU2d, SyncBatchNorm's conversion and folding into a convolution would drop the ReLU, and the pool.

    Shapes:
        input [N, C, H, W]; residual, where given, exactly the same; output [N, C, PH, PW], the pooled map.

    Equal to:
        max_pool2d(relu(batch_norm(input, running_mean, ...) + residual), pool_kernel_size, ...)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pool_kernel_size: IntPair = 2,
        pool_stride: IntPair | None = None,
        pool_padding: IntPair = 0,
        pool_dilation: IntPair = 1,
        pool_ceil_mode: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **settings)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.pool_dilation = pool_dilation
        self.pool_ceil_mode = pool_ceil_mode

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = functional.batch_norm_relu_max_pool2d(
            *arguments(self, input),
            residual=residual,
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_dilation=self.pool_dilation,
            pool_ceil_mode=self.pool_ceil_mode,
        )
        count(self)
        return output

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}, "
            f"pool_padding={self.pool_padding}, pool_dilation={self.pool_dilation}, pool_ceil_mode={self.pool_ceil_mode}"
        )
