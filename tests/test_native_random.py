"""The native launchers on geometries that nobody chose, with guard bands around every operand, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from guards import guarded, transforming
from tolerances import assert_close, bounds
from torch import Tensor

from fastconv.backends import aten, native
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("compiled"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-3
MOST_PRODUCTS = 2e7
WIDE = Policy(torch.float64)
# The same examples in every run: derived from the test, not from what an earlier run found.
random_shapes = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    print_blob=False,
)

Pair = tuple[int, int]


@pytest.fixture(autouse=True, scope="module")
def _transforms_in_one_thread() -> Iterator[None]:
    """Maps of this size are not worth more, and threads that wait for each other make hundreds of calls slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with transforming():
        yield
    torch.set_num_threads(before)


pairs: Callable[..., st.SearchStrategy[Pair]] = lambda *values: st.one_of(  # noqa: E731
    st.sampled_from(values).map(lambda value: (value, value)), st.tuples(st.sampled_from(values), st.sampled_from(values))
)
channel_counts = st.one_of(st.integers(1, 70), st.sampled_from((3, 8, 16, 32, 48, 64)))


class Case(NamedTuple):
    """A convolution to try; `seed` is of its data."""

    g: ConvGeometry
    policy: Policy
    bias: bool
    residual: bool
    relu: bool
    nan: bool
    seed: int

    @property
    def products(self) -> int:
        return self.g.taps * self.g.group_in_channels


