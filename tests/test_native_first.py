"""First layers on a CPU: their kernels against float64, and the way to them from autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.functional as FC
from fastconv import nn
from fastconv.backends import aten, native, native_first
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import cpu

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS_LAST = torch.channels_last
WIDE = Policy(torch.float64)

# input, output channels, kernel, stride, padding
LAYERS = {
    "vgg": ((2, 3, 32, 32), 64, (3, 3), (1, 1), (1, 1)),
    "stem": ((2, 3, 37, 45), 64, (7, 7), (2, 2), (3, 3)),
    "alexnet": ((1, 3, 63, 51), 96, (11, 11), (4, 4), (2, 2)),
    "grey": ((3, 1, 12, 13), 6, (5, 5), (1, 1), (2, 2)),
    "one by one": ((2, 2, 5, 7), 33, (1, 1), (1, 1), (0, 0)),
    "strides and paddings": ((2, 1, 9, 11), 5, (5, 3), (2, 1), (4, 2)),
    "wide": ((1, 4, 13, 270), 70, (4, 5), (3, 1), (2, 5)),
    "flat": ((3, 2, 7, 6), 31, (2, 1), (1, 2), (0, 0)),
    "more padding than map": ((1, 3, 2, 2), 3, (3, 3), (1, 1), (5, 6)),
    "one pixel": ((4, 3, 3, 3), 17, (3, 3), (2, 2), (0, 0)),
    "tall": ((1, 3, 130, 3), 24, (3, 3), (1, 1), (1, 1)),
    "runs of strips": ((20, 2, 41, 37), 8, (3, 3), (1, 1), (1, 1)),
}


def geometry_of(case: str) -> ConvGeometry:
    x, outputs, kernel, stride, padding = LAYERS[case]
    return ConvGeometry.of("test", x, (outputs, x[1], *kernel), None, stride, padding, (1, 1), 1)


def pools_of(g: ConvGeometry) -> Iterator[PoolGeometry]:
    for ceil_mode in (False, True):
        if ceil_mode or min(g.out_height, g.out_width) > 1:
            yield PoolGeometry.of("test", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), ceil_mode)


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=CHANNELS_LAST)


def positive(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Data whose sums cannot cancel: no relative bound holds for a sum near zero."""
    return torch.rand(shape).to(dtype).to(memory_format=CHANNELS_LAST)


