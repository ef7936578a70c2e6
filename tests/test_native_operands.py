"""What operators of the compiled library refuse, and operands that lie in memory as no kernel wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv.functional as FC
from fastconv.backends import native, native_winograd
from fastconv.backends.native_library import kernel

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

ALGORITHMS = ("winograd", "amx")


def maps(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def call(algorithm: str, **changed: Any) -> None:
    """A convolution of [2, 16, 9, 10] with 24 outputs."""
    operands = {
        "x": maps(2, 16, 9, 10),
        "weight": maps(24, 16, 3, 3),
        "bias": None,
        "residual": None,
        "output": maps(2, 24, 9, 10),
        "code": None,
        "size": (9, 10),
        "padding": (1, 1),
        "relu": True,
        "turned": False,
    }
    kernel(f"{algorithm}_conv2d")(*{**operands, **changed}.values())


def call_weight_grad(algorithm: str, **changed: Any) -> None:
    operands = {"grad": maps(2, 24, 9, 10), "x": maps(2, 16, 9, 10), "weight_grad": maps(24, 16, 3, 3), "padding": (1, 1)}
    kernel(f"{algorithm}_weight_grad")(*{**operands, **changed}.values())


def pooled(height: int, width: int) -> dict[str, Tensor]:
    code = torch.zeros(2, 24, height, width, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return {"output": maps(2, 24, height, width), "code": code}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "changed,message",
    [
        ({"padding": (0, 1)}, "wrong size"),
        ({"padding": (1, 2)}, "wrong size"),
        ({"padding": (3, 1), "size": (13, 10), "output": maps(2, 24, 13, 10)}, "padding is not 0, 1 or 2"),
        ({"size": (9, 9)}, "wrong size"),
        ({"output": maps(1, 24, 9, 10)}, "wrong size"),
        ({"output": maps(2, 24, 8, 10)}, "wrong size"),
        ({"output": maps(2, 23, 9, 10)}, "channels of x and output"),
        ({"weight": maps(24, 17, 3, 3)}, "channels of x and output"),
        ({"weight": maps(24, 16, 3, 2)}, "channels of x and output"),
        ({"turned": True}, "channels of x and output"),
        (pooled(3, 5), "wrong size"),
        (pooled(5, 6), "wrong size"),
        ({**pooled(4, 5), "relu": False}, "a pool comes with ReLU"),
        ({**pooled(4, 5), "residual": maps(2, 24, 4, 5)}, "without a residual"),
        ({"bias": torch.randn(23).bfloat16()}, "a bias must hold"),
        ({"bias": torch.randn(24)}, "a bias must hold"),
        ({"bias": torch.randn(48).bfloat16()[::2]}, "a bias must hold"),
        ({"residual": maps(2, 24, 9, 9)}, "residual has a wrong size"),
        ({"x": maps(2, 16, 9, 10, dtype=torch.float32)}, "weight has a wrong dtype"),
        ({"x": torch.randn(2, 16, 9, 10).bfloat16()}, "x must be dense"),
        ({"x": maps(2, 0, 9, 10), "weight": maps(24, 0, 3, 3)}, "must have a channel"),
    ],
)
def test_a_convolution_is_refused(algorithm: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(algorithm, **changed)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "changed,message",
    [
        ({"padding": (1, 0)}, "wrong size"),
        ({"padding": (-1, 1), "grad": maps(2, 24, 5, 10)}, "padding is not 0, 1 or 2"),
        ({"x": maps(1, 16, 9, 10)}, "wrong size"),
        ({"x": maps(2, 17, 9, 10)}, "channels of grad and x"),
        ({"weight_grad": maps(24, 16, 1, 3)}, "channels of grad and x"),
        ({"weight_grad": maps(24, 16, 3, 3, dtype=torch.float32)}, "weight_grad has a wrong dtype"),
        ({"grad": torch.randn(2, 24, 9, 10).bfloat16()}, "grad must be dense"),
    ],
)
def test_a_weight_gradient_is_refused(algorithm: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call_weight_grad(algorithm, **changed)


def test_filters_are_refused() -> None:
    weight = maps(16, 16, 3, 3)
    filters = native_winograd.filters(weight)
    maps16 = {"weight": weight, "output": maps(2, 16, 9, 10)}
    call("winograd", **maps16, filters=filters)
    for other in (filters.double(), filters[1:], filters.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="must come from winograd_filters"):
            call("winograd", **maps16, filters=other)
    with pytest.raises(RuntimeError, match="not turned"):
        call("winograd", **maps16, filters=filters, turned=True)


def test_a_first_layer_is_refused() -> None:
    x, weight = maps(1, 3, 8, 8), maps(8, 3, 3, 3)

    def first(height: int, width: int, relu: bool = True, residual: Tensor | None = None) -> None:
        output = maps(1, 8, height, width)
        code = torch.zeros_like(output, dtype=torch.uint8)
        kernel("first_conv2d")(x, weight, None, residual, output, code, (6, 6), (1, 1), (0, 0), relu)

    first(3, 3)
    for size in ((0, 3), (3, 0), (2, 3), (3, 4)):
        with pytest.raises(RuntimeError, match="output has a wrong size"):
            first(*size)
    with pytest.raises(RuntimeError, match="a pool comes with ReLU"):
        first(3, 3, relu=False)
    with pytest.raises(RuntimeError, match="without a residual"):
        first(3, 3, residual=maps(1, 8, 3, 3))


def test_what_fits_is_not_refused() -> None:
    call("winograd")
    call("winograd", **pooled(4, 5))
    call("winograd", **pooled(5, 5))
    call("winograd", padding=(0, 2), size=(7, 12), output=maps(2, 24, 7, 12))
    call_weight_grad("winograd")


@pytest.mark.parametrize(
    "channels,size,kernel_size", [(64, 24, 3), (3, 24, 3), (16, 9, 5)], ids=["winograd", "first", "onednn"]
)
def test_operands_of_any_strides(channels: int, size: int, kernel_size: int) -> None:
    """Every other element of larger tensors, a turned map, and an expanded bias."""
    shape, weight_shape = (2, channels, size, size), (40, channels, kernel_size, kernel_size)
    x = torch.randn(2, channels, size, 2 * size)[..., ::2].transpose(2, 3)
    weight = torch.randn(2 * 40, *weight_shape[1:])[::2]
    residual = torch.randn(2, 40, size, 2 * size)[..., 1::2]
    assert x.shape == shape and weight.shape == weight_shape
    padding = kernel_size // 2
    for bias in (torch.randn(80)[::2], torch.randn(1).expand(40)):
        before = F.conv2d(x.double(), weight.double(), bias.double(), 1, padding)
        wanted = before.add(residual).relu().float()
        torch.testing.assert_close(
            FC.conv2d_relu(x, weight, bias, 1, padding, residual=residual), wanted, atol=1e-3, rtol=1e-4
        )
        pool = FC.conv2d_relu_max_pool2d(x, weight, bias, 1, padding, pool_kernel_size=2)
        torch.testing.assert_close(pool, F.max_pool2d(before.relu(), 2).float(), atol=1e-3, rtol=1e-4)