policies = st.builds(Policy, st.sampled_from(DTYPES), direct=st.booleans())
seeds = st.integers(0, 2**32 - 1)
rarely = st.integers(0, 7).map(lambda value: value == 7)


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Half of them are the 3×3 that a transform may serve."""
    plain = draw(st.booleans())
    kernel = (3, 3) if plain else draw(pairs(1, 2, 3, 4, 5, 7))
    stride = (1, 1) if plain else draw(pairs(1, 2, 3))
    dilation = (1, 1) if plain else draw(pairs(1, 1, 2))
    padding = draw(pairs(1, 0, 2) if plain else pairs(0, 1, 2, 3))
    groups = 1 if plain else draw(st.sampled_from((1, 1, 2, 3, 0)))
    inputs, outputs = draw(channel_counts), draw(channel_counts)
    if groups == 0:  # depthwise, with one or two filters a channel
        groups, outputs = inputs, inputs * draw(st.integers(1, 2))
    inputs, outputs = (-(-channels // groups) * groups for channels in (inputs, outputs))
    span = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    size = [draw(st.integers(max(1, span[i] - 2 * padding[i]), 21)) for i in (0, 1)]
    shape, weight = (draw(st.integers(0, 3)), inputs, *size), (outputs, inputs // groups, *kernel)
    g = ConvGeometry.of("random", shape, weight, None, stride, padding, dilation, groups)
    hypothesis.assume(g.out_pixels * g.out_channels * g.taps * g.group_in_channels <= MOST_PRODUCTS)
    return Case(g, draw(policies), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), draw(rarely), draw(seeds))


@st.composite
def windows(draw: st.DrawFn, dilations: tuple[int, ...], shape: tuple[int, ...] | None = None) -> PoolGeometry:
    kernel = draw(pairs(2, 3, 1, 4, 5))
    stride, dilation, ceil_mode = draw(pairs(2, 1, 3)), draw(pairs(*dilations)), draw(st.booleans())
    padding = tuple(draw(st.integers(0, side // 2)) for side in kernel)
    shape = shape or (draw(st.integers(0, 3)), draw(channel_counts), *(draw(st.integers(1, 21)) for _ in "hw"))
    try:
        return PoolGeometry.of("random", shape, kernel, stride, padding, dilation, ceil_mode)
    except RuntimeError:  # no window fits
        hypothesis.reject()


def normal(shape: tuple[int, ...], dtype: torch.dtype, nan: bool = False) -> Tensor:
    values = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    if nan and values.numel() > 0:
        for _ in range(2):
            values[tuple(int(torch.randint(side, ())) for side in shape)] = torch.nan
    return values


def double(*tensors: Any) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) else t for t in tensors]


def close(actual: Tensor, expected: Tensor, policy: Policy, reduction: int, what: str, scale: float | None = None) -> None:
    """As assert_close, for sums of `reduction` products of standard normal numbers, at most; of NaN each must be kept.

    A transform may spread a NaN over its tile and, where it is one of many that are summed, over its channels.
    """
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    if not policy.direct and expected.isnan().any():
        assert actual.isnan()[expected.isnan()].all(), f"{what}: a NaN is lost"
        expected = expected.masked_fill(actual.isnan(), torch.nan)
    scale = math.sqrt(reduction) if scale is None else scale
    tf32 = policy.tf32 and policy.dtype == torch.float32  # which CPU kernels do not round to
    assert_close(actual, expected, policy.dtype, reduction, what, tf32, scale, transformed=not policy.direct)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(case.seed)
    bias = torch.randn(case.g.out_channels).to(case.policy.dtype) if case.bias else None
    return normal(case.g.input_shape, case.policy.dtype, case.nan), normal(case.g.weight_shape, case.policy.dtype), bias


@random_shapes
@hypothesis.given(convolutions())
def test_conv2d(case: Case) -> None:
    x, weight, bias = operands(case)
    residual = normal(case.g.output_shape, case.policy.dtype, case.nan) if case.residual else None
    with guarded():
        output = native.conv2d(x, weight, bias, residual, case.g, case.policy, case.relu)
    expected = aten.conv2d(*double(x, weight, bias, residual), case.g, WIDE, case.relu)
    close(output, expected, case.policy, case.products, "output")


@random_shapes
@hypothesis.given(convolutions(), st.data())
def test_conv2d_relu_max_pool2d(case: Case, data: st.DataObject) -> None:
    shape = case.g.output_shape
    two = PoolGeometry.of("random", shape, (2, 2), (2, 2), (0, 0), (1, 1), False) if min(shape[2:]) >= 2 else None
    pool = two if two is not None and data.draw(st.booleans()) else data.draw(windows((1, 1, 2), shape))
    case = case._replace(nan=False)  # which a transform spreads over windows, so that no winner can be told
    x, weight, bias = operands(case)
    with guarded():
        output, code = native.conv2d_relu_max_pool2d(x, weight, bias, case.g, pool, case.policy)
    unpooled = aten.conv2d(*double(x, weight, bias, None), case.g, WIDE, False)
    expected, _ = aten.max_pool2d(unpooled, pool, relu=True)
    close(output, expected, case.policy, case.products, "pooled")
    assert output.numel() == 0 or int(code.max()) <= pool.positions
    assert torch.equal(code == 0, output == 0), "a window is closed where, and only where, its output is 0"
    named = unpooled.flatten(2).gather(2, aten.code_to_indices(code, pool).flatten(2)).view_as(expected)
    named = named.masked_fill(code == 0, 0)
    close(named.to(case.policy.dtype), expected, case.policy, case.products, "what the codes name")


@random_shapes
@hypothesis.given(convolutions())
def test_conv2d_gradients(case: Case) -> None:
    g, policy = case.g, case.policy
    x, weight, _ = operands(case)
    # The weight's gradient: a NaN of the output's times the zeros of padding is one only where kernels do not skip them.
    grad, with_nan = normal(g.output_shape, policy.dtype), normal(g.output_shape, policy.dtype, case.nan)
    with guarded():
        input_grad = native.conv2d_input_grad(with_nan, weight, g, policy)
        weight_grad = native.conv2d_weight_grad(grad, x, g, policy)
        both = native.conv2d_backward(grad, x, weight, g, policy)
    input_products, weight_products = g.taps * g.group_out_channels, max(g.out_pixels, 1)
    for got, of in ((input_grad, with_nan), (both[0], grad)):
        expected = aten.conv2d_input_grad(*double(of, weight), g, WIDE)
        close(got, expected, policy, input_products, "input gradient")
    expected_weight = aten.conv2d_weight_grad(*double(grad, x), g, WIDE)
    for got in (weight_grad, both[1]):
        close(got, expected_weight, policy, weight_products, "weight gradient")


@random_shapes
@hypothesis.given(convolutions())
def test_conv2d_gradients_under_a_relu(case: Case) -> None:
    """Of the layer below, whose output is x: what it closed is exactly 0, and the bias's gradient sums what is left."""
    g, policy = case.g, case.policy
    x, weight, _ = operands(case._replace(nan=False))
    x = x.relu_()
    grad = normal(g.output_shape, policy.dtype)
    with guarded():
        masked, bias = native.conv2d_input_grad_relu(grad, weight, x, g, policy, case.bias)
        again, weight_grad, bias_again = native.conv2d_backward_relu(grad, x, weight, g, policy, case.bias)
    products = g.taps * g.group_out_channels
    expected, _ = aten.conv2d_input_grad_relu(*double(grad, weight, x), g, WIDE, False)
    for got, sums in ((masked, bias), (again, bias_again)):
        close(got, expected, policy, products, "masked input gradient")
        assert (got[x == 0] == 0).all()
        assert (sums is not None) == case.bias
        if sums is not None:  # of many terms of either sign
            pixels = max(g.batch * g.height * g.width, 1)
            close(sums, got.double().sum((0, 2, 3)), policy, pixels, "bias gradient", scale=math.sqrt(pixels * products))
    expected = aten.conv2d_weight_grad(*double(grad, x), g, WIDE)
    close(weight_grad, expected, policy, max(g.out_pixels, 1), "weight gradient")