def operands(g: ConvGeometry, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return random(g.input_shape, dtype), random(g.weight_shape, dtype), torch.randn(g.out_channels).to(dtype)


def assert_dense(*tensors: Tensor | None) -> None:
    assert all(t is None or t.dim() == 1 or t.is_contiguous(memory_format=CHANNELS_LAST) for t in tensors)


def exact_gradients(
    grad: Tensor, gate: Tensor | None, x: Tensor, g: ConvGeometry, pool: PoolGeometry | None
) -> tuple[Tensor, Tensor]:
    before = grad.double()
    if pool is not None:
        assert gate is not None
        before, _ = aten.max_pool2d_backward(before, gate, pool, False)
    elif gate is not None:
        before = before.masked_fill(gate <= 0, 0)
    return torch.nn.grad.conv2d_weight(x.double(), g.weight_shape, before, g.stride, g.padding), before.sum((0, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYERS)
class TestLaunchers:
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("with_bias, with_residual", [(False, False), (True, False), (True, True)])
    def test_forward(self, case: str, dtype: torch.dtype, with_bias: bool, with_residual: bool, relu: bool) -> None:
        g = geometry_of(case)
        x, weight, bias = operands(g, dtype)
        residual = random(g.output_shape, dtype) if with_residual else None
        given = (x, weight, bias if with_bias else None, residual)
        actual = native_first.conv2d(*given, g, relu)
        expected = aten.conv2d(*(t if t is None else t.double() for t in given), g, WIDE, relu)  # type: ignore[arg-type]
        assert_close(actual, expected, dtype, g.taps * g.in_channels, case)
        assert_dense(actual)

    def test_with_pool(self, case: str, dtype: torch.dtype) -> None:
        """Winners are those of the sums before they are rounded: compared are the values that codes point to."""
        g = geometry_of(case)
        x, weight, bias = operands(g, dtype)
        before = native_first.conv2d(x, weight, bias, None, g, relu=False)
        for pool in pools_of(g):
            output, code = native_first.conv2d_relu_max_pool2d(x, weight, bias, g, pool)
            expected, _ = aten.max_pool2d(before.double(), pool, relu=True)
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=0)
            at = aten.code_to_indices(code, pool).flatten(2)
            chosen = before.flatten(2).gather(2, at).view(output.shape).masked_fill(code == 0, 0)
            torch.testing.assert_close(output, chosen, rtol=0, atol=0)
            if dtype == torch.float32:
                assert torch.equal(code, aten.max_pool2d(before, pool, relu=True)[1])
            assert code.dtype == torch.uint8
            assert_dense(output, code)

    @pytest.mark.parametrize("gated", [False, True])
    def test_gradients(self, case: str, dtype: torch.dtype, gated: bool) -> None:
        g = geometry_of(case)
        x, grad = positive(g.input_shape, dtype), positive(g.output_shape, dtype)
        gate = random(g.output_shape, dtype).relu_() if gated else None
        expected, expected_bias = exact_gradients(grad, gate, x, g, None)
        for with_bias in (False, True):
            weight, bias = native_first._weight_grad(grad, gate, x, g, with_bias)
            assert_close(weight, expected, dtype, g.out_pixels, "weight")
            assert_dense(weight)
            assert (bias is not None) == with_bias
        assert bias is not None
        assert_close(bias, expected_bias, dtype, g.out_pixels, "bias")

    def test_gradients_through_pool(self, case: str, dtype: torch.dtype) -> None:
        g = geometry_of(case)
        x = positive(g.input_shape, dtype)
        for pool in pools_of(g):
            _, code = aten.max_pool2d(torch.randn(g.output_shape), pool, relu=True)
            grad = positive(pool.output_shape, dtype)
            weight, bias = native_first._weight_grad(grad, code, x, g, with_bias=True)
            expected, expected_bias = exact_gradients(grad, code, x, g, pool)
            assert bias is not None
            assert_close(weight, expected, dtype, g.out_pixels, "weight")
            assert_close(bias, expected_bias, dtype, g.out_pixels, "bias")


def kinds(values: Tensor) -> Tensor:
    """0 for what is finite, else which of NaN and the two infinities it is."""
    return values.isnan() * 3 + values.isposinf() * 2 + values.isneginf()


def spoiled(tensor: Tensor, share: float = 0.002) -> Tensor:
    tensor = tensor.clone(memory_format=torch.preserve_format)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=tensor.dtype)
    at = torch.rand(tensor.shape) < share
    at.view(-1)[0] = True
    tensor[at] = bad[torch.randint(0, 3, (int(at.sum()),))]
    return tensor


def direct(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """The convolution by its definition in float64: what lies outside the map is no term of a sum."""
    output = torch.zeros(g.output_shape, dtype=torch.float64)
    for kh, kw, seen, reached in taps(g):
        terms = x[seen].double()[:, None] * weight[None, :, :, kh, kw, None, None].double()
        output[reached] += terms.sum(2)
    return output


def taps(g: ConvGeometry) -> Iterator[tuple[int, int, tuple[Any, ...], tuple[Any, ...]]]:
    """Taps, the pixels of the map that each reads, and those of the output that it reads them for."""

    def reach(tap: int, stride: int, padding: int, size: int, outputs: int) -> tuple[slice, slice]:
        reached = [at for at in range(outputs) if 0 <= at * stride + tap - padding < size]
        start, count = (reached[0], len(reached)) if reached else (0, 0)
        first = start * stride + tap - padding if reached else 0
        return slice(first, first + count * stride, stride), slice(start, start + count)

    for kh in range(g.kernel_height):
        for kw in range(g.kernel_width):
            h, row = reach(kh, g.stride_h, g.pad_h, g.height, g.out_height)
            w, column = reach(kw, g.stride_w, g.pad_w, g.width, g.out_width)
            yield kh, kw, (..., h, w), (..., row, column)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["grey", "strides and paddings", "more padding than map", "flat"])
