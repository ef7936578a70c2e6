"""What nvcc makes of the CUDA kernels, run on a CPU: its PTX, translated, against g++'s kernels and plain torch in float64.

Inline assembly, which g++ does not see, is in it as nvcc has it. Convolutions are translated for every kind of product,
passes for bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import report
import torch
from emu import build, ptx_build
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, native, native_cuda, native_norm
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

pytestmark = pytest.mark.skipif(ptx_build.unavailable() is not None, reason=str(ptx_build.unavailable()))

BF16 = torch.bfloat16
WIDE = Policy(torch.float64)
Shape = tuple[int, ...]
Make = Callable[[Shape, torch.dtype], Tensor]

# input, weight, stride, padding, dilation, groups; where channels are not multiples of 8, elements are copied one by one
CONVS = {
    "3x3": ((2, 16, 7, 6), (24, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride 2": ((1, 16, 9, 8), (8, 16, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "grouped": ((2, 16, 6, 6), (32, 8, 3, 3), (1, 1), (0, 1), (2, 1), 2),
    "several tiles": ((2, 72, 9, 8), (136, 72, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "elements": ((1, 5, 8, 9), (7, 5, 3, 3), (2, 1), (1, 1), (1, 1), 1),
    "grouped elements": ((2, 6, 7, 7), (9, 2, 3, 3), (1, 1), (1, 1), (1, 1), 3),
}
# Groups of few channels: windows that slide and others, by vectors and by single channels.
NARROW = {
    **{f"depthwise {k}x{k}": ((1, 16, 9, 8), (16, 1, k, k), (1, 1), (1, 1), (1, 1), 16) for k in (3, 5, 7)},
    "depthwise, stride 2": ((1, 16, 9, 8), (16, 1, 3, 3), (2, 2), (1, 1), (1, 1), 16),
    **{f"groups of {c}": ((1, 16, 7, 6), (16, c, 3, 3), (1, 1), (1, 1), (1, 1), 16 // c) for c in (2, 4, 8)},
    "depthwise elements": ((1, 5, 7, 6), (5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
    "narrow elements": ((1, 6, 7, 6), (4, 3, 2, 3), (1, 2), (1, 1), (1, 1), 2),
}
PRODUCTS = {
    "bf16": Policy(BF16),
    "f16": Policy(torch.float16),
    "tf32": Policy(torch.float32, tf32=True),
    "ieee": Policy(torch.float32),
}
CASES = [
    (case, product, tile)
    for case in CONVS
    for product in PRODUCTS
    for tile in (1, 2)  # small, large; only vectors and tensor cores have large ones
    if tile == 1 or ("elements" not in case and product != "ieee")
] + [(case, "bf16", 0) for case in NARROW]


@pytest.fixture(scope="module")
def translated() -> Iterator[ptx_build.Machine]:
    machine = ptx_build.machine()
    machine.set_schedule(1)  # lanes run in another order than in the library that they are compared with
    yield machine
    kernels, counts = machine.kernels.values(), machine.counts()
    report.note(
        f"PTX of {len(ptx_build.SOURCES)} CUDA files: {len(kernels)} kernels translated, {machine.ran()} of them run, "
        f"{sum(k.instructions.total() for k in kernels):,} instructions; {counts['launches']:,} launches of "
        f"{counts['blocks']:,} blocks, {counts['multiplications']:,} mma, {counts['matrix_loads']:,} ldmatrix, "
        f"{counts['async_copies']:,} cp.async"
    )


def integers(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Sums of their products are exact in float32, so that no order and no fusing changes them."""
    return torch.randint(-3, 4, shape).to(dtype).contiguous(memory_format=torch.channels_last)


