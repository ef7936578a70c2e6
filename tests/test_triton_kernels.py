"""The Triton backend's launchers against torch in float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ConvCase, ids
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, triton, triton_conv, triton_tma
from fastconv.backends.triton_launch import chip, recording
from fastconv.geometry import ConvGeometry, PoolGeometry, pair
from fastconv.precision import Policy
from fastconv.tuning import Candidate
from fastconv.tuning.candidates import triton_candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POLICY = Policy(torch.float32)

# One case for each thing that a kernel can get wrong; small, as the interpreter takes 5 ms a step.
CASES = [
    ConvCase("3x3", (2, 32, 8, 8), 16, (3, 3), padding=1),
    ConvCase("1x1", (2, 24, 6, 6), 16, (1, 1)),
    ConvCase("stem_7x7_s2", (1, 3, 20, 18), 16, (7, 7), stride=2, padding=3),
    ConvCase("3x3_s2_odd", (2, 16, 9, 7), 16, (3, 3), stride=2, padding=1),
    ConvCase("stride_2_1", (1, 8, 9, 8), 8, (3, 3), stride=(2, 1), padding=(1, 0)),
    ConvCase("dilation_2", (1, 8, 10, 10), 8, (3, 3), padding=2, dilation=2),
    ConvCase("dilation_2_s2", (1, 8, 11, 11), 8, (3, 3), stride=2, padding=1, dilation=(2, 1)),
    ConvCase("dilation_9_s6", (1, 2, 22, 8), 4, (2, 3), stride=(6, 3), padding=3, dilation=(9, 2)),
    ConvCase("groups_2", (2, 16, 6, 6), 8, (3, 3), padding=1, groups=2),
    ConvCase("depthwise", (1, 4, 8, 7), 4, (3, 3), padding=1, groups=4),
    ConvCase("5x5", (1, 8, 9, 9), 12, (5, 5), padding=2),
    ConvCase("odd_channels", (2, 5, 7, 6), 7, (3, 3), padding=1),
    ConvCase("40_channels", (1, 40, 5, 6), 64, (3, 3), padding=1),
    ConvCase("64_channels", (1, 64, 6, 5), 40, (3, 3), padding=1),
    ConvCase("kernel_3x1", (1, 8, 7, 9), 8, (3, 1), padding=(1, 0)),
    ConvCase("48_taps", (1, 4, 9, 11), 4, (6, 8), padding=(2, 3)),
    ConvCase("two_blocks_of_channels", (1, 144, 2, 3), 136, (1, 2)),
    ConvCase("3x3_s2", (2, 16, 8, 12), 32, (3, 3), stride=2, padding=1),
    ConvCase("1x1_s2", (2, 32, 8, 8), 16, (1, 1), stride=2),
    ConvCase("7x7_s2", (1, 16, 10, 8), 16, (7, 7), stride=2, padding=3),
    ConvCase("stride_3_48_channels", (1, 48, 9, 9), 48, (3, 3), stride=3, padding=1),
    ConvCase("dilation_2_s2_even", (1, 16, 12, 12), 16, (3, 3), stride=2, padding=1, dilation=2),
    ConvCase("small_maps", (70, 16, 2, 2), 16, (3, 3), padding=1),
    ConvCase("wide_padding", (1, 16, 5, 5), 16, (3, 3), padding=4),
    ConvCase("two_blocks_of_pixels", (1, 4, 26, 25), 4, (1, 3), padding=(0, 1)),
]
HALF_CASES = [case for case in CASES if case.name in {"3x3", "3x3_s2", "3x3_s2_odd", "groups_2", "odd_channels"}]
CASES_AND_DTYPES = [(case, torch.float32) for case in CASES]
CASES_AND_DTYPES += [(case, dtype) for case in HALF_CASES for dtype in (torch.bfloat16, torch.float16)]
conv_cases = pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=ids)

# Input, kernel, stride, padding, dilation, ceil_mode.
POOLS = {
    "2x2": ((2, 16, 8, 6), 2, 2, 0, 1, False),
    "2x2_large": ((1, 3, 50, 88), 2, 2, 0, 1, False),
    "2x2_odd": ((2, 5, 9, 7), 2, 2, 0, 1, False),
    "2x2_ceil": ((1, 6, 7, 9), 2, 2, 0, 1, True),
    "3x3_s2_p1": ((2, 7, 9, 10), 3, 2, 1, 1, False),
    "3x3_s1_large": ((1, 2, 33, 34), 3, 1, 1, 1, False),
    "3x2_s1x2": ((1, 4, 6, 7), (3, 2), (1, 2), (1, 0), 1, False),
    "5x5_s3_p2_ceil": ((1, 3, 11, 12), 5, 3, 2, 1, True),
    "dilated": ((1, 4, 11, 9), (3, 2), (2, 4), 1, (2, 2), False),
    "gaps": ((1, 4, 10, 11), 2, 3, 0, 1, False),
    "window_of_256": ((1, 2, 16, 17), 16, 1, 0, 1, False),
}
POOLS_AND_DTYPES = [(name, dtype) for name in POOLS for dtype in DTYPES if dtype == torch.float32 or name != "window_of_256"]
pool_cases = pytest.mark.parametrize(
    ("name", "dtype"), POOLS_AND_DTYPES, ids=lambda value: str(value).removeprefix("torch.")
)


def _pool(name: str) -> PoolGeometry:
    shape, *window, ceil_mode = POOLS[name]
    return PoolGeometry.of("pool", shape, *(pair("pool", "window", value) for value in window), ceil_mode)


def _pool2x2(shape: tuple[int, ...]) -> PoolGeometry:
    return PoolGeometry.of("pool", shape, (2, 2), (2, 2), (0, 0), (1, 1), False)


def _random(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=layout)


def _exact(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers with NaN and infinities strewn in, and one corner of −inf."""
    x = torch.randint(-4, 5, shape, device=DEVICE).to(dtype)
    lot = torch.rand(shape, device=DEVICE)
    x[lot < 0.04] = float("nan")
    x[(lot > 0.04) & (lot < 0.07)] = float("inf")
    x[..., :5, :5] = float("-inf")
    return x.to(memory_format=torch.channels_last)