@random_shapes
@hypothesis.given(windows((1, 1, 2, 3)), st.sampled_from(DTYPES), st.booleans(), rarely, seeds)
def test_max_pool2d(pool: PoolGeometry, dtype: torch.dtype, relu: bool, nan: bool, seed: int) -> None:
    """Values and codes to the bit, with ties."""
    torch.manual_seed(seed)
    for x in (normal(pool.input_shape, dtype, nan), normal(pool.input_shape, dtype, nan).round()):
        with guarded():
            output, code = native.max_pool2d(x, pool, relu)
            grad = normal(pool.output_shape, dtype, nan)
            input_grad, bias = native.max_pool2d_backward(grad, code, pool, with_bias=True)
        expected, expected_code = aten.max_pool2d(x.double(), pool, relu)
        assert_same(output, expected)
        assert_same(code, expected_code)
        expected, expected_bias = aten.max_pool2d_backward(grad.double(), code, pool, True)
        exactly = Policy(dtype, direct=True)
        close(input_grad, expected, exactly, pool.positions, "input gradient")
        close(bias, expected_bias, exactly, max(pool.batch * pool.out_height * pool.out_width, 1), "bias gradient")


@random_shapes
@hypothesis.given(windows((1,)), st.sampled_from(DTYPES), st.booleans(), st.sampled_from((None, 1, 7)), rarely, seeds)
def test_avg_pool2d(
    pool: PoolGeometry, dtype: torch.dtype, count_padding: bool, divisor: int | None, nan: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, grad = normal(pool.input_shape, dtype, nan), normal(pool.output_shape, dtype, nan)
    with guarded():
        output = native.avg_pool2d(x, pool, count_padding, divisor)
        input_grad = native.avg_pool2d_backward(grad, pool, count_padding, divisor)
    scale = math.sqrt(pool.positions) / (divisor or 1)
    exactly = Policy(dtype, direct=True)
    expected = aten.avg_pool2d(x.double(), pool, count_padding, divisor)
    close(output, expected, exactly, pool.positions, "output", scale)
    expected = aten.avg_pool2d_backward(grad.double(), pool, count_padding, divisor)
    close(input_grad, expected, exactly, pool.positions, "input gradient", scale)


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, int, int, int]:
    return (draw(st.integers(0, 3)), draw(channel_counts), draw(st.integers(1, 21)), draw(st.integers(1, 21)))


