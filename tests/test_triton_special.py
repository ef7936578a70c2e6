"""The Triton kernels for few input channels, narrow groups and depthwise convolutions, against torch in float64."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, ConvCase, ids
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, triton, triton_depthwise, triton_inspect
from fastconv.backends.triton_calls import Call, Recorded
from fastconv.backends.triton_launch import chip, recording
from fastconv.geometry import ConvGeometry, PoolGeometry, pair
from fastconv.precision import Policy
from fastconv.tuning import Candidate
from fastconv.tuning.candidates import triton_candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")

FIRST = [
    ConvCase("1_channel", (1, 1, 9, 8), 8, (3, 3), padding=1),
    ConvCase("3_channels", (1, 3, 10, 9), 64, (3, 3), padding=1),
    ConvCase("5_channels_stride_2_1", (2, 5, 7, 6), 24, (3, 3), stride=(2, 1), padding=1),
    ConvCase("8_channels_wide_padding", (1, 8, 7, 6), 96, (5, 5), padding=4),
    ConvCase("15_channels_dilated_rows", (1, 15, 6, 7), 64, (3, 3), padding=(2, 1), dilation=(2, 1)),
    ConvCase("stem_even", (1, 3, 24, 20), 64, (7, 7), stride=2, padding=3),
    ConvCase("stem_odd", (2, 3, 21, 17), 64, (7, 7), stride=2, padding=3),
]
GROUPED = [
    ConvCase("2x40", (1, 80, 6, 5), 80, (3, 3), padding=1, groups=2),
    ConvCase("3x4_to_6", (2, 12, 7, 6), 18, (3, 3), padding=1, groups=3),
    ConvCase("3x16_7x2", (1, 48, 7, 8), 48, (7, 2), padding=(3, 1), groups=3),
    ConvCase("4x6_to_16_5x5_s2", (1, 24, 8, 7), 64, (5, 5), stride=2, padding=2, groups=4),
    ConvCase("8x8_s2_dilated", (1, 64, 9, 8), 64, (3, 2), stride=2, padding=2, dilation=2, groups=8),
    ConvCase("32x4", (1, 128, 5, 4), 128, (3, 1), padding=(1, 0), groups=32),
    ConvCase("6x1_to_2_s2", (1, 6, 9, 8), 12, (3, 3), stride=2, padding=1, groups=6),
]
DEPTHWISE = [
    ConvCase("dw_3x3", (2, 20, 9, 10), 20, (3, 3), padding=1, groups=20),
    ConvCase("dw_3x3_s2", (2, 8, 9, 8), 8, (3, 3), stride=2, padding=1, groups=8),
    ConvCase("dw_5x5_s2_1", (1, 12, 9, 8), 12, (5, 5), stride=(2, 1), padding=2, groups=12),
    ConvCase("dw_7x7", (1, 6, 8, 9), 6, (7, 7), padding=3, groups=6),
    ConvCase("dw_3x3_dilated", (1, 16, 8, 9), 16, (3, 3), padding=2, dilation=2, groups=16),
    ConvCase("dw_3x3_wide_padding", (1, 3, 5, 6), 3, (3, 3), padding=3, groups=3),
]
CASES = [*FIRST, *GROUPED, *DEPTHWISE]
HALF = ["5_channels_stride_2_1", "stem_odd", "3x4_to_6", "dw_3x3", "dw_3x3_s2"]
SLOW_HALF = ["8x8_s2_dilated"]
BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(BY_NAME[name], dtype) for name in HALF for dtype in DTYPES[1:]]
    + [pytest.param(BY_NAME[name], dtype, marks=pytest.mark.slow) for name in SLOW_HALF for dtype in DTYPES[1:]],
    ids=ids,
)


def _geometry(case: ConvCase) -> ConvGeometry:
    stride, padding, dilation = (pair("conv", "argument", a) for a in (case.stride, case.padding, case.dilation))
    return ConvGeometry.of("conv", case.input, case.weight, None, stride, padding, dilation, case.groups)


def _pool(g: ConvGeometry) -> PoolGeometry:
    return PoolGeometry.of("pool", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)


def _oracle(function: Any, *args: Any) -> Any:
    """An aten launcher in float64 on the CPU."""
    return function(*(a.detach().cpu().double() if isinstance(a, Tensor) else a for a in args))


def _values(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A launcher's values, without the codes of a pool."""
    return result[0] if isinstance(result, tuple) else result


