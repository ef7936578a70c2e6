"""What only a GPU can show: real layers on each family of kernels, CUDA graphs, streams, no waiting, determinism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import fastconv
from fastconv import models
from fastconv.backends import aten, native, native_cuda, native_library, triton
from fastconv.backends.triton_launch import chip
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate
from fastconv.tuning.candidates import triton_candidates

pytestmark = pytest.mark.gpu

# Input channels, output channels, side of the map: VGG16's, and the recipe net's last.
LAYERS = [
    (3, 64, 224),
    (64, 64, 224),
    (64, 128, 112),
    (128, 256, 56),
    (256, 256, 56),
    (512, 512, 28),
    (512, 512, 14),
    (512, 512, 7),
]
BATCH = 4
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _first_of_each_family(op: str, direction: str, g: ConvGeometry, policy: Policy) -> Iterator[Candidate]:
    seen: set[str] = set()
    for plan in triton_candidates(op, direction, g, policy, chip(torch.device("cuda", 0))):
        if plan.kernel not in seen:
            seen.add(plan.kernel)
            yield plan


def _backend(name: str) -> Any:
    """A parameter, skipped where the native backend has no CUDA library."""
    reason = native_library.unavailable_cuda() if name == "native" else None
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


def _random(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(native_library.unavailable_cuda() is not None, reason=str(native_library.unavailable_cuda()))
@pytest.mark.parametrize("tile", [1, 2], ids=["small", "large"])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_on_native_kernels(
    layer: tuple[int, int, int], dtype: torch.dtype, tf32: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every direction against float64, and the same bits in twenty runs."""
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 is of float32")
    monkeypatch.setattr(native_cuda, "tile", tile)
    channels, out_channels, side = layer
    one = (1, 1)
    g = ConvGeometry.of("conv", (BATCH, channels, side, side), (out_channels, channels, 3, 3), None, one, one, one, 1)
    pool = PoolGeometry.of("pool", g.output_shape, (2, 2), (2, 2), (0, 0), one, False)
    policy, wide = Policy(dtype, tf32=tf32), Policy(torch.float64)
    products = 9 * channels
    x, weight = _random(g.input_shape, dtype).relu(), _random(g.weight_shape, dtype, products**-0.5)
    bias, grad = torch.randn(out_channels, device="cuda").to(dtype), _random(g.output_shape, dtype, g.out_pixels**-0.5)
    residual = _random(g.output_shape, dtype)
    exact = [t.double() for t in (x, weight, bias, residual, grad)]
    unpooled = aten.conv2d(*exact[:3], None, g, wide, False)
    calls = (
        (
            products,
            aten.conv2d(*exact[:4], g, wide, True),
            lambda: native.conv2d(x, weight, bias, residual, g, policy, True),
        ),
        (
            products,
            aten.max_pool2d(unpooled, pool, True)[0],
            lambda: native.conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy)[0],
        ),
        (
            g.out_pixels,
            aten.conv2d_weight_grad(exact[4], exact[0], g, wide),
            lambda: native.conv2d_weight_grad(grad, x, g, policy),
        ),
        (
            9 * out_channels,
            aten.conv2d_input_grad(exact[4], exact[1], g, wide),
            lambda: native.conv2d_input_grad(grad, weight, g, policy),
        ),
    )
    for reduction, expected, call in calls:
        results = [call() for _ in range(20)]
        assert all(torch.equal(results[0], other) for other in results[1:]), "runs differ"
        assert_close(results[0], expected, dtype, reduction, tf32=tf32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_on_each_family(layer: tuple[int, int, int], dtype: torch.dtype) -> None:
    channels, out_channels, side = layer
    one = (1, 1)
    g = ConvGeometry.of("conv", (BATCH, channels, side, side), (out_channels, channels, 3, 3), None, one, one, one, 1)
    pool = PoolGeometry.of("pool", g.output_shape, (2, 2), (2, 2), (0, 0), one, False)
    policy, wide = Policy(dtype, tf32=dtype == torch.float32), Policy(torch.float64)
    products = 9 * channels
    x, weight = _random(g.input_shape, dtype).relu(), _random(g.weight_shape, dtype, products**-0.5)
    bias, grad = torch.randn(out_channels, device="cuda").to(dtype), _random(g.output_shape, dtype, g.out_pixels**-0.5)
    exact = [t.double() for t in (x, weight, bias, grad)]

    expected = aten.conv2d(*exact[:3], None, g, wide, True)
    for plan in _first_of_each_family("conv2d_relu", "forward", g, policy):
        y = triton.conv2d(x, weight, bias, None, g, policy, True, plan=plan)
        assert_close(y, expected, dtype, products, f"{plan}", tf32=policy.tf32)
    pooled = aten.max_pool2d(expected, pool, True)[0]
    for plan in _first_of_each_family("conv2d_relu_max_pool2d", "forward", g, policy):
        y, code = triton.conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, plan=plan)
        assert_close(y, pooled, dtype, products, f"{plan}", tf32=policy.tf32)
        assert code.max() <= 4
    expected = aten.conv2d_weight_grad(exact[3], exact[0], g, wide)
    for plan in _first_of_each_family("conv2d", "weight_grad", g, policy):
        results = [triton.conv2d_weight_grad(grad, x, g, policy, plan=plan) for _ in range(2)]
        assert torch.equal(*results), f"{plan}: two runs differ"
        assert_close(results[0], expected, dtype, g.out_pixels, f"{plan}", tf32=policy.tf32)
    if channels == 3:
        return
    expected = aten.conv2d_input_grad(exact[3], exact[1], g, wide)
    for plan in _first_of_each_family("conv2d", "input_grad", g, policy):
        grad_x = triton.conv2d_input_grad(grad, weight, g, policy, plan=plan)
        assert_close(grad_x, expected, dtype, 9 * out_channels, f"{plan}", tf32=policy.tf32)
    expected = expected.masked_fill(x <= 0, 0)
    for plan in _first_of_each_family("conv2d_relu", "input_grad", g, policy):
        masked, sums = triton.conv2d_input_grad_relu(grad, weight, x, g, policy, True, plan=plan)
        assert_close(masked, expected, dtype, 9 * out_channels, f"{plan}", tf32=policy.tf32)
        scale = expected.square().sum((0, 2, 3)).mean().sqrt().item()
        reduction = 9 * out_channels * g.out_pixels
        assert_close(sums, expected.sum((0, 2, 3)), dtype, reduction, f"{plan}: sums", tf32=policy.tf32, scale=scale)


