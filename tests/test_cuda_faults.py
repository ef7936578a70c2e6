"""Faults put into the CUDA kernels: every one shows when they are run on a CPU, as a wrong result or as an error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import report
import torch
from cases import ConvCase
from emu import build, faults
from test_cuda_emulated import POLICIES, SCHEDULES, WIDE, Operands, assert_equal, operands, results, shifted
from test_native_kernels import few_values
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, native, native_cuda, native_norm
from fastconv.geometry import PoolGeometry
from fastconv.precision import Policy

CONVS = [
    (ConvCase("tiles", (2, 40, 9, 9), 72, (3, 3), padding=1), "bfloat16"),
    (ConvCase("strided", (2, 16, 11, 9), 32, (3, 3), stride=(2, 3), padding=1, dilation=(1, 2)), "tf32"),
    (ConvCase("grouped", (1, 32, 6, 7), 32, (3, 3), padding=(1, 0), groups=2), "bfloat16"),
    (ConvCase("single", (1, 5, 7, 6), 67, (3, 3), padding=1), "float16"),
    (ConvCase("deep", (1, 160, 5, 5), 16, (1, 1)), "bfloat16"),
    (ConvCase("many_pixels", (3, 8, 20, 19), 8, (1, 1)), "bfloat16"),
]

NARROW = [
    (ConvCase("depthwise", (2, 16, 9, 7), 16, (3, 3), padding=1, groups=16), "bfloat16"),
    (ConvCase("pairs", (1, 8, 8, 6), 8, (3, 3), stride=(2, 1), padding=1, groups=4), "ieee"),
    (ConvCase("multiplied", (1, 6, 7, 7), 12, (3, 4), padding=1, groups=3), "float16"),
]


pytestmark = pytest.mark.slow  # tests of the tests


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[build.Machine]:
    """The kernels with every fault in them, all switched off."""
    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    csrc = tmp_path_factory.mktemp("faulty") / "csrc"
    shutil.copytree(build.CSRC, csrc, ignore=shutil.ignore_patterns("cpu"))
    faults.put_in(csrc / "cuda")
    machine = build.machine(csrc, "fastconv_faulty")
    with machine.serving():
        yield machine


def check_convolution(o: Operands, policy: Policy, oracle: Operands | None = None) -> None:
    actual, expected = results(o, policy), results((oracle or o).double(), WIDE)
    for what, result in actual.items():
        assert_equal(result, expected[what], what)


def check_convolutions(machine: build.Machine) -> None:
    """Exact data in every direction, tile and schedule; addresses that are not aligned; NaN; TF32's rounding."""
    machine.counts()
    for case, name in CONVS:
        for tile, schedule in zip((0, 2, 1), SCHEDULES, strict=True):
            native_cuda.tile = tile
            machine.set_schedule(schedule)
            check_convolution(operands(case, POLICIES[name].dtype, integers=True), POLICIES[name])
    assert machine.counts()["matrix_load_conflicts"] == 0
    for case, name in CONVS[:2]:
        o = operands(case, POLICIES[name].dtype, integers=True)
        check_convolution(Operands(o.g, *map(shifted, o[1:])), POLICIES[name])
    o = operands(CONVS[3][0], torch.float32, integers=True)
    o.x[0, 2, 3, 3] = torch.nan
    check_convolution(o, POLICIES["tf32"])
    o = operands(CONVS[1][0], torch.float32, integers=True)
    unit = 2.0**-10  # of TF32 near 1
    nearly, rounded = (o.x.sign() * (1 + share * unit) for share in (0.75, 1))
    grad = o.grad.sign()
    check_convolution(o._replace(x=nearly, grad=grad), POLICIES["tf32"], o._replace(x=rounded, grad=grad))


def check_passes(machine: build.Machine) -> None:
    machine.set_schedule(1)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 16, 9, 7), (1, 3, 6, 6)):
            x = few_values(shape, dtype)
            check_pools(x)
            check_pools(shifted(x))
            check_norm(torch.randint(-3, 4, shape).to(dtype).contiguous(memory_format=torch.channels_last))


