"""Winograd's convolutions in C++ against float64: numbers, what is not finite, reproducibility, and when they are chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

import fastconv
from fastconv import tuning
from fastconv.backends import native
from fastconv.bench.gate import bounds
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate, cpu

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = (
    ("conv2d", "forward"),
    ("conv2d_relu", "forward"),
    ("conv2d_relu_max_pool2d", "forward"),
    ("conv2d", "input_grad"),
    ("conv2d", "weight_grad"),
)

# batch, channels, height, width, out_channels, padding
SIZES = {
    "one pixel": (1, 1, 1, 1, 1, 1),
    "one tile": (2, 16, 4, 4, 32, 1),
    "odd": (3, 67, 9, 7, 45, 1),
    "unpadded": (1, 5, 6, 5, 3, 0),
    "wide padding": (2, 33, 13, 4, 130, 2),
    "uneven padding": (2, 24, 6, 9, 40, (0, 2)),
    "by tiles": (2, 32, 36, 32, 48, 1),
    "runs of tiles": (4, 20, 64, 66, 17, 1),
    "several chunks": (3, 264, 40, 41, 257, 1),
}
QUICK = tuple(name for name in SIZES if name != "several chunks")


def geometry(name: str) -> ConvGeometry:
    batch, channels, height, width, out_channels, padding = SIZES[name]
    padding = padding if isinstance(padding, tuple) else (padding, padding)
    shapes = (batch, channels, height, width), (out_channels, channels, 3, 3)
    return ConvGeometry.of("test", *shapes, None, (1, 1), padding, (1, 1), 1)


def pooling(g: ConvGeometry, ceil_mode: bool) -> PoolGeometry:
    return PoolGeometry.of("max_pool2d", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), ceil_mode)


def pools(g: ConvGeometry) -> dict[str, bool]:
    """Launches with a pool, and whether its windows may hang over."""
    return {"pool": False, "pool ceil": True} if min(g.out_height, g.out_width) >= 2 else {"pool ceil": True}


@contextmanager
def winograd(g: ConvGeometry, dtype: torch.dtype) -> Iterator[None]:
    """Everything but the forced algorithm is as it is for a caller."""
    candidate = Candidate("native", "winograd")
    remembered = tuning.pick
    try:
        tuning.pick = lambda *call: (candidate,)
        tuning.forget()
        yield
    finally:
        tuning.pick = remembered
        tuning.forget()


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


class Operands:
    """Fresh random operands of a geometry, and each launcher's call on them."""

    def __init__(self, g: ConvGeometry, dtype: torch.dtype) -> None:
        self.g, self.policy = g, Policy(dtype)
        self.x, self.grad = normal(*g.input_shape, dtype=dtype), normal(*g.output_shape, dtype=dtype)
        self.weight, self.bias = normal(*g.weight_shape, dtype=dtype), normal(g.out_channels, dtype=dtype)
        self.residual = normal(*g.output_shape, dtype=dtype)

    def launches(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        g, p = self.g, self.policy
        calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "forward": lambda: (native.conv2d(self.x, self.weight, self.bias, None, g, p, False),),
            "plain": lambda: (native.conv2d(self.x, self.weight, None, None, g, p, False),),
            "relu": lambda: (native.conv2d(self.x, self.weight, self.bias, self.residual, g, p, True),),
            "input": lambda: (native.conv2d_input_grad(self.grad, self.weight, g, p),),
            "weight": lambda: (native.conv2d_weight_grad(self.grad, self.x, g, p),),
            "both": lambda: native.conv2d_backward(self.grad, self.x, self.weight, g, p),
        }
        for name, ceil_mode in pools(g).items():
            pool = pooling(g, ceil_mode)
            calls[name] = partial(native.conv2d_relu_max_pool2d, self.x, self.weight, self.bias, g, pool, p)
        return calls

    def run(self, name: str) -> tuple[Tensor, ...]:
        with winograd(self.g, self.policy.dtype):
            return self.launches()[name]()

    def conv(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> Tensor:
        return F.conv2d(self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype) if bias else None, 1, self.g.padding)

    def backward(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        x, weight = self.x.to(dtype), self.weight.to(dtype)
        input_grad = torch.nn.grad.conv2d_input(x.shape, weight, self.grad.to(dtype), 1, self.g.padding)
        return input_grad, torch.nn.grad.conv2d_weight(x, weight.shape, self.grad.to(dtype), 1, self.g.padding)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, reduction: int, what: str) -> None:
    assert_close(actual, expected, dtype, reduction, what, scale=1.0, transformed=True)  # of one pixel, terms may cancel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_forward(name: str, dtype: torch.dtype) -> None:
    g = geometry(name)
    o = Operands(g, dtype)
    reduction = 9 * g.in_channels
    close(o.run("forward")[0], o.conv(), dtype, reduction, "conv2d")
    close(o.run("plain")[0], o.conv(bias=False), dtype, reduction, "without bias")
    close(o.run("relu")[0], (o.conv() + o.residual.double()).relu(), dtype, reduction, "residual, ReLU")
    for launch, ceil_mode in pools(g).items():
        pooled, code = o.run(launch)
        close(pooled, F.max_pool2d(o.conv().relu(), 2, ceil_mode=ceil_mode), dtype, reduction, launch)
        assert code.dtype == torch.uint8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_backward(name: str, dtype: torch.dtype) -> None:
    g = geometry(name)
    o = Operands(g, dtype)
    input_grad, weight_grad = o.backward()
    close(o.run("input")[0], input_grad, dtype, 9 * g.out_channels, "input gradient")
    close(o.run("weight")[0], weight_grad, dtype, g.out_pixels, "weight gradient")
    both = o.run("both")
    assert torch.equal(both[0], o.run("input")[0]) and torch.equal(both[1], o.run("weight")[0])


