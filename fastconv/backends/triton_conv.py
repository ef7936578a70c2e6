"""Launchers of the convolutions: each hands the call to the family of kernels that its plan names.

A plan is one of tuning's candidates for this backend; where none is given, tuning's first choice is taken.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fastconv import tuning
from fastconv.backends import triton_depthwise, triton_first, triton_pointer, triton_tma
from fastconv.backends.triton_launch import chip, nhwc
from fastconv.backends.triton_pool import max_pool2d, max_pool2d_backward, relu_backward
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate

# Every family offers some of the launchers below, with a plan as the last argument.
_FAMILIES: dict[str, ModuleType] = {
    "first": triton_first,
    "depthwise": triton_depthwise,
    "tma": triton_tma,
    "pointer": triton_pointer,
}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    policy: Policy,
    relu: bool,
    plan: Candidate | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    x, weight = nhwc(x), nhwc(weight)
    if residual is not None:
        residual = nhwc(residual)
    plan = plan or _plan("conv2d_relu" if relu else "conv2d", "forward", g, policy, x, weight, residual)
    return _FAMILIES[plan.kernel].conv2d(x, weight, bias, residual, g, policy, relu, plan)


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    plan: Candidate | None = None,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not pool.is_2x2:
        return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)
    x, weight = nhwc(x), nhwc(weight)
    plan = plan or _plan("conv2d_relu_max_pool2d", "forward", g, policy, x, weight)
    return _FAMILIES[plan.kernel].conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, plan)


def conv2d_input_grad(
    grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate | None = None
) -> Tensor:
    grad, weight = nhwc(grad), nhwc(weight)
    plan = plan or _plan("conv2d", "input_grad", g, policy, grad, weight)
    return _FAMILIES[plan.kernel].conv2d_input_grad(grad, weight, g, policy, plan)


def conv2d_input_grad_relu(
    grad: Tensor,
    weight: Tensor,
    gate: Tensor,
    g: ConvGeometry,
    policy: Policy,
    with_bias: bool,
    plan: Candidate | None = None,
) -> tuple[Tensor, Tensor | None]:
    grad, weight, gate = nhwc(grad), nhwc(weight), nhwc(gate)
    plan = plan or _plan("conv2d_relu", "input_grad", g, policy, grad, weight, gate)
    if plan.kernel == triton_tma.FAMILY:
        return triton_tma.conv2d_input_grad_relu(grad, weight, gate, g, policy, with_bias, plan)
    return relu_backward(conv2d_input_grad(grad, weight, g, policy, plan), gate, with_bias)


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate | None = None) -> Tensor:
    grad, x = nhwc(grad), nhwc(x)
    plan = plan or _plan("conv2d", "weight_grad", g, policy, grad, x)
    return _FAMILIES[plan.kernel].conv2d_weight_grad(grad, x, g, policy, plan)


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, pool: PoolGeometry | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if pool is None:
        before, bias = relu_backward(grad, gate, with_bias)
    else:
        before, bias = max_pool2d_backward(grad, gate, pool, with_bias)
    return conv2d_weight_grad(before, x, g, policy), bias


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad = nhwc(grad)
    return conv2d_input_grad(grad, weight, g, policy), conv2d_weight_grad(grad, x, g, policy)


def conv2d_backward_relu(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad, x = nhwc(grad), nhwc(x)
    masked, bias = conv2d_input_grad_relu(grad, weight, x, g, policy, with_bias)
    return masked, conv2d_weight_grad(grad, x, g, policy), bias


def _plan(op: str, direction: str, g: ConvGeometry, policy: Policy, *operands: Tensor | None) -> Candidate:
    """Tuning's first choice among the families that can read these very operands."""
    device = operands[0].device  # type: ignore[union-attr]
    plans = _plans(op, direction, g, policy, chip(device))
    plan = plans[0]
    if plan.kernel == triton_tma.FAMILY and not triton_tma.reads(plan, *operands):
        plan = next((other for other in plans if other.kernel != triton_tma.FAMILY), plan)
    return plan


@tuning.cached_unless_watched
def _plans(op: str, direction: str, g: ConvGeometry, policy: Policy, chip: str) -> tuple[Candidate, ...]:
    choices = tuning.pick(op, direction, g, policy, chip, channels_last=True)
    return tuple(candidate for candidate in choices if candidate.backend == "triton")
