"""The CUDA convolutions run on a CPU: every tile, route and arithmetic on exact and on random data, in several schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import CONVS, ConvCase, ids
from emu.build import Machine
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, native, native_cuda
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

CHANNELS_LAST = torch.channels_last
WIDE = Policy(torch.float64)
POLICIES = {
    "bfloat16": Policy(torch.bfloat16),
    "float16": Policy(torch.float16),
    "tf32": Policy(torch.float32, tf32=True),
    "ieee": Policy(torch.float32),
}
# Besides the shared list: several tiles down and across with tails in both, vectors of channels in every direction.
TILED = [
    ConvCase("tiles", (1, 64, 15, 13), 136, (3, 3), padding=1),
    ConvCase("tails", (2, 40, 9, 7), 72, (3, 3), padding=1),
    ConvCase("vectors_s2", (1, 32, 17, 15), 64, (3, 3), stride=2, padding=1),
    ConvCase("vectors_s2_dilated", (1, 16, 19, 18), 32, (3, 3), stride=(2, 3), padding=2, dilation=(3, 2)),
    ConvCase("vectors_1x1_s3", (2, 16, 10, 10), 24, (1, 1), stride=3),
    ConvCase("vectors_grouped", (1, 96, 9, 9), 64, (3, 3), padding=1, groups=2),
    ConvCase("long_rows", (1, 8, 3, 150), 16, (3, 3), padding=1),
]
LISTED = [case for case in CONVS if not isinstance(case.padding, str)] + TILED
TILES = {"small": 1, "large": 2}
SCHEDULES = (0, 1, 6)  # warps and lanes in order; lanes backwards; another warp first


@pytest.fixture(autouse=True)
def _emulated(machine: Machine) -> Iterator[None]:
    with machine.serving():
        yield
    native_cuda.tile = 0
    machine.set_schedule(0)


class Operands(NamedTuple):
    g: ConvGeometry
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    grad: Tensor

    def double(self) -> Operands:
        return Operands(self.g, *(tensor.double() for tensor in self[1:]))


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def geometry_of(case: ConvCase) -> ConvGeometry:
    window = (pair(case.stride), pair(case.padding), pair(case.dilation))
    return ConvGeometry.of("test", case.input, case.weight, None, *window, case.groups)


def takes_vectors(g: ConvGeometry, element_size: int) -> bool:
    vector = 16 // element_size
    return g.group_in_channels % vector == 0 and g.group_out_channels % vector == 0


def operands(case: ConvCase, dtype: torch.dtype, integers: bool) -> Operands:
    """Small integers, whose sums are exact in float32 and hold ties; or normal numbers."""
    g = geometry_of(case)

    def data(*shape: int) -> Tensor:
        values = torch.randint(-2, 3, shape).float() if integers else torch.randn(shape)
        return values.to(dtype).contiguous(memory_format=CHANNELS_LAST) if len(shape) == 4 else values.to(dtype)

    output = g.output_shape
    return Operands(g, data(*g.input_shape), data(*g.weight_shape), data(g.out_channels), data(*output), data(*output))


def shifted(tensor: Tensor) -> Tensor:
    """A copy that starts one element behind a multiple of 16 bytes."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """`expected` exactly, once it is rounded to the dtype; NaN where it is."""
    expected = expected.to(actual.dtype)
    different = (actual != expected) & ~(actual.isnan() & expected.isnan())
    assert not different.any(), f"{what}: {int(different.sum())} of {actual.numel()} differ"


def results(o: Operands, policy: Policy) -> dict[str, Tensor]:
    """Of every direction; `o` and the policy of float64 are the oracle's."""
    launchers = aten if policy == WIDE else native
    found = {
        "plain": launchers.conv2d(o.x, o.weight, None, None, o.g, policy, relu=False),
        "fused": launchers.conv2d(o.x, o.weight, o.bias, o.residual, o.g, policy, relu=True),
        "input gradient": launchers.conv2d_input_grad(o.grad, o.weight, o.g, policy),
        "weight gradient": launchers.conv2d_weight_grad(o.grad, o.x, o.g, policy),
    }
    if min(o.g.out_height, o.g.out_width) >= 2:
        pool = PoolGeometry.of("test", o.g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
        found["pooled"], found["code"] = launchers.conv2d_relu_max_pool2d(o.x, o.weight, o.bias, o.g, pool, policy)
    return found


def exact_runs() -> Iterator[Any]:
    """Every case by every tile that takes it: the large ones take vectors of channels, to tensor cores.

    Of the case that fills several tiles float16 is a slow test: it differs from bfloat16 by the type of its products alone.
    """
    for case in LISTED:
        for name, policy in POLICIES.items():
            for tile in TILES:
                if tile == "small" or (name != "ieee" and takes_vectors(geometry_of(case), policy.dtype.itemsize)):
                    slow = case.name == "tiles" and name == "float16"
                    marks = [pytest.mark.slow] * slow
                    yield pytest.param(case, policy, tile, id=f"{case.name}-{name}-{tile}", marks=marks)


@pytest.mark.parametrize(("case", "policy", "tile"), list(exact_runs()))
def test_exactly(case: ConvCase, policy: Policy, tile: str, machine: Machine) -> None:
    """Integers, in several schedules: values and codes to the bit, and no fragment that is read in two steps."""
    o = operands(case, policy.dtype, integers=True)
    native_cuda.tile = TILES[tile]
    expected = results(o.double(), WIDE)
    machine.counts()
    for schedule in SCHEDULES:
        machine.set_schedule(schedule)
        actual = results(o, policy)
        assert actual.keys() == expected.keys()
        for what, result in actual.items():
            assert_equal(result, expected[what], f"{what}, schedule {schedule}")
    counts = machine.counts()
    assert counts["matrix_load_conflicts"] == 0
    assert (counts["multiplications"] > 0) == (policy != POLICIES["ieee"])
    assert (counts["async_copies"] > 0) == takes_vectors(o.g, o.x.element_size())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_random(case: ConvCase, policy: Policy) -> None:
    """Normal numbers, which show a missing rounding: integers do not."""
    o = operands(case, policy.dtype, integers=False)
    actual, expected = results(o, policy), results(o.double(), WIDE)
    g = o.g
    sums = {"input gradient": g.taps * g.group_out_channels, "weight gradient": g.out_pixels}
    for what in actual.keys() - {"code"}:
        reduction = sums.get(what, g.taps * g.group_in_channels)
        assert_close(actual[what], expected[what], policy.dtype, reduction, what, tf32=policy.tf32)
    if "code" in actual:
        assert torch.equal(actual["code"] == 0, actual["pooled"] == 0)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_misaligned(policy: Policy, machine: Machine) -> None:
    """Tensors that do not start at a multiple of 16 bytes are read and written element by element."""
    o = operands(TILED[1], policy.dtype, integers=True)
    moved = Operands(o.g, *map(shifted, o[1:]))
    expected = results(o.double(), WIDE)
    machine.counts()
    for what, result in results(moved, policy).items():
        assert_equal(result, expected[what], what)
    assert machine.counts()["async_copies"] == 0


def test_nan_and_infinity() -> None:
    """ReLU keeps NaN; a window's NaN wins, the last of several; no infinity is made finite."""
    o = operands(TILED[1], torch.float32, integers=True)
    o.x[0, 3, 2, 2] = torch.nan
    o.x[1, 7, 5, 1] = torch.inf
    pool = PoolGeometry.of("test", o.g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
    for policy in (POLICIES["tf32"], POLICIES["ieee"]):
        y = native.conv2d(o.x, o.weight, o.bias, None, o.g, policy, relu=True)
        wide = o.double()
        assert_equal(y, aten.conv2d(*wide[1:4], None, o.g, WIDE, relu=True), "relu")
        pooled, code = native.conv2d_relu_max_pool2d(o.x, o.weight, o.bias, o.g, pool, policy)
        expected, expected_code = aten.max_pool2d(aten.conv2d(*wide[1:4], None, o.g, WIDE, relu=False), pool, relu=True)
        assert_equal(pooled, expected, "pooled")
        assert torch.equal(code, expected_code)


def test_an_empty_batch() -> None:
    o = operands(ConvCase("empty", (0, 16, 8, 8), 24, (3, 3), padding=1), torch.bfloat16, integers=True)
    found = results(o, POLICIES["bfloat16"])
    assert found["fused"].shape == (0, 24, 8, 8) and found["input gradient"].shape == (0, 16, 8, 8)
    assert torch.equal(found["weight gradient"], torch.zeros(24, 16, 3, 3, dtype=torch.bfloat16))


def test_weight_gradients_are_split(machine: Machine) -> None:
    """Many pixels and few weights: partial sums, which are added in order."""
    case = ConvCase("split", (2, 8, 40, 40), 8, (1, 1))
    o = operands(case, torch.bfloat16, integers=True)
    machine.counts()
    actual = native.conv2d_weight_grad(o.grad, o.x, o.g, POLICIES["bfloat16"])
    assert machine.counts()["blocks"] > 2
    assert_equal(actual, aten.conv2d_weight_grad(o.grad.double(), o.x.double(), o.g, WIDE), "weight gradient")


def test_sizes_are_checked() -> None:
    """What the launchers never ask for is refused by the operators, before anything is launched."""
    o = operands(TILED[1], torch.bfloat16, integers=True)
    forward = torch.ops.fastconv_emulated.cuda_conv2d
    window = ((1, 1), (1, 1), (1, 1), 1)
    y = torch.empty_like(o.residual)

    def call(
        x: Tensor = o.x, weight: Tensor = o.weight, y: Tensor = y, size: tuple[int, int] = (9, 7), tile: int = 0
    ) -> None:
        forward(x, weight, None, None, y, None, size, *window, True, False, tile)

    call()
    for wrong, message in (
        ({"x": o.x[:1]}, "do not go together"),
        ({"weight": o.weight[:, :39].contiguous(memory_format=CHANNELS_LAST)}, "do not go together"),
        ({"weight": o.weight.float()}, "wrong dtype"),
        ({"x": o.x.contiguous()}, "dense in channels_last"),
        ({"size": (8, 7)}, "wrong size"),
        ({"tile": 3}, "tile must be 0, 1 or 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)  # type: ignore[arg-type]