@random_shapes
@hypothesis.given(maps(), st.sampled_from(DTYPES), st.booleans(), rarely, seeds)
def test_passes_over_a_map(
    shape: tuple[int, int, int, int], dtype: torch.dtype, with_bias: bool, nan: bool, seed: int
) -> None:
    """Global average pool, ReLU's backward and the bias's gradient."""
    torch.manual_seed(seed)
    x, grad, small = normal(shape, dtype, nan), normal(shape, dtype, nan), normal((*shape[:2], 1, 1), dtype, nan)
    with guarded():
        mean = native.global_avg_pool2d(x)
        spread = native.global_avg_pool2d_backward(small, *shape[2:])
        masked, sums = native.relu_backward(grad, x, with_bias)
        bias = native.bias_grad(grad)
    exactly, area = Policy(dtype, direct=True), shape[2] * shape[3]
    pixels = max(shape[0] * area, 1)
    close(mean, aten.global_avg_pool2d(x.double()), exactly, area, "mean", scale=1 / math.sqrt(area))
    expected = aten.global_avg_pool2d_backward(small.double(), *shape[2:])
    close(spread, expected, exactly, 1, "spread", scale=1 / area)
    expected, expected_sums = aten.relu_backward(grad.double(), x.double(), with_bias)
    assert_same(masked, expected)
    assert (sums is not None) == with_bias
    if sums is not None:
        close(sums, expected_sums, exactly, pixels, "bias gradient of ReLU")
    close(bias, aten.bias_grad(grad.double()), exactly, pixels, "bias gradient")


@random_shapes
@hypothesis.given(maps(), st.sampled_from(DTYPES), st.tuples(*[st.booleans()] * 4), rarely, seeds, st.data())
def test_batch_norm_relu(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    settings: tuple[bool, bool, bool, bool],
    nan: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    training, affine, with_residual, pooled = settings
    pool = data.draw(windows((1,), shape)) if pooled else None
    count = shape[0] * shape[2] * shape[3]
    hypothesis.assume(count > int(training))  # empty maps are left to torch
    torch.manual_seed(seed)
    x, residual = normal(shape, dtype, nan), normal(shape, dtype) if with_residual else None
    mean, var, weight, bias = torch.randn(4, shape[1]).unbind()
    weight, bias = (weight, bias) if affine else (None, None)
    given = None if training else (mean, var.abs() + 0.5)
    statistics64 = given and tuple(t.double() for t in given)
    wide = (x.double(), statistics64, *double(weight, bias, residual), EPS)
    unpooled, statistics = aten.batch_norm(*wide)
    with guarded():
        if pool is None:
            output, found = native.batch_norm_relu(x, given, weight, bias, residual, EPS)
            gate = output
        else:
            output, gate, found = native.batch_norm_relu_max_pool2d(x, given, weight, bias, residual, EPS, pool)
        grad = normal(tuple(output.shape), dtype, nan)
        arguments = (EPS, training, pool, True, with_residual)
        grads = native.batch_norm_relu_backward(grad, gate, x, found, weight, *arguments)
    expected = unpooled.relu() if pool is None else aten.max_pool2d(unpooled, pool, relu=True)[0]
    exactly, count = Policy(dtype, direct=True), max(count, 1)
    close(output, expected, exactly, count, "output", scale=4)
    for got, want in zip(found, statistics, strict=True):
        close(got, want, Policy(torch.float32, direct=True), count, "statistics", scale=1)
    wide_gate = gate if pool is not None else gate.double()
    wide_found = tuple(t.double() for t in found)
    wide_weight = None if weight is None else weight.double()
    expected_grads = aten.batch_norm_relu_backward(grad.double(), wide_gate, x.double(), wide_found, wide_weight, *arguments)
    positions = 1 if pool is None else pool.positions
    scale = 4 * float((wide_found[1] + EPS).rsqrt().nan_to_num(0).max()) * math.sqrt(positions)
    close(grads[0], expected_grads[0], exactly, count * positions, "input gradient", scale=scale)
    # Their terms are gradients of the unpooled map, which overlapping windows round once more to its dtype.
    sums, expected = grads[1].to(dtype), expected_grads[1]
    close(sums, expected, exactly, count * positions, "sums", scale=4 * math.sqrt(count * positions))
    assert (grads[2] is not None) == with_residual
    if with_residual:
        close(grads[2], expected_grads[2], exactly, positions, "residual gradient")


@pytest.mark.cpu_kernels
def test_the_bounds_tell_a_wrong_element() -> None:
    """What `close` lets pass is small against what it measures by."""
    for dtype in DTYPES:
        assert max(bounds(dtype, 70 * 49)[:2]) < 0.02