def _oracle(function: Any, *args: Any) -> Any:
    """An aten launcher in float64 on the CPU."""
    return function(*(a.detach().cpu().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))


def _conv(case: ConvCase) -> ConvGeometry:
    stride, padding, dilation = (pair("conv", "argument", a) for a in (case.stride, case.padding, case.dilation))
    return ConvGeometry.of("conv", case.input, case.weight, None, stride, padding, dilation, case.groups)


def _plans(op: str, direction: str, g: ConvGeometry, policy: Policy) -> list[Candidate]:
    """Every kernel and configuration that may serve a call: on a GPU, all that are shipped for it."""
    return list(triton_candidates(op, direction, g, policy, chip(torch.device(DEVICE))))


@conv_cases
def test_forward(case: ConvCase, dtype: torch.dtype) -> None:
    g, policy = _conv(case), Policy(dtype)
    x, weight, residual = _random(case.input, dtype), _random(case.weight, dtype), _random(g.output_shape, dtype)
    bias = torch.randn(case.out_channels, device=DEVICE).to(dtype)
    terms = g.taps * g.group_in_channels
    fused = _oracle(aten.conv2d, x, weight, bias, residual, g, policy, True)
    bare = _oracle(aten.conv2d, x, weight, None, None, g, policy, False)
    for plan in _plans("conv2d_relu", "forward", g, policy):
        actual = triton.conv2d(x, weight, bias, residual, g, policy, relu=True, plan=plan)
        assert_close(actual.cpu(), fused, dtype, terms, f"fused, {plan}")
        actual = triton.conv2d(x, weight, None, None, g, policy, relu=False, plan=plan)
        assert_close(actual.cpu(), bare, dtype, terms, f"bare, {plan}")


@conv_cases
def test_input_grad(case: ConvCase, dtype: torch.dtype) -> None:
    g, policy = _conv(case), Policy(dtype)
    grad, weight = _random(g.output_shape, dtype), _random(case.weight, dtype)
    expected = _oracle(aten.conv2d_input_grad, grad, weight, g, policy)
    for plan in _plans("conv2d", "input_grad", g, policy):
        actual = triton.conv2d_input_grad(grad, weight, g, policy, plan)
        assert_close(actual.cpu(), expected, dtype, g.taps * g.group_out_channels, str(plan))


