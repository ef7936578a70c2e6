"""The compiled kernels, those of CUDA run on a CPU, launcher by launcher against plain torch in float64, on random data."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, native, native_library, native_norm
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("compiled"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS_LAST = torch.channels_last

# input, weight, stride, padding, dilation, groups
CONVS = {
    "3x3": ((2, 16, 9, 7), (24, 16, 3, 3), 1, 1, 1, 1),
    "1x1": ((2, 64, 6, 6), (32, 64, 1, 1), 1, 0, 1, 1),
    "stem": ((2, 3, 19, 17), (8, 3, 7, 7), 2, 3, 1, 1),
    "stride 2x1": ((2, 5, 8, 9), (7, 5, 3, 3), (2, 1), 1, 1, 1),
    "dilated": ((1, 8, 11, 10), (8, 8, 3, 3), 1, 2, 2, 1),
    "grouped": ((2, 12, 7, 7), (18, 4, 3, 3), 1, 1, 1, 3),
    "depthwise": ((2, 9, 8, 8), (9, 1, 3, 3), 1, 1, 1, 9),
    "one channel": ((1, 1, 5, 5), (1, 1, 3, 3), 1, 1, 1, 1),
    "wide": ((2, 130, 4, 4), (515, 130, 1, 1), 1, 0, 1, 1),
}

# kernel, stride, padding, dilation, ceil_mode
POOLS = {
    "2/2": (2, 2, 0, 1, False),
    "2/2 ceil": (2, 2, 0, 1, True),
    "2/1": (2, 1, 0, 1, False),
    "3/2/1": (3, 2, 1, 1, False),
    "3/2 ceil": (3, 2, 0, 1, True),
    "5/3/2": (5, 3, 2, 1, False),
    "2/3": (2, 3, 0, 1, False),
    "2/3/1 ceil": (2, 3, 1, 1, True),
    "dilation 2": (3, 2, 1, 2, False),
    "dilated, apart": (2, 4, 1, 2, False),
    "3x2/2x3/1x0": ((3, 2), (2, 3), (1, 0), 1, False),
    "16x16": (16, 7, 8, 1, False),
}
MAPS = ((2, 67, 14, 13), (3, 5, 11, 12), (1, 1, 9, 9))


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def conv_of(case: str) -> ConvGeometry:
    x, weight, stride, padding, dilation, groups = CONVS[case]
    return ConvGeometry.of("test", x, weight, None, pair(stride), pair(padding), pair(dilation), groups)


def pool_of(case: str, shape: tuple[int, ...]) -> PoolGeometry:
    kernel, stride, padding, dilation, ceil_mode = POOLS[case]
    return PoolGeometry.of("test", shape, pair(kernel), pair(stride), pair(padding), pair(dilation), ceil_mode)


def random(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = CHANNELS_LAST) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def positive(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = CHANNELS_LAST) -> Tensor:
    """Data whose sums cannot cancel: a single channel's sum must not lie near zero, where no relative bound holds."""
    return torch.rand(shape).to(dtype).contiguous(memory_format=layout)


