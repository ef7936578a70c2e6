"""Launchers of the convolutions: each hands the call to the family of kernels that its plan names.

A plan is one of tuning's candidates for this backend; where none is given, tuning's first choice is taken.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from torch import Tensor

from fastconv import tuning
from fastconv.backends import triton_pointer
from fastconv.backends.triton_launch import chip, nhwc
from fastconv.backends.triton_pool import max_pool2d
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate

# Every family offers some of the launchers below, with a plan as the last argument.
_FAMILIES: dict[str, ModuleType] = {"pointer": triton_pointer}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    policy: Policy,
    relu: bool,
    plan: Candidate | None = None,
) -> Tensor:
    plan = plan or _plan("conv2d_relu" if relu else "conv2d", "forward", g, policy, chip(x.device))
    return _FAMILIES[plan.kernel].conv2d(x, weight, bias, residual, g, policy, relu, plan)


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    plan: Candidate | None = None,
) -> tuple[Tensor, Tensor]:
    if not pool.is_2x2:
        return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False, plan=plan), pool, relu=True)
    plan = plan or _plan("conv2d_relu_max_pool2d", "forward", g, policy, chip(x.device))
    return _FAMILIES[plan.kernel].conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, plan)


def conv2d_input_grad(
    grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate | None = None
) -> Tensor:
    plan = plan or _plan("conv2d", "input_grad", g, policy, chip(grad.device))
    return _FAMILIES[plan.kernel].conv2d_input_grad(grad, weight, g, policy, plan)


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate | None = None) -> Tensor:
    plan = plan or _plan("conv2d", "weight_grad", g, policy, chip(grad.device))
    return _FAMILIES[plan.kernel].conv2d_weight_grad(grad, x, g, policy, plan)


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad = nhwc(grad)
    return conv2d_input_grad(grad, weight, g, policy), conv2d_weight_grad(grad, x, g, policy)


@lru_cache(4096)
def _plan(op: str, direction: str, g: ConvGeometry, policy: Policy, chip: str) -> Candidate:
    """The Triton kernel and tiles that tuning puts first."""
    choices = tuning.pick(op, direction, g, policy, chip, channels_last=True)
    return next(candidate for candidate in choices if candidate.backend == "triton")