@conv_cases
def test_weight_grad(case: ConvCase, dtype: torch.dtype) -> None:
    g, policy = _conv(case), Policy(dtype)
    grad, x = _random(g.output_shape, dtype), _random(case.input, dtype)
    expected = _oracle(aten.conv2d_weight_grad, grad, x, g, policy)
    plans = _plans("conv2d", "weight_grad", g, policy)
    for plan in plans:
        actual = triton.conv2d_weight_grad(grad, x, g, policy, plan)
        assert_close(actual.cpu(), expected, dtype, g.out_pixels, str(plan))
        if DEVICE == "cuda" or plan == plans[0]:  # the interpreter runs programs in one order
            again = triton.conv2d_weight_grad(grad, x, g, policy, plan)
            assert torch.equal(actual, again), f"not the same twice, {plan}"


@pytest.mark.parametrize("channels", [(272, 72), (128, 272)], ids=str)
def test_weight_grad_of_wide_tiles(channels: tuple[int, int]) -> None:
    (inside, outside), policy = channels, Policy(torch.bfloat16)
    g = ConvGeometry.of("conv", (1, inside, 4, 5), (outside, inside, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    grad, x = _random(g.output_shape, policy.dtype), _random(g.input_shape, policy.dtype)
    expected = _oracle(aten.conv2d_weight_grad, grad, x, g, policy)
    plans = triton_candidates("conv2d", "weight_grad", g, policy, "sm_90")
    wide = [plan for plan in plans if {("BLOCK_N", 256), ("BLOCK_C", 256)} & {*plan.config}]
    actual = triton.conv2d_weight_grad(grad, x, g, policy, wide[0])
    assert_close(actual.cpu(), expected, policy.dtype, g.out_pixels, str(wide[0]))


_POOLED = ["3x3", "3x3_s2_odd", "3x3_s2", "groups_2", "odd_channels", "small_maps", "48_taps", "two_blocks_of_pixels"]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", _POOLED)
def test_forward_with_pool(name: str, dtype: torch.dtype) -> None:
    """Values are the oracle's; the code names an element that reaches the maximum to within the same tolerance."""
    case = next(c for c in CASES if c.name == name)
    g, policy = _conv(case), Policy(dtype)
    pool = _pool2x2(g.output_shape)
    x, weight = _random(case.input, dtype), _random(case.weight, dtype)
    bias = torch.randn(case.out_channels, device=DEVICE).to(dtype)
    expected, _ = _oracle(aten.conv2d_relu_max_pool2d, x, weight, bias, g, pool, policy)
    unpooled = _oracle(aten.conv2d, x, weight, bias, None, g, policy, False)
    terms = g.taps * g.group_in_channels
    for plan in _plans("conv2d_relu_max_pool2d", "forward", g, policy):
        y, code = triton.conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, plan)
        assert_close(y.cpu(), expected, dtype, terms, f"values, {plan}")
        named = unpooled.flatten(2).gather(2, aten.code_to_indices(code.cpu(), pool).flatten(2)).view_as(expected)
        named.masked_fill_(code.cpu() == 0, 0)
        assert_close(named.to(dtype), expected, dtype, terms, f"elements that the codes name, {plan}")
        assert code.max() <= 4


def test_forward_with_another_pool() -> None:
    case = CASES[0]
    g = _conv(case)
    pool = PoolGeometry.of("pool", g.output_shape, (3, 3), (2, 2), (1, 1), (1, 1), False)
    x, weight = _random(case.input, torch.float32), _random(case.weight, torch.float32)
    y, code = triton.conv2d_relu_max_pool2d(x, weight, None, g, pool, POLICY)
    expected, expected_code = _oracle(aten.conv2d_relu_max_pool2d, x, weight, None, g, pool, POLICY)
    assert_close(y.cpu(), expected, torch.float32, g.taps * g.in_channels)
    assert torch.equal(code.cpu(), expected_code)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 16, 8, 8), (48, 16, 2, 2)], ids=str)
