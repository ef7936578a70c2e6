"""FLOP formulas for torch.utils.flop_counter, registered when somebody imports it.

That module imports Triton, so that importing it here would make `import fastconv` slow, and warn where Triton is missing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fastconv.geometry import ConvGeometry

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _forward(input: Shape, weight: Shape, bias: Shape | None, *conv: Any, out_shape: Any = None, **_: Any) -> int:
    return ConvGeometry.of("conv2d", input, weight, bias, *conv[:4]).flops()


def _forward_prepared(
    input: Shape, weight: Shape, prepared: Shape, bias: Shape | None, residual: Shape | None, *conv: Any, **_: Any
) -> int:
    return ConvGeometry.of("conv2d_prepared", input, weight, bias, *conv[:4]).flops()


def _forward_with_residual(
    input: Shape, weight: Shape, bias: Shape | None, residual: Shape | None, *conv: Any, out_shape: Any = None, **_: Any
) -> int:
    return ConvGeometry.of("conv2d_relu", input, weight, bias, *conv[:4]).flops()


def _backward(
    grad: Shape,
    input: Shape | None,
    weight: Shape | None,
    input_shape: Shape,
    weight_shape: Shape,
    weight_channels_last: bool,
    *conv: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    gradients = sum(operand is not None for operand in (input, weight))
    return gradients * ConvGeometry.of("conv2d_backward", input_shape, weight_shape, None, *conv[:4]).flops()


def _backward_relu(
    grad: Shape,
    input: Shape,
    weight: Shape,
    with_weight: bool,
    with_bias: bool,
    *conv: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    return (1 + with_weight) * ConvGeometry.of("conv2d_backward_relu", input, weight, None, *conv[:4]).flops()


def _relu_weight_grad(
    grad: Shape,
    gate: Shape,
    input: Shape,
    weight_shape: Shape,
    weight_channels_last: bool,
    with_bias: bool,
    *conv: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    return ConvGeometry.of("conv2d_relu_weight_grad", input, weight_shape, None, *conv[:4]).flops()


def _register() -> None:
    """A formula gets its operator's arguments, with shapes in the place of tensors."""
    ops, register = torch.ops.fastconv, sys.modules[_COUNTER].register_flop_formula
    register([ops.conv2d, ops.conv2d_relu_max_pool2d])(_forward)
    register([ops.conv2d_relu])(_forward_with_residual)
    register([ops.conv2d_prepared])(_forward_prepared)
    register([ops.conv2d_backward])(_backward)
    register([ops.conv2d_backward_relu])(_backward_relu)
    register([ops.conv2d_relu_weight_grad, ops.conv2d_relu_max_pool2d_weight_grad])(_relu_weight_grad)


class _AfterImport(MetaPathFinder):
    """Finds the counter's module as usual, and registers our formulas once it has run."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterImport())
