"""Registration: opcheck, full-graph compilation forward and backward, FLOP counts, profiler names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastconv
import fastconv.functional as FC
from fastconv import reference
from fastconv.geometry import ConvGeometry

ops = torch.ops.fastconv
CONV = ([1, 2], [1, 0], [1, 1], 2)
POOL_2X2 = ([2, 2], [2, 2], [0, 0], [1, 1], False)
POOL = ([3, 2], [2, 2], [1, 0], [1, 1], True)
X, W, MAP, POOLED = (2, 6, 7, 8), (4, 3, 3, 3), (2, 4, 7, 3), (2, 6, 4, 4)


def code() -> Tensor:
    return ops.max_pool2d(torch.randn(X), *POOL, True, "aten")[1]


def samples(op: str, device: str, layout: torch.memory_format) -> list[tuple[Any, ...]]:
    """Arguments without the backend request."""

    def t(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(memory_format=layout)

    bias = torch.randn(4, device=device)
    pooled = ops.max_pool2d(torch.randn(MAP), *POOL_2X2, True, "aten")[1].to(device).to(memory_format=layout)
    codes = code().to(device).to(memory_format=layout)
    return {
        "conv2d": [(t(X), t(W), bias, *CONV), (t(X), t(W), None, *CONV)],
        "conv2d_relu": [(t(X), t(W), bias, t(MAP), *CONV), (t(X), t(W), None, None, *CONV)],
        "conv2d_relu_max_pool2d": [(t(X), t(W), bias, *CONV, *POOL_2X2)],
        "conv2d_prepared": [
            (t(X), t(W), t((0, 0, 0, 0)), bias, t(MAP), *CONV, True, False),
            (t(X), t(W), t((0, 0, 0, 0)), None, None, *CONV, True, True),
        ],
        "conv2d_backward": [
            (t(MAP), *operands, list(X), list(W), layout == torch.channels_last, *CONV)
            for operands in ((t(X), t(W)), (None, t(W)), (t(X), None))
        ],
        "conv2d_backward_relu": [
            (t(MAP), t(X), t(W), *wanted, *CONV) for wanted in ((True, True), (True, False), (False, True))
        ],
        "conv2d_relu_weight_grad": [
            (t(MAP), t(MAP), t(X), list(W), layout == torch.channels_last, with_bias, *CONV) for with_bias in (True, False)
        ],
        "conv2d_relu_max_pool2d_weight_grad": [
            (t((2, 4, 3, 1)), pooled, t(X), list(W), layout == torch.channels_last, with_bias, *CONV, *POOL_2X2)
            for with_bias in (True, False)
        ],
        "bias_grad": [(t(MAP),)],
        "relu_backward": [(t(MAP), t(MAP), True), (t(MAP), t(MAP), False)],
        "max_pool2d": [
            (t(X), *POOL, False),
            (t(X), *POOL, True),
            (t((2, 3, 5, 5)), [5, 5], [5, 5], [0, 0], [1, 1], False, True),
        ],
        "max_pool2d_backward": [(t(POOLED), codes, list(X), *POOL, True), (t(POOLED), codes, list(X), *POOL, False)],
        "avg_pool2d": [(t(X), *POOL, True, None), (t(X), *POOL, False, 5)],
        "avg_pool2d_backward": [(t(POOLED), list(X), *POOL, False, None, layout == torch.channels_last)],
        "global_avg_pool2d": [(t(X),), (t((3, 4, 1, 1)),)],
        "global_avg_pool2d_backward": [(t((2, 6, 1, 1)), 7, 8, layout == torch.channels_last)],
        **norm_samples(t, codes, device),
    }[op]


def norm_samples(t: Callable[..., Tensor], codes: Tensor, device: str) -> dict[str, list[tuple[Any, ...]]]:
    mean, var, w, b = (torch.rand(X[1], device=device) + 0.5 for _ in range(4))
    trained, evaluated = (None, None, w, b, t(X), True, 1e-5), (mean, var, None, None, None, False, 1e-5)
    saved = [(t(X), mean, var, w, True, 1e-5), (None, mean, var, None, False, 1e-5)]
    return {
        "batch_norm_relu": [(t(X), *trained), (t(X), *evaluated)],
        "batch_norm_relu_max_pool2d": [(t(X), *operands, *POOL) for operands in (trained, evaluated)],
        "batch_norm_relu_backward": [(t(X), t(X), *s, *wanted) for s in saved for wanted in ((True, True), (False, True))],
        "batch_norm_relu_max_pool2d_backward": [(t(POOLED), codes, list(X), *s, *POOL, True, True) for s in saved],
        "batch_norm_update": [(mean, var, w, b, 112, 0.1)],
    }


OPERATORS = [
    "conv2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "conv2d_prepared",
    "conv2d_backward",
    "conv2d_backward_relu",
    "conv2d_relu_weight_grad",
    "conv2d_relu_max_pool2d_weight_grad",
    "bias_grad",
    "relu_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
    "global_avg_pool2d",
    "global_avg_pool2d_backward",
    "batch_norm_relu",
    "batch_norm_relu_max_pool2d",
    "batch_norm_relu_backward",
    "batch_norm_relu_max_pool2d_backward",
    "batch_norm_update",
]


# All that opcheck does, and what of it can depend on a layout: a trace in a second one is a slow test.
EVERY = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAID_OUT = ("test_schema", "test_faketensor")


@pytest.mark.parametrize(
    ("layout", "checks"),
    [
        pytest.param(torch.channels_last, EVERY, id="channels_last"),
        pytest.param(torch.contiguous_format, LAID_OUT, id="contiguous"),
        pytest.param(torch.contiguous_format, EVERY, id="contiguous-traced", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("backend", ["aten", "native", "triton"])
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op: str, backend: str, layout: torch.memory_format, checks: tuple[str, ...], device: str) -> None:
    """Schema, fake (shapes, dtypes, strides), autograd registration and AOT dispatch with dynamic shapes."""
    with _unpoisoned():
        for args in samples(op, device, layout):
            torch.library.opcheck(getattr(ops, op).default, (*args, backend), test_utils=checks)


def test_opcheck_indices() -> None:
    with _unpoisoned():
        torch.library.opcheck(ops.max_pool2d_indices.default, (code(), list(X), *POOL))


class _unpoisoned:
    """opcheck runs an operator twice and compares bits; NaN would never be equal to itself."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(False)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)