def test_nonfinite_forward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """One channel of values goes through a 1×1 convolution as it is: NaN, infinities and ties reach every epilogue."""
    x = torch.zeros(shape, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
    x[:, :1] = _exact((shape[0], 1, *shape[2:]), dtype)
    x[:, 0, 5:, 5:] = float("nan")
    if shape[2] < 5:
        x[:, 0] = _exact((shape[0], 1, 12, 12), dtype)[:, 0, 5:7, 5:7]
    weight = torch.zeros(16, shape[1], 1, 1, device=DEVICE, dtype=dtype)
    weight[:, 0] = 1
    g, policy = ConvGeometry.of("conv", x.shape, weight.shape, None, (1, 1), (0, 0), (1, 1), 1), Policy(dtype)
    values = x[:, :1].expand(-1, 16, -1, -1).contiguous(memory_format=torch.channels_last)
    for plan in _plans("conv2d_relu", "forward", g, policy):
        y = triton.conv2d(x, weight, None, None, g, policy, relu=True, plan=plan)
        torch.testing.assert_close(y, values.relu(), rtol=0, atol=0, equal_nan=True, msg=str(plan))
    pool = _pool2x2(g.output_shape)
    expected, expected_code = aten.max_pool2d(values, pool, relu=True)
    for plan in _plans("conv2d_relu_max_pool2d", "forward", g, policy):
        pooled, code = triton.conv2d_relu_max_pool2d(x, weight, None, g, pool, policy, plan)
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True, msg=str(plan))
        assert torch.equal(code, expected_code), str(plan)


# By a stride of 2 the boxes are the same, over maps that are twice as large: two of the shapes stand for all.
OVERHUNG = [(3, 16, 7, 7), (2, 16, 5, 8), (2, 16, 5, 13), (1, 16, 27, 9), (22, 16, 4, 4)]


@pytest.mark.parametrize(
    ("shape", "stride"),
    [pytest.param(shape, 1, id=f"{shape}-1") for shape in OVERHUNG]
    + [pytest.param(shape, 2, id=f"{shape}-2") for shape in OVERHUNG[:2]]
    + [pytest.param(shape, 2, id=f"{shape}-2", marks=pytest.mark.slow) for shape in OVERHUNG[2:]],
)
def test_nonfinite_weight_grad(shape: tuple[int, int, int, int], stride: int) -> None:
    """Only taps that see a NaN or an infinity have one; tiles and boxes of a GPU overhang these maps."""
    shape = (*shape[:2], *(size * stride for size in shape[2:]))
    g = ConvGeometry.of("conv", shape, (16, 16, 3, 3), None, (stride, stride), (1, 1), (1, 1), 1)
    x, grad = _random(shape, torch.float32), _random(g.output_shape, torch.float32)
    x[0, 3, -1, -1], x[-1, 5, 0, -1], x[0, 7, -1, 0] = float("inf"), float("-inf"), float("nan")
    expected = _oracle(aten.conv2d_weight_grad, grad, x, g, POLICY)
    tf32 = Policy(torch.float32, tf32=True)  # so that descriptors are among the plans
    plans = (*_plans("conv2d", "weight_grad", g, POLICY), *triton_candidates("conv2d", "weight_grad", g, tf32, "sm_90"))
    assert {"tma", "pointer"} <= {plan.kernel for plan in plans}
    for plan in plans:
        grad_weight = triton.conv2d_weight_grad(grad, x, g, POLICY, plan)
        assert_close(grad_weight.cpu(), expected, torch.float32, g.out_pixels, str(plan))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ["3x3", "3x3_s2", "two_blocks_of_channels", "dilation_2"])
def test_input_grad_closed_by_the_layer_below(name: str, dtype: torch.dtype) -> None:
    """The mask and the bias sums in the epilogue: closed where the layer below is not positive, open where it is NaN."""
    case = next(c for c in CASES if c.name == name)
    g, policy = _conv(case), Policy(dtype)
    grad, weight, gate = _random(g.output_shape, dtype), _random(case.weight, dtype), _exact(g.input_shape, dtype).relu()
    expected = _oracle(aten.conv2d_input_grad, grad, weight, g, policy)
    expected = torch.where(gate.cpu() <= 0, 0, expected)
    terms = g.taps * g.group_out_channels
    for plan in _plans("conv2d_relu", "input_grad", g, policy):
        masked, sums = triton.conv2d_input_grad_relu(grad, weight, gate, g, policy, True, plan)
        assert_close(masked.cpu(), expected, dtype, terms, str(plan))
        assert sums is not None
        assert_close(sums.cpu(), expected.sum((0, 2, 3)), dtype, terms + g.batch * g.height * g.width, f"bias, {plan}")
        masked, sums = triton.conv2d_input_grad_relu(grad, weight, gate, g, policy, False, plan)
        assert_close(masked.cpu(), expected, dtype, terms, str(plan))
        assert sums is None


