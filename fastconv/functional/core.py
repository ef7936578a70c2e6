"""What the functionals share: overriding by __torch_function__, batches of one, the arguments of a pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastconv import geometry
from fastconv.autograd import PoolArgs

IntPair = int | Sequence[int]
P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Hand calls with overriding arguments (torch.fx's proxies, tensor subclasses) to their __torch_function__."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        operands = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(operands):
            result: R = handle_torch_function(call, operands, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


def batched_input(op: str, input: Tensor) -> tuple[Tensor, bool]:
    geometry.check_input(op, input)
    batched = input.dim() == 4
    return (input if batched else input.unsqueeze(0)), batched


def pool_args(
    op: str,
    kernel_size: IntPair,
    stride: IntPair | None,
    padding: IntPair,
    dilation: IntPair,
    ceil_mode: bool,
    prefix: str = "",
) -> PoolArgs:
    kernel = geometry.pair(op, f"{prefix}kernel_size", kernel_size)
    geometry.check_bool(op, f"{prefix}ceil_mode", ceil_mode)
    return PoolArgs(
        kernel,
        kernel if stride is None else geometry.pair(op, f"{prefix}stride", stride, empty=kernel),
        geometry.pair(op, f"{prefix}padding", padding),
        geometry.pair(op, f"{prefix}dilation", dilation),
        ceil_mode,
    )
