"""Convolutions whose groups have few channels, by the CUDA kernels without tensor cores, which are run on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from emu.build import Machine
from guards import guarded
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, native, native_cuda
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = Policy(torch.float64)
NONE = (0, 0)

# input, weight, stride, padding, dilation; groups are the input's channels by the weight's
CASES = {
    "depthwise": ((2, 24, 9, 7), (24, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise, many channels": ((1, 144, 4, 3), (144, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise, odd channels": ((2, 35, 6, 9), (35, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise 5x5": ((1, 16, 11, 9), (16, 1, 5, 5), (1, 1), (2, 2), (1, 1)),
    "depthwise 7x7": ((1, 8, 9, 12), (8, 1, 7, 7), (1, 1), (3, 3), (1, 1)),
    "depthwise 7x7, stride 2": ((1, 16, 15, 14), (16, 1, 7, 7), (2, 2), (3, 3), (1, 1)),
    "depthwise 1x1": ((2, 16, 5, 6), (16, 1, 1, 1), (1, 1), NONE, (1, 1)),
    "depthwise, asymmetric": ((2, 8, 10, 9), (8, 1, 3, 5), (1, 2), (0, 3), (1, 2)),
    "depthwise, stride 3x1": ((2, 8, 10, 6), (8, 1, 3, 3), (3, 1), (2, 1), (1, 1)),
    "depthwise, steps that leave pixels out": ((1, 8, 9, 10), (8, 1, 2, 2), (3, 3), NONE, (1, 1)),
    "depthwise, dilated and strided": ((1, 8, 13, 12), (8, 1, 3, 3), (2, 3), (3, 2), (3, 2)),
    "depthwise 21x21": ((1, 16, 22, 21), (16, 1, 21, 21), (1, 1), (10, 10), (1, 1)),
    "depthwise, twice as many out": ((2, 9, 8, 7), (18, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise, eight times as many out": ((1, 4, 8, 7), (32, 1, 3, 3), (2, 2), (1, 1), (1, 1)),
    "groups of 2": ((2, 24, 7, 6), (24, 2, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 3": ((2, 12, 7, 7), (12, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 4": ((2, 16, 7, 8), (16, 4, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 4, stride 2": ((1, 16, 9, 9), (16, 4, 3, 3), (2, 2), (1, 1), (1, 1)),
    "groups of 4, an odd number": ((1, 12, 7, 6), (12, 4, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 8": ((1, 16, 8, 7), (16, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 8, dilated": ((1, 24, 9, 8), (24, 8, 3, 2), (1, 1), (2, 1), (2, 2)),
    "groups of 4 to 6": ((2, 12, 7, 7), (18, 4, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 8 to 2": ((2, 16, 5, 5), (4, 8, 2, 3), (1, 1), (1, 1), (1, 1)),
}
# Of what the engine with tensor cores serves.
OTHERS = {
    "one group": ((1, 8, 8, 8), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
    "one channel": ((1, 1, 8, 8), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 16": ((1, 32, 8, 8), (32, 16, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 8 to 16": ((1, 16, 8, 8), (32, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 16 to 8": ((1, 32, 8, 8), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1)),
    "a window of the largest": ((1, 2, 45, 45), (2, 1, 45, 45), (1, 1), NONE, (1, 1)),
}


@pytest.fixture(autouse=True, scope="module")
def _oracle_in_one_thread() -> Iterator[None]:
    """Maps of this size are not worth more, and threads that wait for each other make hundreds of calls slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, params=[0, 7], ids=["in order", "shuffled"])
def _served(machine: Machine, request: pytest.FixtureRequest) -> Iterator[None]:
    machine.set_schedule(request.param)
    machine.counts()
    with machine.serving():
        yield
    machine.set_schedule(0)