def check_pools(x: Tensor) -> None:
    integers = torch.nan_to_num(x, 3, 4, -4)
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
        window = ((kernel, kernel), (stride, stride), (padding, padding), (1, 1))
        pool = PoolGeometry.of("test", x.shape, *window, False)
        for relu in (False, True):
            for actual, expected in zip(
                native.max_pool2d(x, pool, relu), aten.max_pool2d(x.double(), pool, relu), strict=True
            ):
                assert_equal(actual, expected, "max_pool2d")
        output, code = native.max_pool2d(integers, pool, True)
        got, want = (b.max_pool2d_backward(g, code, pool, True) for b, g in ((native, output), (aten, output.double())))
        for actual, expected in zip(got, want, strict=True):
            assert_equal(actual, expected, "max_pool2d_backward")
        for count_include_pad in (False, True):
            settings = (pool, count_include_pad, None)
            expected = aten.avg_pool2d(integers.double(), *settings)
            assert_close(native.avg_pool2d(integers, *settings), expected, x.dtype, pool.positions, "avg_pool2d")
            expected = aten.avg_pool2d_backward(output.double(), *settings)
            actual = native.avg_pool2d_backward(output, *settings)
            assert_close(actual, expected, x.dtype, pool.positions, "avg_pool2d_backward")
    masked, bias = native.relu_backward(integers, x, True)
    for actual, expected in zip((masked, bias), aten.relu_backward(integers.double(), x.double(), True), strict=True):
        assert actual is not None and expected is not None
        assert_equal(actual, expected, "relu_backward")


def check_norm(x: Tensor) -> None:
    statistics = native_norm._batch_statistics(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    count = x.numel() // x.shape[1]
    for actual, expected in zip(statistics, (mean, var), strict=True):
        assert_close(actual, expected, torch.float32, count, "statistics", scale=1)
    grad = torch.randint(-3, 4, x.shape).to(x.dtype).contiguous(memory_format=torch.channels_last)
    saved = (None, 1e-3, True, None, True, False)
    got = native.batch_norm_relu_backward(grad, x, x, statistics, *saved)
    want = aten.batch_norm_relu_backward(grad.double(), x.double(), x.double(), (mean, var), *saved)
    assert got[0] is not None and want[0] is not None and got[1] is not None and want[1] is not None
    assert_close(got[0], want[0], x.dtype, count, "input gradient")
    assert_close(got[1], want[1], torch.float32, count, "sums", scale=count**0.5)


def check_direct(machine: build.Machine) -> None:
    """Convolutions whose groups have few channels."""
    for schedule, (case, name) in zip(SCHEDULES, NARROW, strict=True):
        machine.set_schedule(schedule)
        check_convolution(operands(case, POLICIES[name].dtype, integers=True), POLICIES[name])


AREAS = {"conv": check_convolutions, "direct": check_direct, "passes": check_passes}


def caught(machine: build.Machine, fault: int) -> str | None:
    """What showed a fault; None where nothing did."""
    machine.set_fault(fault)
    torch.manual_seed(0)
    try:
        AREAS[faults.FAULTS[fault - 1].area if fault else "conv"](machine)
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    finally:
        machine.set_fault(0)
        machine.set_schedule(0)
        native_cuda.tile = 0
    return None


@pytest.mark.parametrize("area", AREAS)
def test_nothing_is_found_without_a_fault(area: str, faulty: build.Machine) -> None:
    torch.manual_seed(0)
    AREAS[area](faulty)


@pytest.mark.parametrize("number", range(1, len(faults.FAULTS) + 1), ids=lambda number: faults.FAULTS[number - 1].name)
def test_fault(number: int, faulty: build.Machine) -> None:
    fault, found = faults.FAULTS[number - 1], caught(faulty, number)
    if fault.survives:
        assert found is None, f"caught, against what is said of it: {found}"
    else:
        assert found is not None, "not caught"
    CAUGHT[fault.name] = found


CAUGHT: dict[str, str | None] = {}


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    yield
    shown = sum(found is not None for found in CAUGHT.values())
    survivors = [name for name, found in CAUGHT.items() if found is None]
    report.note(f"faults in CUDA sources: {shown} of {len(CAUGHT)} caught; not: {', '.join(survivors) or 'none'}")
