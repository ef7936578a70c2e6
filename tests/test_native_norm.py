"""The compiled kernels of batch normalisation, those of CUDA run on a CPU, against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fastconv import geometry, tuning
from fastconv.backends import aten, native, native_norm
from fastconv.geometry import PoolGeometry
from fastconv.precision import Policy

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("compiled"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-3
# Channels: one, less than a vector, odd, a whole number of vectors, more than the rows that are made of several pixels.
# Sizes: a row that is not whole, a map of one row, maps with odd sides, several chunks, several runs of a sum.
SHAPES = {
    "one channel": (3, 1, 7, 5),
    "three": (2, 3, 9, 8),
    "67": (2, 67, 7, 6),
    "512": (2, 512, 3, 4),
    "one row": (2, 40, 1, 9),
    "one value": (9, 5, 1, 1),
    "chunks": (1, 3, 130, 151),
    "wide chunks": (2, 130, 15, 20),
}
POOLS = {
    "2/2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "2/2 ceil": ((2, 2), (2, 2), (0, 0), (1, 1), True),
    "3/2/1": ((3, 3), (2, 2), (1, 1), (1, 1), False),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pools = pytest.mark.parametrize("pool_name", POOLS)

Shape = tuple[int, int, int, int]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def channels(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, var, weight, bias)."""
    mean, var, weight, bias = torch.randn(4, shape[1]).unbind()
    return mean, var.abs() + 0.5, weight, bias


def double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def pool_of(name: str, shape: Shape) -> PoolGeometry | None:
    kernel, stride, padding, dilation, ceil_mode = POOLS[name]
    if min(shape[2:]) < 2:
        return None
    return PoolGeometry.of("pool", shape, kernel, stride, padding, dilation, ceil_mode)


def values(shape: Shape) -> int:
    return shape[0] * shape[2] * shape[3]


@shapes
@dtypes
def test_statistics(shape: Shape, dtype: torch.dtype, compiled: str) -> None:
    """Means of a thousand deviations and none: sums of distances to a value nearby lose nothing to them.

    On a CPU they are float64 sums.
    """
    reduction = 1 if compiled == "cpu" else values(shape)
    for offset in (0, 1000):
        x = (random(shape, torch.float32) + offset).to(dtype)
        mean, var = native_norm._batch_statistics(x)
        var64, mean64 = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        assert_close(mean, mean64, torch.float32, reduction, "mean", scale=1 + offset)
        assert_close(var, var64, torch.float32, reduction, "variance", scale=1)


def test_statistics_of_a_far_first_value() -> None:
    """Distances are measured from the first values: those may lie anywhere.

    Of eight values one that is far leaves their mean an eighth as far. The variance is then what is left of squares 64 times
    its size, and of squares 4,000 times its size if distances were measured from the far value: errors tell these apart.
    """
    x = random((4, 8, 32, 32), torch.float32)
    x[0, :, 0, 0] = 1e3
    mean, var = native_norm._batch_statistics(x)
    var64, mean64 = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    size, count = x.square().mean().sqrt().item(), values((4, 8, 32, 32))
    assert_close(mean, mean64, torch.float32, count, "mean", scale=size)
    assert_close(var, var64, torch.float32, count, "variance", scale=8 * size**2)


@dtypes
def test_statistics_with_nan_and_infinity(dtype: torch.dtype) -> None:
    """Channels with NaN and infinities, at the first value and elsewhere, have torch's statistics; others are untouched."""
    x = random((3, 8, 30, 29), dtype)
    x[0, 0, 0, 0] = x[2, 1, 3, 4] = torch.nan
    x[0, 2, 0, 0] = x[1, 3, 7, 0] = torch.inf
    x[0, 4, 0, 0] = x[1, 5, 7, 0] = -torch.inf
    mean, var = native_norm._batch_statistics(x)
    expected = x.double().mean((0, 2, 3))
    assert_close(mean, expected, torch.float32, values((3, 8, 30, 29)), "mean", scale=1)
    assert var[:6].isnan().all() and var[6:].isfinite().all()
    output, _ = native.batch_norm_relu(x, None, None, None, None, EPS)
    assert output[:, :6].isnan().all() and output[:, 6:].isfinite().all()