def geometry(case: str) -> ConvGeometry:
    x, weight, *window = {**CASES, **OTHERS}[case]
    return ConvGeometry.of("test", x, weight, None, *window, x[1] // weight[1])


def pool_of(g: ConvGeometry) -> PoolGeometry:
    return PoolGeometry.of("test", g.output_shape, (2, 2), (2, 2), NONE, (1, 1), False)


def normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def integers(shape: tuple[int, ...]) -> Tensor:
    """Few enough different values that ties are common, and that sums are exact even in bfloat16's 8 bits."""
    return torch.randint(-1, 2, shape).float()


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, from an address that no vector can be loaded from."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


class Operands:
    """Of a convolution and its gradients, in channels_last."""

    def __init__(self, g: ConvGeometry, dtype: torch.dtype, draw: Callable[[tuple[int, ...]], Tensor] = normal) -> None:
        shapes = (g.input_shape, g.weight_shape, (g.out_channels,), g.output_shape, g.output_shape)
        drawn = [draw(shape).to(dtype) for shape in shapes]
        self.x, self.weight, self.bias, self.residual, self.grad = (
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in drawn
        )


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def same(actual: Tensor, expected: Tensor, products: int, what: str) -> None:
    """To the bit: sums of integers are exact, and rounded once."""
    assert torch.equal(actual, expected.to(actual.dtype)), what


def check(o: Operands, g: ConvGeometry, policy: Policy, close: Callable[[Tensor, Tensor, int, str], None]) -> None:
    """Every direction against torch in float64."""
    products = g.taps * g.group_in_channels
    for bias, residual, relu in ((None, None, False), (o.bias, None, True), (o.bias, o.residual, True)):
        actual = native.conv2d(o.x, o.weight, bias, residual, g, policy, relu)
        close(actual, aten.conv2d(*wide(o.x, o.weight, bias, residual), g, WIDE, relu), products, "output")
    if min(g.output_shape[2:]) >= 2:
        pool = pool_of(g)
        output, code = native.conv2d_relu_max_pool2d(o.x, o.weight, o.bias, g, pool, policy)
        unpooled = aten.conv2d(*wide(o.x, o.weight, o.bias, None), g, WIDE, False)
        expected, expected_code = aten.max_pool2d(unpooled, pool, relu=True)
        close(output, expected, products, "pooled")
        assert torch.equal(code == 0, output == 0)
        assert torch.equal(code, expected_code), "winners are those of the sums, before they are rounded"
    actual = native.conv2d_input_grad(o.grad, o.weight, g, policy)
    expected = aten.conv2d_input_grad(*wide(o.grad, o.weight), g, WIDE)
    close(actual, expected, g.taps * g.group_out_channels, "input gradient")
    actual = native.conv2d_weight_grad(o.grad, o.x, g, policy)
    close(actual, aten.conv2d_weight_grad(*wide(o.grad, o.x), g, WIDE), g.out_pixels, "weight gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
class TestEveryDirection:
    def test_random(self, machine: Machine, case: str, dtype: torch.dtype) -> None:
        g = geometry(case)
        check(Operands(g, dtype), g, Policy(dtype), lambda a, e, products, what: assert_close(a, e, dtype, products, what))
        counts = machine.counts()
        assert counts["launches"] and not counts["multiplications"] and not counts["async_copies"]

    def test_integers(self, case: str, dtype: torch.dtype) -> None:
        check(Operands(geometry(case), dtype, integers), geometry(case), Policy(dtype), same)


@pytest.mark.parametrize("case", CASES)
def test_by_single_channels(case: str) -> None:
    """As addresses that are not aligned make it."""
    with guarded():
        check(Operands(geometry(case), torch.bfloat16, integers), geometry(case), Policy(torch.bfloat16), same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["depthwise", "groups of 4", "groups of 8"])
def test_misaligned_addresses(machine: Machine, case: str, dtype: torch.dtype) -> None:
    """Each operand alone makes a call go by single channels, and gives the same bits."""
    g, policy = geometry(case), Policy(dtype)
    o = Operands(g, dtype, integers)

    def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return native.conv2d(x, weight, bias, residual, g, policy, True)

    def accesses(call: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        machine.counts()
        return call(*operands), machine.counts()["global_accesses"]

    calls = {
        forward: (o.x, o.weight, o.bias, o.residual),
        (lambda grad, weight: native.conv2d_input_grad(grad, weight, g, policy)): (o.grad, o.weight),
        (lambda grad, x: native.conv2d_weight_grad(grad, x, g, policy)): (o.grad, o.x),
    }
    for call, operands in calls.items():
        expected, vectors = accesses(call, operands)
        for i, moved in enumerate(operands):
            actual, count = accesses(call, (*operands[:i], misaligned(moved), *operands[i + 1 :]))
            assert torch.equal(actual, expected)
            by_elements = moved is o.x or moved is o.residual or moved is o.grad
            assert count > 2 * vectors if by_elements else count == vectors


@pytest.mark.parametrize("case", ["depthwise", "depthwise, odd channels", "groups of 4"])
def test_nan(case: str) -> None:
    """It stays where it comes to lie: no ReLU, pool or neighbouring channel makes anything of it."""
    g, policy = geometry(case), Policy(torch.float32)
    o = Operands(g, torch.float32)
    o.x[0, 1, 2, 3] = o.x[-1, -1, 0, 0] = o.residual[0, 2, 1, 1] = o.bias[5] = torch.nan
    pool = pool_of(g)
    for bias, residual in ((None, None), (None, o.residual), (o.bias, None)):
        actual = native.conv2d(o.x, o.weight, bias, residual, g, policy, relu=True)
        expected = aten.conv2d(*wide(o.x, o.weight, bias, residual), g, WIDE, relu=True)
        assert torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().any()
    output, code = native.conv2d_relu_max_pool2d(o.x, o.weight, o.bias, g, pool, policy)
    expected, expected_code = aten.max_pool2d(aten.conv2d(*wide(o.x, o.weight, o.bias, None), g, WIDE, False), pool, True)
    assert torch.equal(output.isnan(), expected.isnan())
    named = ~expected.isnan()
    assert torch.equal(code[named], expected_code[named]) and (code[~named] > 0).all()
    o.grad[0, 3, 2, 2] = torch.nan
    actual = native.conv2d_input_grad(o.grad, o.weight, g, policy)
    assert torch.equal(actual.isnan(), aten.conv2d_input_grad(*wide(o.grad, o.weight), g, WIDE).isnan())


def test_ties() -> None:
    """Of equal sums the first in reading order wins, of NaN the last; what is not above 0 is closed."""
    g = ConvGeometry.of("test", (1, 8, 2, 2), (8, 1, 1, 1), None, (1, 1), NONE, (1, 1), 8)
    nan = torch.nan
    windows = [
        ((1, 1, 1, 1), 1), ((0, 2, 1, 2), 2), ((-1, -2, 3, 2), 3), ((-1, 0, -3, 0), 0),
        ((nan, 5, 6, 7), 1), ((nan, 5, nan, 7), 3), ((9, 5, 6, nan), 4), ((-4, -3, -2, -1), 0),
    ]  # fmt: skip
    x = torch.tensor([values for values, _ in windows]).view(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(g.weight_shape)
    output, code = native.conv2d_relu_max_pool2d(x, weight, None, g, pool_of(g), Policy(torch.float32))
    assert code.flatten().tolist() == [code for _, code in windows]
    torch.testing.assert_close(
        output.flatten(), torch.tensor([1, 2, 3, 0, nan, nan, nan, 0.0]), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("shape", [(0, 8, 6, 6), (3, 8, 1, 1)], ids=str)
def test_small_maps(shape: tuple[int, ...]) -> None:
    g = ConvGeometry.of("test", shape, (8, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 8)
    o, policy = Operands(g, torch.float32, integers), Policy(torch.float32)
    actual = native.conv2d(o.x, o.weight, o.bias, None, g, policy, relu=False)
    assert torch.equal(actual, aten.conv2d(o.x, o.weight, o.bias, None, g, policy, relu=False))
    assert torch.equal(native.conv2d_weight_grad(o.grad, o.x, g, policy), aten.conv2d_weight_grad(o.grad, o.x, g, policy))


@pytest.mark.parametrize("case", OTHERS)
def test_other_convolutions(machine: Machine, case: str) -> None:
    """Whose tiles tensor cores fill better."""
    g, policy = geometry(case), Policy(torch.bfloat16)
    o = Operands(g, torch.bfloat16)
    calls = (
        lambda: native.conv2d(o.x, o.weight, o.bias, None, g, policy, True),
        lambda: native.conv2d_input_grad(o.grad, o.weight, g, policy),
        lambda: native.conv2d_weight_grad(o.grad, o.x, g, policy),
    )
    for call in calls:
        machine.counts()
        call()
        assert machine.counts()["multiplications"]


def test_tiles_on_demand(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names a size of tiles gets the engine: the two are compared so."""
    g, policy = geometry("depthwise"), Policy(torch.bfloat16)
    o = Operands(g, torch.bfloat16, integers)
    direct = native.conv2d(o.x, o.weight, o.bias, o.residual, g, policy, True)
    machine.counts()
    monkeypatch.setattr(native_cuda, "tile", 1)
    assert torch.equal(native.conv2d(o.x, o.weight, o.bias, o.residual, g, policy, True), direct)
    assert machine.counts()["multiplications"]


def test_many_pixels() -> None:
    """Of which a line of a block takes several runs."""
    g = ConvGeometry.of("test", (1, 64, 257, 1024), (64, 1, 1, 1), None, (1, 1), NONE, (1, 1), 64)
    o = Operands(g, torch.bfloat16, integers)
    assert torch.equal(
        native.conv2d(o.x, o.weight, None, None, g, Policy(torch.bfloat16), False), o.x * o.weight.view(64, 1, 1)
    )


def test_the_largest_window() -> None:
    """Of whose weights shared memory holds one vector of channels."""
    g = ConvGeometry.of("test", (1, 16, 44, 45), (16, 1, 44, 44), None, (1, 1), NONE, (1, 1), 16)
    o, policy = Operands(g, torch.bfloat16), Policy(torch.bfloat16)
    actual = native.conv2d(o.x, o.weight, o.bias, None, g, policy, False)
    assert_close(actual, aten.conv2d(*wide(o.x, o.weight, o.bias, None), g, WIDE, False), torch.bfloat16, g.taps)


def test_many_runs() -> None:
    """Sums of weights' gradients come from many rows."""
    g = ConvGeometry.of("test", (2, 8, 183, 150), (8, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 8)
    o, policy = Operands(g, torch.bfloat16, integers), Policy(torch.float32)
    x, weight, grad = o.x.float(), o.weight.float(), o.grad.float()
    assert torch.equal(
        native.conv2d(x, weight, None, None, g, policy, False), aten.conv2d(x, weight, None, None, g, policy, False)
    )
    assert torch.equal(
        native.conv2d_weight_grad(grad, x, g, policy), aten.conv2d_weight_grad(*wide(grad, x), g, WIDE).float()
    )