def net(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, F: Any) -> Tensor:
    y = F.conv2d_relu_max_pool2d(x, w, b, padding=1)
    y = F.conv2d_relu(y, w2, None, 1, "same", residual=y)
    y = F.avg_pool2d(F.max_pool2d(F.conv2d(y, w2, b), 2, 1), 2)
    return F.global_avg_pool2d(y).flatten(1)


def operands(batch: int = 2, device: str = "cpu") -> list[Tensor]:
    shapes = [(batch, 3, 14, 12), (6, 3, 3, 3), (6,), (6, 6, 3, 3)]
    cl = torch.channels_last
    return [make(s, torch.float32, device, cl if len(s) == 4 else torch.contiguous_format) for s in shapes]


@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [
        # The backend is an argument of the operators, of which tracing sees nothing but the fakes, the same for all.
        pytest.param(dynamic, backend, marks=[pytest.mark.slow] * (dynamic and backend != "auto"))
        for dynamic in (False, True)
        for backend in ("auto", "aten", "native", "triton")
    ],
    ids=lambda value: ("static", "dynamic")[value] if isinstance(value, bool) else value,
)
def test_compiles_without_a_graph_break(backend: str, dynamic: bool, device: str) -> None:
    """aot_eager runs the traced forward and backward graphs: a gradient that tracing lost would show."""
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with fastconv.use_backend(backend):
        for batch in (2, 3):
            args = operands(batch, device)
            eager, traced = net(*args, FC), compiled(*args, FC)
            assert torch.equal(traced, eager)
            grad = torch.randn_like(eager)
            got, want = torch.autograd.grad(traced, args, grad), torch.autograd.grad(eager, args, grad)
            assert all(map(torch.equal, got, want))


def test_compiled_backward_runs_our_operators() -> None:
    graphs: list[set[str]] = []

    def record(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append({str(node.target) for node in module.graph.nodes if node.op == "call_function"})
        from functorch.compile import make_boxed_func

        return make_boxed_func(module.forward)

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(net, fullgraph=True, backend=backend)(*operands(), FC).sum().backward()
    forward, backward = graphs
    assert {f"fastconv.{op}.default" for op in ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d", "max_pool2d")} <= forward
    assert {f"fastconv.{op}.default" for op in ("conv2d_backward", "relu_backward", "max_pool2d_backward")} <= backward


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["recipe", "vgg"])
def test_inductor_trains_a_whole_net(layers: str) -> None:
    """torch.compile's own backend: our operators keep their strides between generated kernels."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = fastconv.models.recipe_net(32, width=16, max_width=32) if layers == "recipe" else fastconv.models.vgg(11)
    net = net.to(memory_format=torch.channels_last).eval()  # no dropout
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    compiled = torch.compile(net, fullgraph=True)
    grads = []
    for run in (net, compiled):
        net.zero_grad()
        output = run(x)
        output.square().sum().backward()
        grads.append([output.detach(), *(p.grad for p in net.parameters())])
    for eager, traced in zip(*grads, strict=True):
        assert_close(traced, eager.double(), torch.float32, 512 * 9)


def test_export() -> None:
    net = fastconv.models.recipe_net(32, width=16, max_width=32).eval()
    x = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    assert any("fastconv.conv2d_relu_max_pool2d" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 3, 32, 32)
    assert torch.equal(program.module()(x), net(x))


def test_symbolic_trace() -> None:
    """torch.fx's proxies pass through the functionals, which stay one node each."""
    net = fastconv.models.recipe_net(8, width=8, max_width=8)
    traced = torch.fx.symbolic_trace(net)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert FC.conv_chain in called and FC.global_avg_pool2d in called
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(traced(x), net(x))


def test_flop_counter_counts_as_for_torch() -> None:
    args = operands()
    with FlopCounterMode(display=False) as ours:
        net(*args, FC).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        net(*args, reference).sum().backward()
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


def test_flops_of_a_geometry() -> None:
    g = ConvGeometry.of("conv2d", (2, 8, 10, 10), (16, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 2)
    assert g.flops() == 2 * (2 * 10 * 10) * 16 * 4 * 9
    assert g.bytes_moved(2) == 2 * (2 * 8 * 100 + 16 * 4 * 9 + 2 * 16 * 100)


def test_profiler_shows_readable_names() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(*operands(), FC).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastconv::conv2d_relu_max_pool2d", "fastconv::conv2d_backward", "fastconv::relu_backward"} <= names