def _plans(op: str, direction: str, g: ConvGeometry, policy: Policy) -> list[Candidate]:
    """The candidates of the special families; all others, where there is none, as for a first layer's input gradient."""
    plans = triton_candidates(op, direction, g, policy, chip(torch.device(DEVICE)))
    return [plan for plan in plans if _is_special(plan)] or list(plans)


def _is_special(plan: Candidate) -> bool:
    return plan.kernel in ("first", "depthwise") or "PACK" in dict(plan.config)


def test_every_family_is_tried() -> None:
    for cases, special in ((FIRST, "first"), (GROUPED, "PACK"), (DEPTHWISE, "depthwise")):
        for case in cases:
            for direction in ("forward", "weight_grad"):
                plans = _plans("conv2d", direction, _geometry(case), Policy(torch.float32))
                assert all(special in (plan.kernel, *dict(plan.config)) for plan in plans), (case.name, direction)


@every_case
def test_forward(case: ConvCase, dtype: torch.dtype) -> None:
    g, policy = _geometry(case), Policy(dtype)
    x, weight, residual = _random(case.input, dtype), _random(case.weight, dtype), _random(g.output_shape, dtype)
    bias = torch.randn(case.out_channels, device=DEVICE).to(dtype)
    for terms in ((bias, residual, True), (None, None, False)):
        expected = _oracle(aten.conv2d, x, weight, *terms[:2], g, policy, terms[2])
        for plan in _plans("conv2d", "forward", g, policy):
            actual = triton.conv2d(x, weight, *terms[:2], g, policy, terms[2], plan)
            assert_close(actual.cpu(), expected, dtype, g.taps * g.group_in_channels, str(plan))
            assert actual.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_forward_with_pool(case: ConvCase, dtype: torch.dtype) -> None:
    """The code names an element that reaches the maximum to within the values' own tolerance."""
    g, policy = _geometry(case), Policy(dtype)
    pool, terms = _pool(g), g.taps * g.group_in_channels
    x, weight = _random(case.input, dtype), _random(case.weight, dtype)
    bias = torch.randn(case.out_channels, device=DEVICE).to(dtype)
    expected, _ = _oracle(aten.conv2d_relu_max_pool2d, x, weight, bias, g, pool, policy)
    unpooled = _oracle(aten.conv2d, x, weight, bias, None, g, policy, False)
    for plan in _plans("conv2d_relu_max_pool2d", "forward", g, policy):
        y, code = triton.conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, plan)
        assert_close(y.cpu(), expected, dtype, terms, f"values, {plan}")
        named = unpooled.flatten(2).gather(2, aten.code_to_indices(code.cpu(), pool).flatten(2)).view_as(expected)
        named.masked_fill_(code.cpu() == 0, 0)
        assert_close(named.to(dtype), expected, dtype, terms, f"elements that the codes name, {plan}")
        assert code.max() <= 4