class TestNotFinite:
    @pytest.mark.parametrize("where", ["x", "weight"])
    def test_forward(self, case: str, dtype: torch.dtype, where: str) -> None:
        """NaN and infinities lie where the definition has them, also where padding meets a weight that is not finite."""
        g = geometry_of(case)
        x, weight, bias = operands(g, dtype)
        x, weight = (spoiled(x), weight) if where == "x" else (x, spoiled(weight))
        output = native_first.conv2d(x, weight, bias, None, g, relu=False)
        expected = direct(x, weight, g)
        assert torch.equal(kinds(output), kinds(expected))
        assert not expected.isfinite().all()
        for pool in pools_of(g):
            pooled, code = native_first.conv2d_relu_max_pool2d(x, weight, bias, g, pool)
            winners, codes = aten.max_pool2d(output, pool, relu=True)
            torch.testing.assert_close(pooled, winners, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(code[~pooled.isfinite()], codes[~pooled.isfinite()])

    @pytest.mark.parametrize("where", ["x", "grad"])
    @pytest.mark.parametrize("gated", [False, True])
    def test_gradients(self, case: str, dtype: torch.dtype, where: str, gated: bool) -> None:
        g = geometry_of(case)
        x, grad, gate = random(g.input_shape, dtype), random(g.output_shape, dtype), random(g.output_shape, dtype)
        x, grad = (spoiled(x), grad) if where == "x" else (x, spoiled(grad))
        gate[-1, -1, -1, -1] = torch.nan  # which ReLU does not close
        weight, bias = native_first._weight_grad(grad, gate if gated else None, x, g, with_bias=True)
        before = (grad.masked_fill(gate <= 0, 0) if gated else grad).double()
        # The definition of a weight gradient is a convolution too: of the exchanged input by the exchanged gradient.
        expected = _direct_weight_grad(x, before, g)
        assert torch.equal(kinds(weight), kinds(expected))
        assert bias is not None and torch.equal(kinds(bias), kinds(before.sum((0, 2, 3))))


def _direct_weight_grad(x: Tensor, grad: Tensor, g: ConvGeometry) -> Tensor:
    weight = torch.zeros(g.weight_shape, dtype=torch.float64)
    for kh, kw, seen, reached in taps(g):
        terms = grad[reached][:, :, None] * x[seen].double()[:, None]
        weight[:, :, kh, kw] += terms.sum((0, 3, 4))
    return weight


def launches(dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor | None, ...]]]:
    g = ConvGeometry.of("test", (5, 3, 41, 37), (40, 3, 5, 5), None, (1, 1), (2, 2), (1, 1), 1)
    pool = PoolGeometry.of("test", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), True)
    x, weight, bias = operands(g, dtype)
    output = native_first.conv2d(x, weight, bias, None, g, relu=True)
    code = native_first.conv2d_relu_max_pool2d(x, weight, bias, g, pool)[1]
    grad, pooled = random(g.output_shape, dtype), random(pool.output_shape, dtype)
    return {
        "forward": lambda: (native_first.conv2d(x, weight, bias, None, g, relu=True),),
        "with pool": lambda: native_first.conv2d_relu_max_pool2d(x, weight, bias, g, pool),
        "gradients": lambda: native_first._weight_grad(grad, output, x, g, with_bias=True),
        "gradients through a pool": lambda: native_first._weight_grad(pooled, code, x, g, with_bias=True),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for name, launch in launches(dtype).items():
        results = []
        try:
            for count in (1, 2, 4, 4):
                torch.set_num_threads(count)
                results.append(launch())
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(
                a is not None and b is not None and torch.equal(a, b) for a, b in zip(results[0], other, strict=True)
            ), name


# With AVX-512 a machine runs the tests above by it.
@pytest.mark.parametrize("capability", [pytest.param("avx512", marks=pytest.mark.slow), "avx2", "default"])
def test_other_instruction_sets(capability: str) -> None:
    """The same tests again, on a process that is kept from this machine's best instructions."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    chosen = "(TestLaunchers or TestNotFinite) and (stem or wide or grey)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_kernels_refuse_what_does_not_fit() -> None:
    g = geometry_of("vgg")
    x, weight, bias = operands(g, torch.float32)
    y = torch.empty(g.output_shape, memory_format=CHANNELS_LAST)
    kernel = torch.ops.fastconv_native.first_conv2d
    size, ones = [g.out_height, g.out_width], [1, 1]
    with pytest.raises(RuntimeError, match="size must be that"):
        kernel(x, weight, bias, None, y, None, size, [2, 2], ones, True)
    with pytest.raises(RuntimeError, match="output has a wrong size"):
        kernel(x, weight, bias, None, y[:, :, 1:].contiguous(memory_format=CHANNELS_LAST), None, size, ones, ones, True)
    with pytest.raises(RuntimeError, match="one element"):
        kernel(x, weight, bias[1:], None, y, None, size, ones, ones, True)
    with pytest.raises(RuntimeError, match="channels of x and output"):
        kernel(x, weight[:, 1:].contiguous(memory_format=CHANNELS_LAST), bias, None, y, None, size, ones, ones, True)


def test_which_layers_are_first() -> None:
    def serves(x: tuple[int, ...], weight: tuple[int, ...], dilation: int = 1, groups: int = 1) -> bool:
        g = ConvGeometry.of("test", x, weight, None, (1, 1), (2, 2), (dilation, dilation), groups)
        return cpu.first_serves(g)

    assert serves((1, 3, 32, 32), (64, 3, 3, 3)) and serves((1, 4, 32, 32), (64, 4, 11, 11))
    assert not serves((1, 5, 32, 32), (64, 5, 3, 3)) and not serves((1, 3, 32, 32), (64, 3, 12, 3))
    assert not serves((1, 3, 32, 32), (64, 3, 3, 3), dilation=2) and not serves((1, 4, 32, 32), (64, 1, 3, 3), groups=4)


def test_first_layers_are_chosen_for_all_but_input_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)
    for dtype in DTYPES:
        for direction in ("forward", "weight_grad"):
            assert cpu.algorithms(direction, geometry_of("stem"), Policy(dtype))[0] == cpu.FIRST
        assert cpu.FIRST not in cpu.algorithms("input_grad", geometry_of("stem"), Policy(dtype))


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("fastconv."):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def layer(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if kind == "relu":
        return FC.conv2d_relu(x, weight, bias, 1, 1)
    if kind == "3x3 pool":
        return FC.conv2d_relu_max_pool2d(x, weight, bias, 1, 1, pool_kernel_size=3, pool_stride=2)
    return FC.conv2d_relu_max_pool2d(x, weight, bias, 1, 1, pool_ceil_mode=kind == "ceil")


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        pytest.param(layout, backend, id=f"{name}-{backend}", marks=[pytest.mark.slow] * interpreted)
        for name, layout in (("channels_last", CHANNELS_LAST), ("contiguous", torch.contiguous_format))
        for backend in ("auto", "native", "aten", "triton")
        for interpreted in (name == "contiguous" and backend == "triton",)
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["relu", "pool", "ceil", "3x3 pool"])
def test_gradient_is_that_of_the_composed_path(
    kind: str, with_bias: bool, backend: str, layout: torch.memory_format
) -> None:
    """The same gradients whether or not the input needs one too, up to the order of sums."""
    x = torch.randn(2, 3, 9, 11).to(memory_format=layout)
    weight = torch.randn(20, 3, 3, 3).to(memory_format=layout).requires_grad_()
    bias = torch.randn(20, requires_grad=True) if with_bias else None
    parameters = [weight] if bias is None else [weight, bias]
    pooling = "relu" if kind == "relu" else "max_pool2d"
    with fastconv.use_backend(backend), _Watch() as watch:
        y = layer(kind, x, weight, bias)
        grad = torch.randn_like(y)
        alone = torch.autograd.grad(y, parameters, grad)
        composed = torch.autograd.grad(layer(kind, x.clone().requires_grad_(), weight, bias), parameters, grad)
    op = "conv2d_relu_weight_grad" if kind == "relu" else "conv2d_relu_max_pool2d_weight_grad"
    assert [n for n in watch.names if "grad" in n or "backward" in n] == [op, f"{pooling}_backward", "conv2d_backward"]
    for a, c in zip(alone, composed, strict=True):
        assert a.stride() == c.stride()
        assert_close(a, c.double(), torch.float32, math.prod(grad.shape))
    if backend == "aten":
        assert all(map(torch.equal, alone, composed))


def test_residual_and_second_derivatives_take_the_composed_path() -> None:
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(8, 3, 3, 3, requires_grad=True)
    residual = torch.randn(2, 8, 6, 6, requires_grad=True)
    y = FC.conv2d_relu(x, weight, None, 1, 1)
    with _Watch() as watch:
        FC.conv2d_relu(x, weight, None, 1, 1, residual=residual).sum().backward()
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    assert "conv2d_relu_weight_grad" not in watch.names
    assert grad.requires_grad


@pytest.mark.parametrize("pooled", [True, False])
def test_chain(pooled: bool) -> None:
    """A chain's first layer behind a pool; without one its gradient comes masked from the layer above."""
    torch.manual_seed(1)
    net = nn.ConvChain(
        (nn.ConvReLUMaxPool2d(3, 8, 3, padding=1) if pooled else nn.ConvReLU2d(3, 8, 3, padding=1)),
        nn.ConvReLU2d(8, 4, 3, padding=1),
    ).to(memory_format=CHANNELS_LAST)
    x = random((2, 3, 12, 10), torch.float32)
    with _Watch() as watch:
        net(x).square().sum().backward()
    assert ("conv2d_relu_max_pool2d_weight_grad" in watch.names) == pooled
    grads = [p.grad for p in net.parameters()]
    net.zero_grad()
    with fastconv.use_backend("aten"):
        net(x.clone().requires_grad_()).square().sum().backward()
    for grad, parameter in zip(grads, net.parameters(), strict=True):
        assert grad is not None and parameter.grad is not None
        assert_close(grad, parameter.grad.double(), torch.float32, 2 * 12 * 10 * 8)