@pytest.mark.parametrize("name", QUICK)
def test_pool_takes_the_winner_of_the_unpooled_map(name: str) -> None:
    """In float32 the fused pool is bitwise the pool of the map that it does not write."""
    g = geometry(name)
    o = Operands(g, torch.float32)
    for launch, ceil_mode in pools(g).items():
        wanted = native.max_pool2d(o.run("forward")[0], pooling(g, ceil_mode), relu=True)
        assert all(torch.equal(got, want) for got, want in zip(o.run(launch), wanted, strict=True)), launch


VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "overflow": 3e37}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["x", "weight", "grad"])
@pytest.mark.parametrize("name", ["odd", "by tiles", "runs of tiles"])
def test_what_is_not_finite_stays_in_its_place(name: str, where: str, value: str) -> None:
    """NaN and infinities come out exactly where a direct float32 sum has them, and nothing near them is touched.

    3e37 is finite, and its products here are; the transforms of it are not.
    """
    g = geometry(name)
    o = Operands(g, torch.float32)
    for tensor in (o.x, o.weight, o.grad):
        tensor.mul_(0.1)
    flat = getattr(o, where).permute(0, 2, 3, 1).reshape(-1)
    flat[torch.randint(flat.numel(), (3,))] = VALUES[value]
    input_grad, weight_grad = o.backward(torch.float32)
    wanted = {"plain": o.conv(torch.float32, bias=False), "input": input_grad, "weight": weight_grad}
    for launch, want in wanted.items():
        got = o.run(launch)[0]
        odd = ~want.isfinite()
        assert torch.equal(got[odd].isnan(), want[odd].isnan()), f"{launch}: NaN"
        assert torch.equal(got[odd].nan_to_num(), want[odd].nan_to_num()), f"{launch}: infinities"
        small = want.isfinite() & (want.abs() < 1e3)  # beside a value of 1e36 in its own sum nothing is left of the others
        assert got[want.isfinite()].isfinite().all(), launch
        allowed = bounds(torch.float32, 9 * 67 + g.out_pixels, transformed=True)[1] * want[small].square().mean().sqrt()
        if value != "overflow":
            assert (got[small] - want[small]).abs().max() <= allowed, launch