@every_case
def test_gradients(case: ConvCase, dtype: torch.dtype) -> None:
    g, policy = _geometry(case), Policy(dtype)
    grad, x, weight = _random(g.output_shape, dtype), _random(case.input, dtype), _random(case.weight, dtype)
    expected = _oracle(aten.conv2d_input_grad, grad, weight, g, policy)
    for plan in _plans("conv2d", "input_grad", g, policy):
        grad_x = triton.conv2d_input_grad(grad, weight, g, policy, plan)
        assert_close(grad_x.cpu(), expected, dtype, g.taps * g.group_out_channels, str(plan))
    expected = _oracle(aten.conv2d_weight_grad, grad, x, g, policy)
    plans = _plans("conv2d", "weight_grad", g, policy)
    for plan in plans:
        grad_weight = triton.conv2d_weight_grad(grad, x, g, policy, plan)
        assert_close(grad_weight.cpu(), expected, dtype, g.out_pixels, str(plan))
        if DEVICE == "cuda" or plan == plans[0]:  # the interpreter runs programs in one order
            again = triton.conv2d_weight_grad(grad, x, g, policy, plan)
            assert torch.equal(grad_weight, again), f"not the same twice, {plan}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("stem_odd", "6x1_to_2_s2", "dw_3x3", "dw_3x3_dilated", "3x4_to_6")]
    + [("3x4_to_6", torch.bfloat16)]
    + [
        pytest.param(name, dtype, marks=pytest.mark.slow)
        for name, dtype in (("32x4", torch.float32), ("dw_5x5_s2_1", torch.float32), ("3x4_to_6", torch.float16))
    ],
    ids=str,
)
def test_nonfinite_values_reach_what_they_are_multiplied_with(name: str, dtype: torch.dtype) -> None:
    """Neither a zero of the padding nor one between packed groups makes a NaN, nor does a mask hide one."""
    case = BY_NAME[name]
    g, policy = _geometry(case), Policy(dtype)
    pool, terms = _pool(g), g.taps * g.group_in_channels
    x, weight, grad = _random(case.input, dtype), _random(case.weight, dtype), _random(g.output_shape, dtype)
    for tensor in (x, grad):  # in the first group's channels: a corner, an edge, and within
        tensor[0, 0, 0, 0] = INF
        tensor[0, 0, -1, 3] = NAN
        tensor[0, 1, 3, min(4, tensor.shape[3] - 1)] = -INF  # a stem's first run of taps ends just before it
    expected = _oracle(aten.conv2d, x, weight, None, None, g, policy, True)
    pooled, _ = _oracle(aten.conv2d_relu_max_pool2d, x, weight, None, g, pool, policy)
    assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
    for plan in _plans("conv2d_relu", "forward", g, policy):
        y = triton.conv2d(x, weight, None, None, g, policy, True, plan=plan)
        assert_close(y.cpu(), expected, dtype, terms, str(plan))
    for plan in _plans("conv2d_relu_max_pool2d", "forward", g, policy):
        y, _ = triton.conv2d_relu_max_pool2d(x, weight, None, g, pool, policy, plan)
        assert_close(y.cpu(), pooled, dtype, terms, f"pooled, {plan}")
    expected = _oracle(aten.conv2d_input_grad, grad, weight, g, policy)
    for plan in _plans("conv2d", "input_grad", g, policy):
        grad_x = triton.conv2d_input_grad(grad, weight, g, policy, plan)
        assert_close(grad_x.cpu(), expected, dtype, g.taps * g.group_out_channels, f"input gradient, {plan}")
    for left, right in ((grad, _random(case.input, dtype)), (_random(g.output_shape, dtype), x)):
        expected = _oracle(aten.conv2d_weight_grad, left, right, g, policy)
        for plan in _plans("conv2d", "weight_grad", g, policy):
            grad_weight = triton.conv2d_weight_grad(left, right, g, policy, plan)
            assert_close(grad_weight.cpu(), expected, dtype, g.out_pixels, f"weight gradient, {plan}")


@pytest.mark.parametrize("name", ["3_channels", "3x4_to_6", "2x40"])
def test_output_channels_may_be_rows_or_columns_of_the_product(name: str) -> None:
    case = BY_NAME[name]
    g, policy = _geometry(case), Policy(torch.float32)
    pool, terms = _pool(g), g.taps * g.group_in_channels
    x, weight, grad = (_random(shape, torch.float32) for shape in (g.input_shape, g.weight_shape, g.output_shape))
    calls: list[tuple[str, str, Any, Any, tuple[Any, ...], int]] = [
        ("conv2d", "forward", triton.conv2d, aten.conv2d, (x, weight, None, None, g, policy, False), terms),
        ("conv2d", "weight_grad", triton.conv2d_weight_grad, aten.conv2d_weight_grad, (grad, x, g, policy), g.out_pixels),
    ]
    pooled = (triton.conv2d_relu_max_pool2d, aten.conv2d_relu_max_pool2d, (x, weight, None, g, pool, policy), terms)
    calls.append(("conv2d_relu_max_pool2d", "forward", *pooled))
    if g.groups > 1:
        terms = g.taps * g.group_out_channels
        calls.append(
            ("conv2d", "input_grad", triton.conv2d_input_grad, aten.conv2d_input_grad, (grad, weight, g, policy), terms)
        )
    for op, direction, launcher, oracle, args, terms in calls:
        expected = _values(_oracle(oracle, *args))
        # One plan of the family, and one of the kernels that take a group at a time.
        plans = triton_candidates(op, direction, g, policy, chip(torch.device(DEVICE)))
        for plan in (plans[0], plans[-1]):
            for swap in (0, 1):
                config = {**dict(plan.config), "SWAP": swap}
                actual = _values(launcher(*args, plan=plan._replace(config=tuple(config.items()))))
                assert_close(actual.cpu(), expected, torch.float32, terms, f"{op} {direction}, {plan}, SWAP = {swap}")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (12, 3), (8, 8)], ids=["first", "grouped", "depthwise"])