def _step(backend: str) -> tuple[Callable[[], None], list[Tensor]]:
    """A training step of the recipe net without an optimizer, and the gradients that it leaves."""
    net = models.recipe_net(64).cuda().bfloat16().to(memory_format=torch.channels_last)
    x = _random((8, 3, 64, 64), torch.bfloat16)

    def step() -> None:
        with fastconv.use_backend(backend):
            net(x).float().square().mean().backward()

    step()
    return step, [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend", [_backend("triton"), _backend("native"), _backend("auto")])
def test_a_step_in_a_cuda_graph(backend: str) -> None:
    step, grads = _step(backend)
    for grad in grads:
        grad.zero_()
    step()
    expected = [grad.clone() for grad in grads]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for grad in grads:
            grad.zero_()
        step()
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("backend", [_backend("triton"), _backend("native"), _backend("auto")])
def test_a_step_waits_for_nothing(backend: str) -> None:
    step, _ = _step(backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [_backend("triton"), _backend("native")])
def test_a_step_is_bitwise_deterministic(backend: str) -> None:
    step, grads = _step(backend)
    results = []
    for _ in range(20):
        for grad in grads:
            grad.zero_()
        step()
        results.append([grad.clone() for grad in grads])
    assert all(torch.equal(one, first) for others in results for one, first in zip(others, results[0], strict=True))


@pytest.mark.parametrize("backend", [_backend("triton"), _backend("native")])
def test_launches_go_to_the_current_stream(backend: str) -> None:
    x, weight = _random((8, 64, 56, 56), torch.bfloat16), _random((64, 64, 3, 3), torch.bfloat16, 1 / 24)
    with fastconv.use_backend(backend), torch.no_grad():
        fastconv.functional.conv2d_relu(x, weight, padding=1)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # clock cycles: a tenth of a second in which the input is not there yet
            late = x * 2
            y = fastconv.functional.conv2d_relu(late, weight, padding=1)
        assert not stream.query(), "nothing waited"
        stream.synchronize()
        expected = fastconv.functional.conv2d_relu(x * 2, weight, padding=1)
    assert torch.equal(y, expected)


def _operands(device: str) -> tuple[Tensor, Tensor]:
    x, weight = _random((8, 64, 56, 56), torch.bfloat16), _random((64, 64, 3, 3), torch.bfloat16, 1 / 24)
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_()


def _there_and_back(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = fastconv.functional.conv2d_relu_max_pool2d(x, weight, padding=1)
    return y, *torch.autograd.grad(y.float().square().sum(), (x, weight))


@pytest.mark.parametrize("backend", [_backend("triton"), _backend("native")])
def test_two_streams_at_once(backend: str) -> None:
    """Neither's scratch is the other's."""
    operands = [_operands("cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in operands]
    with fastconv.use_backend(backend):
        expected = [_there_and_back(*each) for each in operands]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        results = []
        for _ in range(10):
            for stream, each, wanted in zip(streams, operands, expected, strict=True):
                with torch.cuda.stream(stream):
                    results.append((_there_and_back(*each), wanted))
    torch.cuda.synchronize()
    for got, wanted in results:
        assert all(map(torch.equal, got, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", [_backend("triton"), _backend("native"), _backend("auto")])
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    operands = _operands("cuda:1")
    with fastconv.use_backend(backend):
        got = _there_and_back(*operands)
        assert torch.cuda.current_device() == 0
        with torch.cuda.device(1):
            wanted = _there_and_back(*operands)
    for one, other in zip(got, wanted, strict=True):
        assert one.device == torch.device("cuda", 1)
        if backend != "auto":  # cuDNN's weight gradients may differ from run to run
            assert torch.equal(one, other)