@pytest.fixture
def _descriptors_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are descriptors they are chosen, however small the call."""

    def plans(*call: Any) -> list[Candidate]:
        return sorted(triton_candidates(*call), key=lambda plan: plan.kernel != triton_tma.FAMILY)

    monkeypatch.setattr(triton_conv, "_plans", plans)


@pytest.mark.usefixtures("_descriptors_first")
def test_unaligned_storage_takes_the_pointer_kernels() -> None:
    case = next(c for c in CASES if c.name == "3x3")
    g = _conv(case)
    flat = torch.randn(2 * 8 * 8 * 32 + 1, device=DEVICE)
    x = flat[1:].view(2, 8, 8, 32).permute(0, 3, 1, 2)
    weight, grad = _random(case.weight, torch.float32), _random(g.output_shape, torch.float32)
    assert x.data_ptr() % 16
    with recording(90) as launches:
        triton.conv2d(x, weight, None, None, g, Policy(torch.float32, tf32=True), relu=False)
        triton.conv2d(weight.new_empty(x.shape), weight, None, None, g, Policy(torch.float32, tf32=True), relu=False)
    assert ["x_desc" in launch.arguments for launch in launches] == [False, True]
    y = triton.conv2d(x, weight, None, None, g, POLICY, relu=False)
    assert_close(y.cpu(), _oracle(aten.conv2d, x, weight, None, None, g, POLICY, False), torch.float32, 288)
    grad_weight = triton.conv2d_weight_grad(grad, x, g, POLICY)
    assert_close(grad_weight.cpu(), _oracle(aten.conv2d_weight_grad, grad, x, g, POLICY), torch.float32, 128)


@pytest.mark.usefixtures("_descriptors_first")
def test_descriptors_that_fail_their_test_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = _random((64, 32, 2, 2), torch.float32), _random((32, 32, 3, 3), torch.float32)
    g = ConvGeometry.of("conv", x.shape, weight.shape, None, (1, 1), (1, 1), (1, 1), 1)
    pool = _pool2x2(g.output_shape)
    families = []
    for works in (True, False):
        monkeypatch.setattr(triton_tma, "_reads_batch_inner", lambda device, works=works: works)
        with recording(90) as launches:
            triton.conv2d_relu_max_pool2d(x, weight, None, g, pool, Policy(torch.float32, tf32=True))
        families.append("x_desc" in launches[0].arguments)
    assert families == [True, False]


def test_any_strides() -> None:
    """NCHW operands, a transposed view and an expanded one."""
    case = CASES[0]
    g = _conv(case)
    x = _random((8, 8, 32, 2), torch.float32, torch.contiguous_format).permute(3, 2, 1, 0)
    weight = _random(case.weight, torch.float32, torch.contiguous_format)
    grad = torch.randn(1, case.out_channels, 1, 1, device=DEVICE).expand(g.output_shape)
    y = triton.conv2d(x, weight, None, None, g, POLICY, relu=False)
    assert_close(y.cpu(), _oracle(aten.conv2d, x, weight, None, None, g, POLICY, False), torch.float32, 288)
    grad_x = triton.conv2d_input_grad(grad, weight, g, POLICY)
    assert_close(grad_x.cpu(), _oracle(aten.conv2d_input_grad, grad, weight, g, POLICY), torch.float32, 144)
    grad_weight = triton.conv2d_weight_grad(grad, x, g, POLICY)
    assert_close(grad_weight.cpu(), _oracle(aten.conv2d_weight_grad, grad, x, g, POLICY), torch.float32, 128)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 144, 5, 5), (1, 3, 50, 61)])
def test_relu_backward_and_bias_grad(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    pixels = shape[0] * shape[2] * shape[3]
    grad, output = _random(shape, dtype), _exact(shape, dtype).relu()
    masked, sums = triton.relu_backward(grad, output, with_bias=True)
    expected = torch.where(output <= 0, 0, grad)
    assert torch.equal(masked, expected)
    assert_close(sums.cpu(), expected.cpu().double().sum((0, 2, 3)), dtype, pixels, "bias with a mask")
    masked, sums = triton.relu_backward(grad, output, with_bias=False)
    assert torch.equal(masked, expected) and sums is None
    assert_close(triton.bias_grad(grad).cpu(), _oracle(aten.bias_grad, grad), dtype, pixels, "bias")


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pool_cases
def test_max_pool(name: str, dtype: torch.dtype, relu: bool) -> None:
    """Values and winners are torch's own, with ties, NaN, infinities and windows of −inf alone."""
    pool = _pool(name)
    x = _exact(pool.input_shape, dtype)
    y, code = triton.max_pool2d(x, pool, relu)
    expected, expected_code = aten.max_pool2d(x, pool, relu)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert code.dtype == pool.code_dtype
    assert torch.equal(code, expected_code)