@pytest.mark.parametrize("settings", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@shapes
@dtypes
class TestForward:
    def test_map(self, shape: Shape, dtype: torch.dtype, settings: tuple[bool, bool, bool]) -> None:
        operands = self.operands(shape, dtype, settings)
        output, statistics = native.batch_norm_relu(*operands)
        expected, expected_statistics = aten.batch_norm_relu(*double(operands))
        assert_close(output, expected, dtype, values(shape), "output", scale=4)
        assert output.is_contiguous(memory_format=torch.channels_last)
        for got, want in zip(statistics, expected_statistics, strict=True):
            assert_close(got, want, got.dtype, values(shape), "statistics", scale=1)

    @pools
    def test_pool(self, shape: Shape, dtype: torch.dtype, settings: tuple[bool, bool, bool], pool_name: str) -> None:
        pool = pool_of(pool_name, shape)
        if pool is None:
            pytest.skip("no window fits")
        if dtype != torch.float32 and not pool.is_2x2:
            pytest.skip("two kernels that are tested alone")
        operands = self.operands(shape, dtype, settings)
        output, code, _ = native.batch_norm_relu_max_pool2d(*operands, pool)
        expected, _, _ = aten.batch_norm_relu_max_pool2d(*double(operands), pool)
        assert_close(output, expected, dtype, values(shape), "output", scale=4)
        unpooled, _ = aten.batch_norm(*double(operands))
        named = unpooled.flatten(2).gather(2, aten.code_to_indices(code, pool).flatten(2)).view_as(expected)
        named.masked_fill_(code == 0, 0)
        assert_close(named.to(dtype), expected, dtype, values(shape), "what the codes name", scale=4)
        assert code.dtype == pool.code_dtype and code.max() <= pool.positions

    @staticmethod
    def operands(shape: Shape, dtype: torch.dtype, settings: tuple[bool, bool, bool]) -> tuple[Any, ...]:
        training, affine, with_residual = settings
        mean, var, weight, bias = channels(shape)
        residual = random(shape, dtype).contiguous() if with_residual else None
        statistics = None if training else (mean.to(dtype), var)
        return random(shape, dtype), statistics, *((weight, bias.to(dtype)) if affine else (None, None)), residual, EPS


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("pool_name", ["map", *POOLS])
@shapes
@dtypes
def test_backward(shape: Shape, dtype: torch.dtype, pool_name: str, training: bool, wanted: tuple[bool, bool]) -> None:
    pool = None if pool_name == "map" else pool_of(pool_name, shape)
    if pool is None and pool_name != "map":
        pytest.skip("no window fits")
    if dtype != torch.float32 and (wanted != (True, True) or (pool is not None and not pool.is_2x2)):
        pytest.skip("what is wanted, and what other poolings write, does not depend on the dtype")
    x = random(shape, dtype)
    if pool is None:
        grad, gate = random(shape, dtype), random(shape, dtype)
    else:
        grad, gate = random(pool.output_shape, dtype), native.max_pool2d(random(shape, dtype), pool, relu=True)[1]
    mean, var, weight, _ = channels(shape)
    if training:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    for given in (x, None) if not (training and wanted[0]) else (x,):
        for scale in (weight.to(dtype), None):
            operands = (grad, gate, given, (mean, var), scale, EPS, training, pool, *wanted)
            got = native.batch_norm_relu_backward(*operands)
            want = aten.batch_norm_relu_backward(*double(operands))
            slope = ((1 if scale is None else scale.abs()) / (var + EPS).sqrt()).max().item()
            digits = 1 + (mean.abs() / (var + EPS).sqrt()).max().item()
            shares = 1 if pool is None or not pool.is_overlapping else pool.positions
            measures = (
                ("input", dtype, slope * digits),
                ("sums", torch.float32, digits * values(shape) ** 0.5),
                ("residual", dtype, 1),
            )
            for actual, expected, (name, kind, size) in zip(got, want, measures, strict=True):
                assert (actual is None) == (expected is None), name
                if actual is None:
                    continue
                if name == "sums" and shares > 1 and dtype != torch.float32:
                    kind, actual = dtype, actual.to(dtype)  # an un-pooled map of overlapping windows is rounded
                assert_close(actual, expected, kind, 2 * values(shape), name, scale=size)
                assert actual.dim() == 2 or actual.is_contiguous(memory_format=torch.channels_last)


@dtypes
def test_exact_with_nan_and_infinity(dtype: torch.dtype) -> None:
    """Numbers that need no rounding, by constant statistics: values, codes and gradients to the bit."""
    shape = (2, 41, 7, 8)
    x, residual = (torch.randint(-4, 5, shape).to(dtype) for _ in range(2))
    for value in (float("nan"), float("inf"), float("-inf")):
        x[torch.rand(shape) < 0.05] = value
    x[..., :4, :4] = float("-inf")
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    statistics = torch.ones(41), torch.full((41,), 4.0)
    weight = torch.tensor([1.0, -2, 0.5, 4, 2, -1, 1, 2, 2]).repeat(5)[:41]
    operands = (x, statistics, weight, -weight, residual, 0.0)
    output, _ = native.batch_norm_relu(*operands)
    expected, _ = aten.batch_norm_relu(*double(operands))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0, equal_nan=True)
    for name in POOLS:
        pool = pool_of(name, shape)
        assert pool is not None
        pooled, code, _ = native.batch_norm_relu_max_pool2d(*operands, pool)
        expected_pooled, expected_code, _ = aten.batch_norm_relu_max_pool2d(*double(operands), pool)
        torch.testing.assert_close(pooled.double(), expected_pooled, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(code, expected_code)
        for gate, window in ((output, None), (code, pool)):
            grad = torch.randint(-4, 5, gate.shape).to(dtype).contiguous(memory_format=torch.channels_last)
            saved = (grad, gate, None, statistics, weight, 0.0, False, window, True, True)
            got, want = native.batch_norm_relu_backward(*saved), aten.batch_norm_relu_backward(*double(saved))
            for actual, oracle in zip(got, want, strict=True):
                assert actual is oracle or torch.equal(actual.double(), oracle)


@pytest.mark.parametrize("pool_name", ["map", "2/2"])
@dtypes
def test_backward_of_nan(dtype: torch.dtype, pool_name: str) -> None:
    """A NaN in a map of constant statistics reaches the weight's gradient of its channel, through a closed element too."""
    shape = (2, 19, 6, 6)
    pool = None if pool_name == "map" else pool_of(pool_name, shape)
    x = random(shape, dtype)
    x[1, 3, 2, 5] = x[0, 17, 0, 0] = torch.nan
    mean, var, weight, _ = channels(shape)
    out_shape = shape if pool is None else pool.output_shape
    gate = torch.zeros(out_shape, dtype=dtype if pool is None else torch.uint8)
    for training in (True, False):
        saved = (random(out_shape, dtype), gate, x, (mean, var), weight, EPS, training, pool, True, False)
        got, want = native.batch_norm_relu_backward(*saved), aten.batch_norm_relu_backward(*double(saved))
        for actual, expected in zip(got[:2], want[:2], strict=True):
            assert actual is not None and expected is not None
            assert torch.equal(actual.isnan(), expected.isnan())


@dtypes
@pytest.mark.parametrize("count", [1, 40, 200])
def test_update(count: int, dtype: torch.dtype) -> None:
    mean, var = torch.randn(count), torch.rand(count)
    mean[0] = float("nan")
    running = torch.randn(count, 2).to(dtype)
    for momentum in (0.0, 0.1, 1.0):
        for running_mean, running_var in (running.clone().unbind(1), running.t().contiguous().unbind(0)):
            wide_mean, wide_var = running_mean.double(), running_var.double()
            native.batch_norm_update(running_mean, running_var, mean, var, 7, momentum)
            aten.batch_norm_update(wide_mean, wide_var, mean.double(), var.double(), 7, momentum)
            assert_close(running_mean, wide_mean, dtype, 1, "running_mean")
            assert_close(running_var, wide_var, dtype, 1, "running_var")


def test_kernels_refuse_other_operands() -> None:
    """What a kernel would read or write out of bounds is an error, whoever hands it over."""
    kernels = torch.ops.fastconv_native
    x, ones, sums = random((2, 4, 6, 6), torch.float32), torch.ones(4), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="mean must hold one float32 value for each channel"):
        kernels.batch_norm_statistics(x, ones[:3], ones)
    with pytest.raises(RuntimeError, match="weight must have one value for each channel"):
        kernels.batch_norm_relu(x, ones, ones, ones[:3], None, None, EPS, True, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="residual must be dense in channels_last"):
        kernels.batch_norm_relu(x, ones, ones, None, None, x.contiguous(), EPS, True, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="half the sides"):
        kernels.batch_norm_relu_max_pool2d(x, ones, ones, None, None, None, EPS, x, x)
    with pytest.raises(RuntimeError, match="x is needed"):
        kernels.batch_norm_relu_backward(x, x, None, ones, ones, None, EPS, True, None, torch.empty_like(x), None)
    with pytest.raises(RuntimeError, match="sums must hold two float32 values"):
        kernels.batch_norm_relu_backward(x, x, x, ones, ones, None, EPS, True, sums[:1], None, None)
    with pytest.raises(RuntimeError, match="sums are written where x is given"):
        kernels.batch_norm_relu_backward(x, x, x, ones, ones, None, EPS, True, None, None, None)


@pytest.mark.cpu_kernels
def test_float16_is_left_to_torch_where_no_pool_follows() -> None:
    g = geometry.single_elements("test", (8, 64, 56, 56))
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            for op in ("batch_norm_relu", "batch_norm_relu_max_pool2d"):
                first = tuning.candidates(op, direction, g, Policy(dtype), "cpu", channels_last=True)[0]
                left = dtype == torch.float16 and op == "batch_norm_relu"
                assert first.backend == ("aten" if left else "native"), (op, direction, dtype)