def test_epilogues_are_torchs(channels: int, groups: int, dtype: torch.dtype) -> None:
    """A channel of each group goes through as it is: ties, NaN, infinities and windows of −inf."""
    x = torch.zeros((2, channels, 9, 8), dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
    values = torch.randint(-4, 5, (2, groups, 9, 8), device=DEVICE).to(dtype)
    lot = torch.rand(values.shape, device=DEVICE)
    values[lot < 0.05] = NAN
    values[(lot > 0.05) & (lot < 0.1)] = INF
    values[(lot > 0.1) & (lot < 0.15)] = -INF
    values[:, :, :4, :4] = -INF
    values[:, :, 6:, 4:] = -1.0
    x[:, :: channels // groups] = values
    weight = torch.zeros((channels, channels // groups, 1, 1), dtype=dtype, device=DEVICE)
    weight[:, 0] = 1
    g, policy = ConvGeometry.of("conv", x.shape, weight.shape, None, (1, 1), (0, 0), (1, 1), groups), Policy(dtype)
    expected = values.repeat_interleave(channels // groups, dim=1).contiguous(memory_format=torch.channels_last)
    for plan in _plans("conv2d_relu", "forward", g, policy):
        y = triton.conv2d(x, weight, None, None, g, policy, True, plan=plan)
        torch.testing.assert_close(y, expected.relu(), rtol=0, atol=0, equal_nan=True, msg=str(plan))
    pool = _pool(g)
    pooled, expected_code = aten.max_pool2d(expected, pool, relu=True)
    for plan in _plans("conv2d_relu_max_pool2d", "forward", g, policy):
        y, code = triton.conv2d_relu_max_pool2d(x, weight, None, g, pool, policy, plan)
        torch.testing.assert_close(y, pooled, rtol=0, atol=0, equal_nan=True, msg=str(plan))
        assert torch.equal(code, expected_code), str(plan)


@pytest.mark.parametrize("name", ["stem_odd", "32x4", "dw_3x3"])
def test_unaligned_storage_and_any_strides(name: str) -> None:
    case = BY_NAME[name]
    g, policy = _geometry(case), Policy(torch.float32)
    batch, channels, height, width = case.input
    flat = torch.randn(batch * channels * height * width + 1, device=DEVICE)
    x = flat[1:].view(batch, height, width, channels).permute(0, 3, 1, 2)
    grad = torch.randn(1, case.out_channels, 1, g.out_width, device=DEVICE).expand(g.output_shape)
    weight = torch.randn(case.weight[::-1], device=DEVICE).permute(3, 2, 1, 0)
    assert x.data_ptr() % 16
    calls = [
        ("forward", triton.conv2d, aten.conv2d, (x, weight, None, None, g, policy, False), g.taps * g.group_in_channels),
        ("input_grad", triton.conv2d_input_grad, aten.conv2d_input_grad, (grad, weight, g, policy), g.taps * g.out_channels),
        ("weight_grad", triton.conv2d_weight_grad, aten.conv2d_weight_grad, (grad, x, g, policy), g.out_pixels),
    ]
    for direction, launcher, oracle, args, terms in calls:
        expected = _oracle(oracle, *args)
        for plan in _plans("conv2d", direction, g, policy):
            assert_close(launcher(*args, plan=plan).cpu(), expected, torch.float32, terms, f"{direction}, {plan}")


@pytest.mark.parametrize("groups", [1, 2, 16], ids=["pointer", "grouped", "depthwise"])
def test_more_than_2_31_elements(groups: int) -> None:
    """Of the input, whose few pixels that count lie far apart; on a CPU the others are never touched."""
    step, dtype = 4096, torch.float16
    shape = (1, 16, 3 * step + 1, 4 * step - 1)
    size = shape[1] * shape[2] * shape[3]
    if DEVICE == "cuda":
        flat = torch.zeros(size, dtype=dtype, device=DEVICE)
    else:
        flat = torch.from_numpy(np.zeros(size, dtype=np.float16))
    assert size > 2**31
    x = flat.view(1, *shape[2:], 16).permute(0, 3, 1, 2)
    seen = x[:, :, ::step, ::step]
    seen.copy_(torch.randn(seen.shape))
    weight = _random((16, 16 // groups, 1, 1), dtype)
    g, policy = ConvGeometry.of("conv", shape, weight.shape, None, (step, step), (0, 0), (1, 1), groups), Policy(dtype)
    near = ConvGeometry.of("conv", seen.shape, weight.shape, None, (1, 1), (0, 0), (1, 1), groups)
    expected = _oracle(aten.conv2d, seen, weight, None, None, near, policy, False)
    for plan in _plans("conv2d", "forward", g, policy):
        y = triton.conv2d(x, weight, None, None, g, policy, False, plan=plan)
        assert_close(y.cpu(), expected, dtype, 16 // groups, str(plan))
    grad = _random(g.output_shape, dtype)
    expected = _oracle(aten.conv2d_weight_grad, grad, seen, near, policy)
    for plan in _plans("conv2d", "weight_grad", g, policy):
        grad_weight = triton.conv2d_weight_grad(grad, x, g, policy, plan)
        assert_close(grad_weight.cpu(), expected, dtype, g.out_pixels, str(plan))


@pytest.mark.parametrize("shape", [(1, 8, 5, 9), (1, 8, 6, 3), (1, 8, 7, 16)], ids=str)
def test_depthwise_rows_end_with_the_map(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows to a program: those below the map are not written, where another image or nothing of ours would lie."""
    size = math.prod(shape)
    buffer = torch.full((2 * size,), float("nan"), device=DEVICE)
    y = buffer[:size].view(1, *shape[2:], shape[1]).permute(0, 3, 1, 2)
    monkeypatch.setattr(triton_depthwise, "empty", lambda *_: y)
    x, weight = torch.randn(shape, device=DEVICE), torch.randn(shape[1], 1, 3, 3, device=DEVICE)
    g = ConvGeometry.of("conv", shape, weight.shape, None, (1, 1), (1, 1), (1, 1), shape[1])
    policy = Policy(torch.float32)
    plan = next(p for p in triton_candidates("conv2d", "forward", g, policy, chip(x.device)) if p.kernel == "depthwise")
    triton.conv2d(x, weight, None, None, g, policy, False, plan=plan)
    assert not buffer[:size].isnan().any() and buffer[size:].isnan().all()


def test_maps_and_batches_of_every_size_share_binaries() -> None:
    """At most two of a kernel with one configuration: where a weight gradient is not split, it needs no float32 slabs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    binaries: dict[str, int] = json.loads(run.stdout)
    products = {name: count for name, count in binaries.items() if "max_pool" not in name}
    assert len(products) > 50
    assert {name: count for name, count in products.items() if count > (2 if "wgrad" in name else 1)} == {}


def _count_binaries() -> dict[str, int]:
    """How many binaries twenty sizes of a layer need on sm_90, by layer, configuration and kernel."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    policy = Policy(torch.bfloat16)
    layers = [(3, 64, 7, 2, 1), (128, 128, 3, 1, 32), (96, 96, 3, 1, 96), (96, 96, 5, 2, 96), (21, 35, 3, 1, 1)]
    sizes = [(batch, side) for batch in (1, 2, 7, 32, 100) for side in (8, 15, 56, 113)]
    for in_channels, out_channels, kernel, stride, groups in layers:
        shape = (out_channels, in_channels // groups, kernel, kernel)
        for batch, side in sizes:
            x = (batch, in_channels, side, side)
            g = ConvGeometry.of("conv", x, shape, None, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
            for call, launch in _launches(g, policy):
                job = triton_inspect.specialise(Recorded(Call(*call[:6], True, lambda: None), launch), 90)
                found[f"{shape} {call} {launch.kernel.__name__}"].add(job.key + repr(job.attributes))
    return {name: len(keys) for name, keys in found.items()}


def _launches(g: ConvGeometry, policy: Policy) -> list[Any]:
    """(call, launch) of every plan without descriptors."""
    x, weight, grad = (
        torch.empty(shape, dtype=policy.dtype, device="meta", memory_format=torch.channels_last)
        for shape in (g.input_shape, g.weight_shape, g.output_shape)
    )
    launchers = {
        ("conv2d", "forward"): lambda plan: triton.conv2d(x, weight, None, None, g, policy, True, plan=plan),
        ("conv2d_relu_max_pool2d", "forward"): lambda plan: triton.conv2d_relu_max_pool2d(
            x, weight, None, g, _pool(g), policy, plan=plan
        ),
        ("conv2d", "input_grad"): lambda plan: triton.conv2d_input_grad(grad, weight, g, policy, plan),
        ("conv2d", "weight_grad"): lambda plan: triton.conv2d_weight_grad(grad, x, g, policy, plan),
    }
    found = []
    with recording(90) as launches:
        for (op, direction), launcher in launchers.items():
            for plan in triton_candidates(op, direction, g, policy, "sm_90"):
                if plan.kernel != "tma":
                    launches.clear()
                    launcher(plan)
                    call = (op, "bfloat16", direction, plan.kernel, g.groups, g.group_in_channels, str(plan))
                    found += [(call, launch) for launch in launches]
    return found


if __name__ == "__main__":
    print(json.dumps(_count_binaries()))