def pixels(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[2] * shape[3]


def few_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Data with ties, zeros of both signs, infinities and NaN, so that every rule of the winner is met."""
    values = torch.tensor([-torch.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, torch.inf, torch.nan], dtype=dtype)
    chosen = torch.randint(0, len(values) - 2, shape)
    rare = torch.rand(shape)
    chosen[rare < 0.04], chosen[rare < 0.02] = len(values) - 2, len(values) - 1
    return values[chosen].contiguous(memory_format=CHANNELS_LAST)


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_dense(*tensors: Tensor | None) -> None:
    assert all(t is None or t.dim() == 1 or t.is_contiguous(memory_format=CHANNELS_LAST) for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVS)
class TestConvolution:
    @pytest.mark.parametrize(
        "with_bias, with_residual, relu",
        [(False, False, True), (True, False, False), (True, False, True), (True, True, False), (True, True, True)],
    )
    def test_forward(self, case: str, dtype: torch.dtype, with_bias: bool, with_residual: bool, relu: bool) -> None:
        g = conv_of(case)
        x, weight = random(g.input_shape, dtype), random(g.weight_shape, dtype)
        bias = torch.randn(g.out_channels).to(dtype) if with_bias else None
        residual = random(g.output_shape, dtype, torch.contiguous_format) if with_residual else None
        actual = native.conv2d(x, weight, bias, residual, g, Policy(dtype), relu)
        wide = [t if t is None else t.double() for t in (x, weight, bias, residual)]
        expected = aten.conv2d(*wide, g, Policy(torch.float64), relu)
        assert_close(actual, expected, dtype, g.taps * g.group_in_channels, case)
        assert_dense(actual)

    def test_with_pool(self, case: str, dtype: torch.dtype) -> None:
        """Winners may be those of the float32 sums: where rounding makes neighbours equal, any of them may be named."""
        g = conv_of(case)
        pool = pool_of("2/2", g.output_shape)
        x, weight = random(g.input_shape, dtype), random(g.weight_shape, dtype)
        bias = torch.randn(g.out_channels).to(dtype)
        output, code = native.conv2d_relu_max_pool2d(x, weight, bias, g, pool, Policy(dtype))
        unpooled = aten.conv2d(x.double(), weight.double(), bias.double(), None, g, Policy(torch.float64), relu=False)
        expected, _ = aten.max_pool2d(unpooled, pool, relu=True)
        products = g.taps * g.group_in_channels
        assert_close(output, expected, dtype, products, case)
        assert torch.equal(code == 0, output == 0)
        named = unpooled.flatten(2).gather(2, aten.code_to_indices(code, pool).flatten(2)).view_as(expected)
        assert_close(named.masked_fill(code == 0, 0).to(dtype), expected, dtype, products, f"{case}: what the codes name")
        assert_dense(output, code)

    def test_gradients(self, case: str, dtype: torch.dtype) -> None:
        g = conv_of(case)
        x, weight, grad = random(g.input_shape, dtype), random(g.weight_shape, dtype), random(g.output_shape, dtype)
        wide = Policy(torch.float64)
        input_grad = native.conv2d_input_grad(grad, weight, g, Policy(dtype))
        expected = aten.conv2d_input_grad(grad.double(), weight.double(), g, wide)
        assert_close(input_grad, expected, dtype, g.taps * g.group_out_channels, f"{case}: input gradient")
        weight_grad = native.conv2d_weight_grad(grad, x, g, Policy(dtype))
        expected = aten.conv2d_weight_grad(grad.double(), x.double(), g, wide)
        assert_close(weight_grad, expected, dtype, g.out_pixels, f"{case}: weight gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 41), (2, 5, 7, 3), (1, 1, 9, 9), (3, 64, 20, 20), (2, 512, 4, 4), (1, 1030, 3, 5)], ids=str
)
class TestReLUBackward:
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_relu(self, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
        grad, output = positive(shape, dtype), random(shape, dtype).relu_()
        masked, bias = native.relu_backward(grad, output, with_bias)
        expected, expected_bias = aten.relu_backward(grad.double(), output.double(), with_bias)
        assert_same(masked, expected)
        assert_dense(masked)
        assert (bias is None) == (expected_bias is None)
        if bias is not None:
            assert_close(bias, expected_bias, dtype, pixels(shape), "bias gradient")

    def test_non_finite(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        grad, output = few_values(shape, dtype), few_values(shape, dtype)
        for with_bias in (False, True):
            masked, _ = native.relu_backward(grad, output, with_bias)
            assert_same(masked, aten.relu_backward(grad.double(), output.double(), False)[0])

    def test_bias(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        grad = positive(shape, dtype, torch.contiguous_format)
        assert_close(native.bias_grad(grad), aten.bias_grad(grad.double()), dtype, pixels(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("case", POOLS)
class TestMaxPool:
    @pytest.mark.parametrize("relu", [False, True])
    def test_forward(self, case: str, shape: tuple[int, ...], dtype: torch.dtype, relu: bool) -> None:
        pool = pool_of(case, shape)
        for x in (random(shape, dtype), few_values(shape, dtype)):
            output, code = native.max_pool2d(x, pool, relu)
            expected, expected_code = aten.max_pool2d(x.double(), pool, relu)
            assert_same(output, expected)
            assert code.dtype == pool.code_dtype
            assert_same(code, expected_code)
            assert_dense(output, code)

    def test_backward(self, case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        pool = pool_of(case, shape)
        _, code = native.max_pool2d(random(shape, dtype), pool, relu=True)
        grad = positive(pool.output_shape, dtype)
        expected, expected_bias = aten.max_pool2d_backward(grad.double(), code, pool, True)
        for with_bias in (False, True):
            input_grad, bias = native.max_pool2d_backward(grad, code, pool, with_bias)
            assert_close(input_grad, expected, dtype, pool.positions if pool.is_overlapping else 1)
            assert_dense(input_grad)
            assert (bias is not None) == with_bias
        assert_close(bias, expected_bias, dtype, pool.batch * pool.out_height * pool.out_width, "bias gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAveragePool:
    @pytest.mark.parametrize("count_include_pad, divisor", [(True, None), (False, None), (True, 7), (True, -3)])
    @pytest.mark.parametrize("case", [case for case, (*_, dilation, _) in POOLS.items() if dilation == 1])
    def test_window(self, case: str, dtype: torch.dtype, count_include_pad: bool, divisor: int | None) -> None:
        for shape in MAPS:
            pool = pool_of(case, shape)
            x, grad = random(shape, dtype), random(pool.output_shape, dtype)
            output = native.avg_pool2d(x, pool, count_include_pad, divisor)
            assert_close(output, aten.avg_pool2d(x.double(), pool, count_include_pad, divisor), dtype, pool.positions)
            input_grad = native.avg_pool2d_backward(grad, pool, count_include_pad, divisor)
            expected = aten.avg_pool2d_backward(grad.double(), pool, count_include_pad, divisor)
            assert_close(input_grad, expected, dtype, pool.positions)
            assert_dense(output, input_grad)

    @pytest.mark.parametrize("shape", [(2, 512, 7, 7), (3, 5, 4, 9), (1, 1, 3, 3), (2, 67, 40, 30)], ids=str)
    def test_global(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        x, grad = positive(shape, dtype), random((*shape[:2], 1, 1), dtype)
        output = native.global_avg_pool2d(x)
        assert_close(output, aten.global_avg_pool2d(x.double()), dtype, shape[2] * shape[3])
        input_grad = native.global_avg_pool2d_backward(grad, *shape[2:])
        assert_close(input_grad, aten.global_avg_pool2d_backward(grad.double(), *shape[2:]), dtype, 1)
        assert_dense(output, input_grad)


@pytest.mark.parametrize("divisor", [2**32, 2**32 + 3, 3 * 10**9, -(2**33)])
def test_a_divisor_of_more_than_32_bits(divisor: int) -> None:
    x = random((2, 5, 6, 6), torch.float32)
    pool = pool_of("3/2/1", x.shape)
    expected = aten.avg_pool2d(x.double(), pool, True, divisor)
    assert_close(native.avg_pool2d(x, pool, True, divisor), expected, torch.float32, pool.positions)
    grad = random(pool.output_shape, torch.float32)
    expected = aten.avg_pool2d_backward(grad.double(), pool, True, divisor)
    assert_close(native.avg_pool2d_backward(grad, pool, True, divisor), expected, torch.float32, pool.positions)


def test_relu_keeps_nan() -> None:
    g = conv_of("1x1")
    x, weight = random(g.input_shape, torch.float32), random(g.weight_shape, torch.float32)
    x[0, :, 2, 3] = torch.nan
    residual = random(g.output_shape, torch.float32)
    residual[1, 4, 0, 0] = torch.nan
    output = native.conv2d(x, weight, None, residual, g, Policy(torch.float32), relu=True)
    expected = torch.zeros(g.output_shape, dtype=torch.bool)
    expected[0, :, 2, 3] = True
    expected[1, 4, 0, 0] = True
    assert torch.equal(output.isnan(), expected)


def test_dilation_over_a_small_map() -> None:
    """A window that steps over the whole map has no winner: -inf, or closed by ReLU."""
    x = torch.ones(1, 3, 1, 1)
    pool = PoolGeometry.of("test", x.shape, (2, 2), (1, 1), (1, 1), (2, 2), False)
    output, code = native.max_pool2d(x, pool, relu=False)
    assert output.eq(-torch.inf).all() and code.eq(0).all()
    input_grad, _ = native.max_pool2d_backward(output, code, pool, with_bias=False)
    assert input_grad.eq(0).all()


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "transposed"])
def test_any_strides(layout: str) -> None:
    shape = (2, 6, 8, 8)
    x = {
        "contiguous": lambda: torch.randn(shape),
        "sliced": lambda: torch.randn(2, 12, 9, 16)[:, ::2, 1:, ::2],
        "expanded": lambda: torch.randn(2, 6, 1, 8).expand(shape),
        "transposed": lambda: torch.randn(6, 2, 8, 8).transpose(0, 1),
    }[layout]()
    pool = pool_of("2/2", shape)
    output, code = native.max_pool2d(x, pool, relu=True)
    expected, expected_code = aten.max_pool2d(x.double(), pool, relu=True)
    assert_same(output, expected)
    assert_same(code, expected_code)
    masked, bias = native.relu_backward(x, x, with_bias=True)
    assert_same(masked, x.relu())
    assert_close(bias, x.double().relu().sum((0, 2, 3)), torch.float32, pixels(shape))


def launches(dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor | None, ...]]]:
    """Every own kernel that sums, on maps large enough for several chunks."""
    shape = (4, 48, 61, 47)
    disjoint, overlapping = pool_of("2/2", shape), pool_of("3/2/1", shape)
    x, grad = random(shape, dtype), random(shape, dtype)
    pooled = {p: (random(p.output_shape, dtype), native.max_pool2d(x, p, relu=True)[1]) for p in (disjoint, overlapping)}
    return {
        "relu_backward": lambda: native.relu_backward(grad, x, with_bias=True),
        "bias_grad": lambda: (native.bias_grad(grad),),
        "max_pool2d": lambda: native.max_pool2d(x, overlapping, relu=True),
        "max_pool2d_backward": lambda: native.max_pool2d_backward(*pooled[disjoint], disjoint, with_bias=True),
        "max_pool2d_backward, overlapping": lambda: native.max_pool2d_backward(*pooled[overlapping], overlapping, True),
        "avg_pool2d": lambda: (native.avg_pool2d(x, overlapping, True, None),),
        "avg_pool2d_backward": lambda: (native.avg_pool2d_backward(pooled[overlapping][0], overlapping, False, None),),
        "global_avg_pool2d": lambda: (native.global_avg_pool2d(x),),
        **norm_launches(x, grad, pooled[disjoint], disjoint),
    }


def norm_launches(
    x: Tensor, grad: Tensor, pooled: tuple[Tensor, Tensor], pool: PoolGeometry
) -> dict[str, Callable[[], tuple[Tensor | None, ...]]]:
    (_, statistics), eps = native.batch_norm_relu(x, None, None, None, None, 1e-5), 1e-5
    mean, var = statistics
    forward = (x, statistics, var, mean, grad, eps)

    def backward(grad: Tensor, gate: Tensor, pool: PoolGeometry | None) -> tuple[Tensor | None, ...]:
        calls = ((True, True, False), (False, True, pool is None))  # training, with_input, with_residual
        return sum(
            (native.batch_norm_relu_backward(grad, gate, x, statistics, var, eps, t, pool, i, r) for t, i, r in calls), ()
        )

    return {
        "batch_norm statistics": lambda: native_norm._batch_statistics(x),
        "batch_norm_relu": lambda: native.batch_norm_relu(*forward)[:1],
        "batch_norm_relu_max_pool2d": lambda: native.batch_norm_relu_max_pool2d(*forward, pool)[:2],
        "batch_norm_relu_backward": lambda: backward(grad, x, None),
        "batch_norm_relu_max_pool2d_backward": lambda: backward(*pooled, pool),
    }


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_determinism(dtype: torch.dtype) -> None:
    """The same bits again, and on one thread as on two and four."""
    threads = torch.get_num_threads()
    for name, launch in launches(dtype).items():
        results = []
        try:
            for number in (2, 2, 1, 4):
                torch.set_num_threads(number)
                results.append([t for t in launch() if t is not None])
        finally:
            torch.set_num_threads(threads)
        first, *others = results
        assert first, name
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), name


def digest() -> str:
    """Of every own kernel's output, from data that no instruction set draws differently."""
    torch.randn = lambda shape: torch.arange(math.prod(shape)).mul(7919).remainder(4099).sub(2049).div(1024).view(shape)
    bits = hashlib.sha256()
    for dtype in DTYPES:
        for launch in launches(dtype).values():
            for tensor in (t for t in launch() if t is not None):
                bits.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return bits.hexdigest()


@pytest.mark.cpu_kernels
def test_instruction_sets_agree() -> None:
    """Every instruction set that this machine runs computes the same bits."""
    outputs = {}
    for capability in ("default", "avx2", "avx512"):
        code = "import test_native_kernels as t; print(t.native.library().cpu_capability()); print(t.digest())"
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "ATEN_CPU_CAPABILITY": capability,
                "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        name, digest = run.stdout.strip().splitlines()
        outputs[name] = digest
    assert "default" in outputs
    assert len(set(outputs.values())) == 1, f"differ: {', '.join(outputs)}"


def test_kernels_refuse_other_layouts() -> None:
    """A tensor that a kernel would read out of bounds is an error, whoever hands it over."""
    kernels = getattr(torch.ops, native_library.namespace)
    dense = random((2, 4, 6, 6), torch.float32)
    with pytest.raises(RuntimeError, match="dense in channels_last"):
        kernels.relu_backward(dense.contiguous(), dense, torch.empty_like(dense), None)
    with pytest.raises(RuntimeError, match="output has a wrong size"):
        kernels.relu_backward(dense, dense[:1], torch.empty_like(dense), None)
    with pytest.raises(RuntimeError, match="wrong dtype"):
        kernels.relu_backward(dense, dense.bfloat16(), torch.empty_like(dense), None)
