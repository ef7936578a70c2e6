"""The kernels for Intel's AMX on emulated tiles, through their launchers, against plain torch in float64.

The emulation does what the processor does and aborts where it would fault; it shows neither speed nor the instructions
themselves: for these see test_amx_build.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, native_amx, native_conv, native_conv3x3
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

ROOT = Path(__file__).parent.parent
CONV = ROOT / "csrc" / "cpu" / "conv"
BUILD = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-pthread", f"-I{ROOT}/tests/amx"]
EMULATED = ["-DFASTCONV_AMX=1", "-DFASTCONV_AMX_EMULATED"]
SOURCES = [f"{ROOT}/tests/amx/emulated.cpp", f"{CONV}/amx.cpp"]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
POLICY = Policy(torch.bfloat16)
WIDE = Policy(torch.float64)

pytestmark = pytest.mark.skipif(
    COMPILER is None or torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a compiler and AVX-512"
)

# batch, channels, height, width, outputs, padding
CASES = {
    "one pixel": (1, 1, 1, 1, 1, (1, 1)),
    "4x4": (5, 64, 4, 4, 96, (1, 1)),
    "4x4 large": (2, 160, 4, 4, 544, (1, 1)),
    "7x7": (3, 40, 7, 7, 33, (1, 1)),
    "7x7 of one image": (1, 96, 7, 7, 300, (1, 1)),
    "8x8, several chunks": (9, 32, 8, 8, 64, (1, 1)),
    "8 wide, high": (2, 20, 21, 8, 17, (1, 2)),
    "5x3": (4, 3, 5, 3, 31, (1, 1)),
    "3x3, no padding": (7, 33, 3, 3, 5, (0, 0)),
    "9x9": (2, 31, 9, 9, 16, (1, 1)),
    "14x14": (3, 64, 14, 14, 64, (1, 1)),
    "16x16": (2, 64, 16, 16, 48, (1, 1)),
    "20x20, flat": (2, 17, 20, 20, 40, (1, 1)),
    "30x19, no padding": (1, 48, 19, 30, 40, (0, 0)),
    "17x13, padding 2": (2, 36, 17, 13, 70, (2, 2)),
    "uneven padding": (2, 8, 12, 15, 9, (0, 2)),
    "57 wide": (1, 32, 57, 57, 32, (1, 1)),
    "one row, very wide": (2, 64, 1, 301, 32, (1, 1)),
    "high, bands": (1, 130, 130, 11, 30, (1, 1)),
    "wide, bands": (1, 200, 40, 70, 8, (1, 1)),
    "many images, together": (40, 8, 9, 9, 8, (1, 1)),
    "many images, partly together": (36, 4, 17, 17, 12, (1, 1)),
    "many images, one at a time": (20, 8, 24, 24, 8, (1, 1)),
    "many images, several chunks": (13, 192, 13, 14, 176, (1, 1)),
}


def emulation(arguments: list[str], output: Path) -> Path:
    subprocess.run([str(COMPILER), *BUILD, *EMULATED, *arguments, *SOURCES, "-o", str(output)], check=True)
    return output


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation(["-shared", "-Wl,-Bsymbolic"], tmp_path_factory.mktemp("amx") / "amx.so")


class Guarded:
    """A tensor's elements between guard bands of NaN, which must stay as they are."""

    BAND = 4096

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor
        if tensor is not None:
            flat = tensor.permute(0, 2, 3, 1).reshape(-1) if tensor.dim() == 4 else tensor
            band = torch.full((self.BAND,), 0xFF, dtype=torch.uint8).view(flat.dtype)
            self.memory, self.size = torch.cat([band, flat, band]), flat.numel()
            self.band, self.edge = band, len(band)

    @property
    def pointer(self) -> int | None:
        return None if self.tensor is None else self.memory.data_ptr() + self.BAND

    def check(self, written: bool = False) -> None:
        if self.tensor is None:
            return
        for band in (self.memory[: self.edge], self.memory[self.edge + self.size :]):
            assert torch.equal(band.view(torch.uint8), self.band.view(torch.uint8)), "written out of bounds"
        flat = self.memory[self.edge : self.edge + self.size]
        if written:
            n, c, h, w = self.tensor.shape
            self.tensor.copy_(flat.view(n, h, w, c).permute(0, 3, 1, 2))