def random(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def few_values(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Ties, zeros of both signs, infinities and NaN."""
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, 2.0, torch.inf, torch.nan], dtype=dtype)
    return values[torch.randint(0, len(values), shape)].contiguous(memory_format=torch.channels_last)


def flat(results: Any) -> list[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results or () for tensor in flat(result)]


def double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_same(actual: Any, expected: Any, what: str) -> None:
    assert len(flat(actual)) == len(flat(expected)) > 0
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


class Convolution:
    """The operands of a convolution and of its gradients, and what the launchers make of them."""

    def __init__(self, case: str, product: str, make: Make) -> None:
        x, weight, *window = (CONVS | NARROW)[case]
        self.policy = PRODUCTS[product]
        self.g = g = ConvGeometry.of("test", x, weight, None, *window)
        self.pool = PoolGeometry.of("test", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
        dtype = self.policy.dtype
        shapes = (g.input_shape, g.weight_shape, g.output_shape, g.output_shape)
        self.x, self.weight, self.grad, self.residual = (make(shape, dtype) for shape in shapes)
        self.bias = make((1, g.out_channels, 1, 1), dtype).flatten()

    def run(self, tile: int) -> dict[str, Any]:
        before, native_cuda.tile = native_cuda.tile, tile
        x, weight, grad, g, policy = self.x, self.weight, self.grad, self.g, self.policy
        try:
            return {
                "forward": native.conv2d(x, weight, self.bias, self.residual, g, policy, True),
                "no bias": native.conv2d(x, weight, None, None, g, policy, False),
                "pool": native.conv2d_relu_max_pool2d(x, weight, self.bias, g, self.pool, policy),
                "input gradient": native.conv2d_input_grad(grad, weight, g, policy),
                "weight gradient": native.conv2d_weight_grad(grad, x, g, policy),
            }
        finally:
            native_cuda.tile = before

    def oracle(self) -> dict[str, tuple[Tensor, int]]:
        """Values, and of how many products."""
        x, weight, grad, bias, residual = map(double, (self.x, self.weight, self.grad, self.bias, self.residual))
        g = self.g
        unpooled = aten.conv2d(x, weight, bias, None, g, WIDE, False)
        products = g.taps * g.group_in_channels
        return {
            "forward": (aten.conv2d(x, weight, bias, residual, g, WIDE, True), products),
            "no bias": (aten.conv2d(x, weight, None, None, g, WIDE, False), products),
            "pool": (aten.max_pool2d(unpooled, self.pool, True)[0], products),
            "input gradient": (aten.conv2d_input_grad(grad, weight, g, WIDE), g.taps * g.group_out_channels),
            "weight gradient": (aten.conv2d_weight_grad(grad, x, g, WIDE), g.out_pixels),
        }


@pytest.mark.parametrize("case, product, tile", CASES)
class TestConvolution:
    def test_exact(self, case: str, product: str, tile: int, machine: build.Machine, translated: ptx_build.Machine) -> None:
        operands = Convolution(case, product, integers)
        with machine.serving():
            expected = operands.run(tile)
        with translated.serving():
            actual = operands.run(tile)
        for name in expected:
            assert_same(actual[name], expected[name], name)

    def test_random(self, case: str, product: str, tile: int, translated: ptx_build.Machine) -> None:
        operands = Convolution(case, product, random)
        with translated.serving():
            actual = operands.run(tile)
        policy = operands.policy
        for name, (expected, reduction) in operands.oracle().items():
            assert_close(flat(actual[name])[0], expected, policy.dtype, reduction, name, tf32=policy.tf32)


def pool_of(shape: Shape, kernel: int, stride: int, padding: int = 0) -> PoolGeometry:
    return PoolGeometry.of("test", shape, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), False)


def passes(channels: int, make: Make) -> dict[str, tuple[Any, ...]]:
    """Launchers of native and aten, with operands: by `channels`, their kernels read vectors or elements."""
    shape = (2, channels, 7, 6)
    disjoint, overlapping, many = pool_of(shape, 2, 2), pool_of(shape, 3, 2, 1), pool_of((1, channels, 9, 10), 17, 7, 8)
    x, gate, residual = (make(shape, BF16) for _ in range(3))
    small, middle, large = (make(pool.output_shape, BF16) for pool in (disjoint, overlapping, many))
    maps = {pool: make(pool.input_shape, BF16) for pool in (disjoint, overlapping, many)}
    codes = {pool: aten.max_pool2d(values, pool, True)[1] for pool, values in maps.items()}
    mean, weight, bias = torch.randint(-3, 4, (3, channels)).float().unbind()
    var = torch.full((channels,), 4.0)  # whose root is exact, as eps is 0
    statistics, norm = (mean, var), (weight, bias.to(BF16), residual, 0.0)
    backward = (x, statistics, weight, 0.0, False)
    return {
        "relu_backward": (x, gate, True),
        "bias_grad": (x,),
        "max_pool2d": (maps[overlapping], overlapping, True),
        "max_pool2d, many": (maps[many], many, False),
        "max_pool2d_backward": (small, codes[disjoint], disjoint, True),
        "max_pool2d_backward, int32": (small, codes[disjoint].int(), disjoint, False),
        "max_pool2d_backward, overlapping": (middle, codes[overlapping], overlapping, True),
        "max_pool2d_backward, many": (large, codes[many], many, False),
        "avg_pool2d": (x, disjoint, True, None),
        "avg_pool2d, divisor": (x, overlapping, True, 4),
        "avg_pool2d_backward": (small, disjoint, False, None),
        "avg_pool2d_backward, divisor": (middle, overlapping, True, 4),
        "global_avg_pool2d": (make((2, channels, 8, 4), BF16),),
        "global_avg_pool2d_backward": (make((2, channels, 1, 1), BF16), 4, 2),
        "batch_norm_relu": (x, statistics, *norm),
        "batch_norm_relu_max_pool2d": (x, statistics, *norm, disjoint),
        "batch_norm_relu_backward": (gate, x, *backward, None, True, True),
        "batch_norm_relu_max_pool2d_backward": (small, codes[disjoint], *backward, disjoint, True, False),
    }


def launch(backend: Any, name: str, operands: Any) -> Any:
    function = name.split(",")[0]
    if "batch_norm" in function and "backward" in function:
        function = "batch_norm_relu_backward"  # of maps and of pools
    return getattr(backend, function)(*operands)


@pytest.mark.parametrize("channels", [40, 5], ids=["vectors", "elements"])
class TestPasses:
    @pytest.mark.parametrize("make", [integers, few_values])
    def test_exact(self, channels: int, make: Make, machine: build.Machine, translated: ptx_build.Machine) -> None:
        for name, operands in passes(channels, make).items():
            with machine.serving():
                expected = launch(native, name, operands)
            with translated.serving():
                assert_same(launch(native, name, operands), expected, name)

    def test_random(self, channels: int, translated: ptx_build.Machine) -> None:
        for name, operands in passes(channels, random).items():
            expected = flat(launch(aten, name, double(operands)))
            with translated.serving():
                actual = flat(launch(native, name, operands))
            for got, want in zip(actual, expected, strict=True):
                if got.is_floating_point():
                    assert_close(got, want, got.dtype, 84, name, scale=8)
                else:
                    assert torch.equal(got, want) or "batch_norm" in name, name

    def test_training(self, channels: int, machine: build.Machine, translated: ptx_build.Machine) -> None:
        """Batch normalisation by statistics of its own: nvcc fuses products into sums, so no bits are compared."""
        shape = (2, channels, 7, 6)
        x, grad, gate = (random(shape, BF16) for _ in range(3))
        weight = torch.rand(channels) + 0.5
        pool = pool_of(shape, 2, 2)
        code = aten.max_pool2d(gate, pool, True)[1]
        with translated.serving():
            statistics = native_norm._batch_statistics(x)
            output, _ = native.batch_norm_relu(x, None, weight, None, None, 1e-3)
            saved = (x, statistics, weight, 1e-3, True)
            calls = [(grad, gate, *saved, None, True, True), (small_of(grad, pool), code, *saved, pool, True, False)]
            gradients = [native.batch_norm_relu_backward(*call) for call in calls]
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        for got, want in zip(statistics, (mean, var), strict=True):
            assert_close(got, want, torch.float32, 84, "statistics", scale=1)
        assert_close(output, aten.batch_norm_relu(x.double(), None, weight.double(), None, None, 1e-3)[0], BF16, 84, scale=4)
        for got, call in zip(gradients, calls, strict=True):
            for actual, expected in zip(flat(got), flat(aten.batch_norm_relu_backward(*double(call))), strict=True):
                assert_close(actual, expected, actual.dtype, 168, "gradient", scale=10)

    def test_update(self, channels: int, machine: build.Machine, translated: ptx_build.Machine) -> None:
        """A momentum of ½ and two values, whose unbiased variance is twice the biased one: exact."""
        results = []
        batch = torch.randint(-3, 4, (2, channels)).float()
        for served in (machine, translated):
            running = torch.arange(2.0 * channels).to(BF16).view(2, channels)
            with served.serving():
                native.batch_norm_update(running[0], running[1], batch[0], batch[1], 2, 0.5)
            results.append(running)
        assert_same(results[1], results[0], "running statistics")


def small_of(grad: Tensor, pool: PoolGeometry) -> Tensor:
    return grad[..., : pool.out_height, : pool.out_width].contiguous(memory_format=torch.channels_last)


def test_every_instruction_of_inline_assembly_is_there(translated: ptx_build.Machine) -> None:
    """What the kernels that run have of device.h: all of it."""
    text = (build.CUDA / "device.h").read_text()
    wanted = set(re.findall(r'asm(?: volatile)?\("([\w.:]*\w)', text))
    shapes = re.findall(r'"(m16n8k[^"]*)"', text)
    wanted |= {f"mma.sync.aligned.{shape}" for shape in shapes}
    wanted.discard("mma.sync.aligned")
    assert len(shapes) == 3 and len(wanted) >= 14
    assert wanted <= {name for kernel in translated.kernels.values() for name in kernel.instructions}


def test_every_kernel_runs(translated: ptx_build.Machine) -> None:
    """Every template of the sources is translated, and every translated kernel is launched by the cases above."""
    text = "".join(p.read_text() for p in sorted(build.CUDA.iterdir()) if p.suffix in (".cu", ".h"))
    templates = re.findall(r"^__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", text, re.MULTILINE)
    assert len(templates) == text.count("\n__global__ ") > 15
    for template in templates:
        assert any(f"{len(template)}{template}I" in kernel for kernel in translated.kernels), f"{template} is not translated"
    before = translated.threads()
    with translated.serving():
        for case, product, tile in CASES:
            Convolution(case, product, integers).run(tile)
        for channels in (40, 5):
            for name, operands in passes(channels, integers).items():
                launch(native, name, operands)
            native_norm._batch_statistics(integers((2, channels, 3, 3), BF16))
            native.batch_norm_update(*torch.zeros(4, channels, dtype=BF16).unbind(), 2, 0.5)
    idle = [name for name, threads in translated.threads().items() if threads == before[name]]
    assert not idle, f"not launched: {idle}"