def test_relu_and_pool_keep_nan() -> None:
    g = geometry("odd")
    o = Operands(g, torch.float32)
    o.x[1, 3, 4, 4] = float("nan")
    conv = o.conv(torch.float32)
    got = o.run("relu")[0]
    assert torch.equal(got.isnan(), (conv + o.residual).isnan())
    pooled, code = o.run("pool")
    expected, codes = native.max_pool2d(conv, pooling(g, False), relu=True)
    assert torch.equal(pooled.isnan(), expected.isnan()) and expected.isnan().any()
    assert torch.equal(code[expected.isnan()], codes[expected.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["odd", "by tiles", "runs of tiles", "several chunks"])
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    if name == "several chunks" and dtype != torch.float32:
        pytest.skip("one dtype is enough: work is shared out alike")
    o = Operands(geometry(name), dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (2, 2, 1, 4, 3):
            torch.set_num_threads(threads)
            results.append([tensor for launch in o.launches() for tensor in o.run(launch)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_of_several_threads_do_not_meet() -> None:
    o = Operands(geometry("by tiles"), torch.float32)
    with winograd(o.g, torch.float32):
        launches = {name: launch for name, launch in o.launches().items() if name in ("relu", "pool", "pool ceil", "both")}
        alone = {name: launch() for name, launch in launches.items()}
        wrong: list[str] = []

        def work() -> None:
            for _ in range(10):
                for name, launch in launches.items():
                    if not all(torch.equal(a, b) for a, b in zip(alone[name], launch(), strict=True)):
                        wrong.append(name)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


# With AVX-512 a machine runs the tests above by it.
@pytest.mark.parametrize("capability", ["default", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(capability: str) -> None:
    """Every instruction set that this machine runs is right, tails and all; bits may differ between them."""
    code = (
        "import test_native_winograd as t, torch\n"
        "print(t.native.library().cpu_capability())\n"
        "for name in t.QUICK:\n"
        "    for dtype in t.DTYPES:\n"
        "        torch.manual_seed(1)\n"
        "        t.test_forward(name, dtype); t.test_backward(name, dtype)\n"
        "t.test_what_is_not_finite_stays_in_its_place('odd', 'x', 'inf')\n"
        "t.test_bits_do_not_depend_on_threads('odd', torch.float32)\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert capability != "default" or run.stdout.strip() == "default"


# channels in and out, map: the error of each direction as a relative norm against float64, for the table in the README
ERRORS = [(16, 16, 32), (64, 64, 32), (128, 128, 28), (256, 256, 14), (512, 512, 7)]


@pytest.mark.parametrize("channels,out_channels,size", ERRORS)
def test_error_stays_below_the_promise(channels: int, out_channels: int, size: int) -> None:
    """At most 1e-5, masks of ReLU and winners of pools not being part of it; and 'ieee' sums directly."""
    shapes = (2, channels, size, size), (out_channels, channels, 3, 3)
    g = ConvGeometry.of("test", *shapes, None, (1, 1), (1, 1), (1, 1), 1)
    o = Operands(g, torch.float32)
    input_grad, weight_grad = o.backward()
    wanted = {"forward": o.conv(), "input": input_grad, "weight": weight_grad}
    for launch, want in wanted.items():
        error = ((o.run(launch)[0].double() - want).norm() / want.norm()).item()
        assert 1e-8 < error <= 1e-5, f"{launch}: {error:.1e}"


def names(g: ConvGeometry, policy: Policy, op: str = "conv2d_relu", direction: str = "forward") -> list[str]:
    return [c.kernel for c in tuning.candidates(op, direction, g, policy, "cpu", True) if c.backend == "native"]


def test_when_it_is_chosen() -> None:
    def of(channels: int, out_channels: int, size: int, batch: int = 8, **other: int) -> ConvGeometry:
        stride, dilation, groups = other.get("stride", 1), other.get("dilation", 1), other.get("groups", 1)
        weight = (out_channels, channels // groups, other.get("kernel", 3), 3)
        shape = (batch, channels, size, size)
        return ConvGeometry.of("test", shape, weight, None, (stride, stride), (1, 1), (dilation, dilation), groups)

    exact = Policy(torch.float32)
    for op, direction in OPS:
        assert names(of(64, 64, 56), exact, op, direction)[0] == "winograd"
        assert names(of(8, 8, 56), exact, op, direction)[0] == ""
        for other in ({"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel": 1}):
            assert "winograd" not in names(of(64, 64, 56, **other), exact, op, direction)
    assert names(of(64, 64, 56), exact, "conv2d", "bias_grad") == [""]
    assert "winograd" not in names(of(64, 64, 56), Policy(torch.float32, direct=True))
    assert names(of(64, 64, 5, batch=1), exact)[0] == ""  # of four tiles most hangs over


def test_ieee_sums_directly() -> None:
    x, weight = normal(2, 64, 24, 24, dtype=torch.float32), normal(64, 64, 3, 3, dtype=torch.float32)
    exact = F.conv2d(x.double(), weight.double(), None, 1, 1)
    errors = {}
    for mode in ("fast", "ieee"):
        with fastconv.set_precision(mode):
            output = fastconv.functional.conv2d(x, weight, None, 1, 1)
        errors[mode] = ((output.double() - exact).norm() / exact.norm()).item()
    assert errors["ieee"] < 0.7 * errors["fast"]
    assert cpu.algorithms("forward", geometry("by tiles"), Policy(torch.float32, direct=True)) == ("",)