class Emulated:
    """Stands in for the operators, with their arguments."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.threads = 2

    def __call__(self, name: str) -> object:
        return getattr(self, name)

    def run(self, function: str, arguments: list[Tensor | None], outputs: list[Tensor | None], *numbers: object) -> None:
        inside, outside = [Guarded(a) for a in arguments], [Guarded(o) for o in outputs]
        pointers = [ctypes.c_void_p(g.pointer) for g in (*inside, *outside)]
        values = [(ctypes.c_int64 * 9)(*n) if isinstance(n, tuple) else ctypes.c_int64(n) for n in numbers]
        getattr(self.library, function)(*pointers, *values, ctypes.c_int64(self.threads))
        for guarded in inside:
            guarded.check()
        for guarded in outside:
            guarded.check(written=True)

    def amx_conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        output: Tensor,
        code: Tensor | None,
        size: tuple[int, int],
        padding: tuple[int, int],
        relu: bool,
        turned: bool,
    ) -> None:
        n, c, h, w = x.shape
        sizes = (n, h, w, c, *size, output.shape[1], *padding)
        pooled = output.shape[2:]
        self.run("conv", [x, weight, bias, residual], [output, code], sizes, *pooled, int(relu), int(turned))

    def amx_weight_grad(self, grad: Tensor, x: Tensor, weight_grad: Tensor, padding: tuple[int, int]) -> None:
        (n, c, h, w), (_, k, oh, ow) = x.shape, grad.shape
        self.run("weight_grad", [grad, x], [weight_grad], (n, h, w, c, oh, ow, k, *padding))


@pytest.fixture
def emulated(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    stand_in = Emulated(compiled)
    monkeypatch.setattr(native_conv3x3, "kernel", stand_in)
    yield stand_in


def geometry(case: str) -> ConvGeometry:
    n, c, h, w, k, padding = CASES[case]
    return ConvGeometry.of("test", (n, c, h, w), (k, c, 3, 3), None, (1, 1), padding, (1, 1), 1)


def pool_of(g: ConvGeometry, ceil_mode: bool) -> PoolGeometry:
    return PoolGeometry.of("test", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), ceil_mode)


def random(*shape: int) -> Tensor:
    tensor = torch.randn(shape).bfloat16()
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def whole(*shape: int) -> Tensor:
    """Small whole numbers: their sums are exact in float32, and often equal."""
    tensor = torch.randint(-2, 3, shape).bfloat16()
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
class TestKernels:
    @pytest.mark.parametrize(
        "with_bias, with_residual, relu", [(False, False, False), (True, False, True), (True, True, True)]
    )
    def test_forward(self, emulated: Emulated, case: str, with_bias: bool, with_residual: bool, relu: bool) -> None:
        g = geometry(case)
        for draw in (random, whole):
            x, weight = draw(*g.input_shape), draw(*g.weight_shape)
            bias = draw(g.out_channels) if with_bias else None
            residual = draw(*g.output_shape) if with_residual else None
            actual = native_amx.KERNELS.conv2d(x, weight, bias, residual, g, relu)
            wide = [t if t is None else t.double() for t in (x, weight, bias, residual)]
            expected = aten.conv2d(*wide, g, WIDE, relu)
            if draw is whole:
                assert_same(actual, expected)
            else:
                assert_close(actual, expected, torch.bfloat16, 9 * g.in_channels, case)

    @pytest.mark.parametrize("ceil_mode", [False, True])
    def test_pool(self, emulated: Emulated, case: str, ceil_mode: bool) -> None:
        g = geometry(case)
        if not ceil_mode and min(g.output_shape[2:]) < 2:
            return
        pool = pool_of(g, ceil_mode)
        assert native_conv._fuses(pool)
        for draw in (random, whole):
            x, weight, bias = draw(*g.input_shape), draw(*g.weight_shape), draw(g.out_channels)
            output, code = native_amx.KERNELS.conv2d_relu_max_pool2d(x, weight, bias, g, pool)
            before = aten.conv2d(x.double(), weight.double(), bias.double(), None, g, WIDE, False)
            expected, expected_code = aten.max_pool2d(before, pool, relu=True)
            if draw is whole:
                assert_same(output, expected)
                assert_same(code, expected_code)
            else:
                assert_close(output, expected, torch.bfloat16, 9 * g.in_channels, case)
                assert (code != expected_code).sum() <= 1 + code.numel() // 10000, "only near ties may be decided otherwise"

    def test_gradients(self, emulated: Emulated, case: str) -> None:
        g = geometry(case)
        for draw in (random, whole):
            x, weight, grad = draw(*g.input_shape), draw(*g.weight_shape), draw(*g.output_shape)
            input_grad = native_amx.KERNELS.conv2d_input_grad(grad, weight, g)
            weight_grad = native_amx.KERNELS.conv2d_weight_grad(grad, x, g)
            expected_input = aten.conv2d_input_grad(grad.double(), weight.double(), g, WIDE)
            expected_weight = aten.conv2d_weight_grad(grad.double(), x.double(), g, WIDE)
            if draw is whole:
                assert_same(input_grad, expected_input)
                assert_same(weight_grad, expected_weight)
            else:
                assert_close(input_grad, expected_input, torch.bfloat16, 9 * g.out_channels, case)
                assert_close(weight_grad, expected_weight, torch.bfloat16, g.out_pixels, case)


def every_kernel(g: ConvGeometry, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    return [
        native_amx.KERNELS.conv2d(x, weight, bias, grad, g, True),
        *native_amx.KERNELS.conv2d_relu_max_pool2d(x, weight, bias, g, pool_of(g, True)),
        native_amx.KERNELS.conv2d_input_grad(grad, weight, g),
        native_amx.KERNELS.conv2d_weight_grad(grad, x, g),
    ]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8) for t in tensors]


@pytest.mark.parametrize("case", ["7x7", "8x8, several chunks", "20x20, flat", "wide, bands", "many images, several chunks"])
def test_determinism(emulated: Emulated, case: str) -> None:
    """The same bits for any number of threads, and from calls at the same time."""
    g = geometry(case)
    data = (random(*g.input_shape), random(*g.weight_shape), random(g.out_channels), random(*g.output_shape))
    results = []
    for emulated.threads in (1, 4, 2):
        results.append(bits(every_kernel(g, *data)))
    with ThreadPoolExecutor(2) as pool:
        results += [bits(tensors) for tensors in pool.map(lambda _: every_kernel(g, *data), range(2))]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_no_images(emulated: Emulated) -> None:
    g = ConvGeometry.of("test", (0, 8, 12, 12), (16, 8, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    x, grad, weight = random(*g.input_shape), random(*g.output_shape), random(*g.weight_shape)
    assert native_amx.KERNELS.conv2d(x, weight, None, None, g, False).shape == g.output_shape
    assert native_amx.KERNELS.conv2d_weight_grad(grad, x, g).eq(0).all()


def test_nan_and_rounding(emulated: Emulated) -> None:
    """NaN stays through ReLU and pool, and where it is; ties round to even."""
    for side in (6, 12):
        g = ConvGeometry.of("test", (1, 32, side, side), (32, 32, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
        x, weight = random(*g.input_shape), random(*g.weight_shape)
        x[0, 5, 2, 3] = torch.nan
        wide = aten.conv2d(x.double(), weight.double(), None, None, g, WIDE, False)
        assert torch.equal(native_amx.KERNELS.conv2d(x, weight, None, None, g, True).isnan(), wide.isnan())
        pool = pool_of(g, False)
        output, code = native_amx.KERNELS.conv2d_relu_max_pool2d(x, weight, None, g, pool)
        expected, expected_code = aten.max_pool2d(wide, pool, relu=True)
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(code[output.isnan()], expected_code[output.isnan()])
        weight.zero_()[:, 0, 1, 1] = 1
        x.zero_()[0, 0] = 256
        bias = torch.tensor([1.0, 3.0, 0.99, 2.0] * 8).bfloat16()
        rounded = native_amx.KERNELS.conv2d(x, weight, bias, None, g, False)[0, :, 1, 1]
        assert rounded.tolist() == [256, 260, 256, 258] * 8


def product(compiled: Path, a: Tensor, b: Tensor, to: Tensor) -> Tensor:
    """to + a · b of the emulation: [16, 16], [16, 32] and [32, 16]."""
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    arrays = a.bfloat16(), pairs.bfloat16(), to.float().clone()
    ctypes.CDLL(str(compiled)).product(*(ctypes.c_void_p(t.data_ptr()) for t in arrays))
    return arrays[2]


def test_product(compiled: Path) -> None:
    """What Intel's manual says of TDPBF16PS: two sums, for even and odd steps; subnormals are zero on the way in and out."""
    a, b, to = (torch.randint(-9, 10, shape).float() for shape in ((16, 32), (32, 16), (16, 16)))
    assert torch.equal(product(compiled, a, b, to), to + a @ b)
    a, b, to = torch.zeros(16, 32), torch.zeros(32, 16), torch.zeros(16, 16)
    a[0, :4], b[:4, 0] = 1, torch.tensor([2.0**24, 1, -(2.0**24), 1])  # one sum would be 1
    a[1, 0], b[0, 1] = 2.0**-130, 2.0**100  # a subnormal operand
    a[2, 0], b[0, 2] = 2.0**-120, 2.0**-10  # a subnormal product
    a[3, 0], b[0, 3], to[3, 3] = 1, 2.0**-126, -(2.0**-126) * 1.5  # a subnormal sum
    to[4, 4] = 2.0**-140  # a subnormal to add to
    a[5, 0], b[0, 5], to[5, 5] = 1, 1, torch.nan
    a[6, 0], b[0, 6] = torch.inf, 1
    a[7, :2], b[:2, 7], to[7, 7] = 1, 1, 2.0**24  # the two sums are added to each other first
    result = product(compiled, a, b, to)
    assert result.diagonal()[:5].tolist() == [2, 0, 0, 0, 0]
    assert result[5, 5].isnan() and result[6, 6] == torch.inf and result[6, 8].isnan()
    assert result[7, 7] == 2.0**24 + 2


@pytest.mark.parametrize(
    "how, message",
    [
        ("use before configuration", "before the tiles are configured"),
        ("use after release", "after they were released"),
        ("configured twice", "configured twice"),
        ("rows", "too many rows or columns"),
        ("columns", "too many rows or columns"),
        ("palette", "palette must be 1"),
        ("reserved", "reserved byte"),
        ("missing", "leaves out"),
        ("fit", "do not fit"),
    ],
)
def test_misuse_aborts(compiled: Path, how: str, message: str) -> None:
    code = f"import ctypes; ctypes.CDLL({str(compiled)!r}).misuse({how.encode()!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode < 0 and message in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DFASTCONV_AMX_MAIN", "-g"]
    program = emulation(flags, tmp_path / "amx")
    lines = []
    for case, (n, c, h, w, k, padding) in CASES.items():
        _, _, oh, ow = geometry(case).output_shape
        lines.append(" ".join(map(str, (n, h, w, c, oh, ow, k, *padding))))
    run = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