@pool_cases
def test_max_pool_backward(name: str, dtype: torch.dtype) -> None:
    pool = _pool(name)
    _, code = aten.max_pool2d(_random(pool.input_shape, dtype), pool, relu=True)
    grad = _random(pool.output_shape, dtype)
    grad_x, sums = triton.max_pool2d_backward(grad, code, pool, with_bias=True)
    expected, expected_sums = _oracle(aten.max_pool2d_backward, grad, code.cpu(), pool, True)
    assert_close(grad_x.cpu(), expected, dtype, pool.positions)
    assert_close(sums.cpu(), expected_sums, dtype, pool.out_height * pool.out_width * pool.batch, "bias")
    again, no_sums = triton.max_pool2d_backward(grad, code, pool, with_bias=False)
    assert torch.equal(again, grad_x) and no_sums is None


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("divisor", [(True, None), (False, None), (True, 7)], ids=["pad", "no_pad", "override"])
@pytest.mark.parametrize("name", ["2x2_odd", "3x3_s2_p1", "3x2_s1x2", "5x5_s3_p2_ceil", "gaps"])
def test_avg_pool(name: str, divisor: tuple[bool, int | None], dtype: torch.dtype) -> None:
    pool = _pool(name)
    x, grad = _random(pool.input_shape, dtype), _random(pool.output_shape, dtype)
    y = triton.avg_pool2d(x, pool, *divisor)
    assert_close(y.cpu(), _oracle(aten.avg_pool2d, x, pool, *divisor), dtype, pool.positions, "forward")
    grad_x = triton.avg_pool2d_backward(grad, pool, *divisor)
    expected = _oracle(aten.avg_pool2d_backward, grad, pool, *divisor)
    assert_close(grad_x.cpu(), expected, dtype, pool.positions, "backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (3, 144, 1, 1), (1, 16, 40, 40)])
def test_global_avg_pool(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, grad = _random(shape, dtype), _random((*shape[:2], 1, 1), dtype)
    area = shape[2] * shape[3]
    assert_close(triton.global_avg_pool2d(x).cpu(), _oracle(aten.global_avg_pool2d, x), dtype, area, "forward")
    grad_x = triton.global_avg_pool2d_backward(grad, *shape[2:])
    assert_close(grad_x.cpu(), _oracle(aten.global_avg_pool2d_backward, grad, *shape[2:]), dtype, 1, "backward")


def test_supports() -> None:
    g = _conv(CASES[0])
    assert triton.supports("conv2d", "forward", g, POLICY, DEVICE) is None
    assert "float64" in str(triton.supports("conv2d", "forward", g, Policy(torch.float64), DEVICE))
    assert "CUDA tensor" in str(triton.supports("conv2d", "forward", g, POLICY, "xpu"))
    huge = ConvGeometry.of("conv", (2**16, 1, 2**8, 2**8), (1, 1, 1, 1), None, (1, 1), (0, 0), (1, 1), 1)
    assert "pixels" in str(triton.supports("conv2d", "forward", huge, POLICY, DEVICE))
