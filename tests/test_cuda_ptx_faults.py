"""Faults put into device.h's inline assembly, which g++ does not see: nvcc's PTX of a kernel, run on a CPU, shows them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emu import build, ptx, ptx_build

from fastconv.backends import aten, native, native_cuda
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy

# Slow: tests of the tests.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_build.unavailable() is not None, reason=str(ptx_build.unavailable())),
]


class Fault(NamedTuple):
    """Edits of device.h, patterns and what comes in their place; and how they show."""

    edits: tuple[tuple[str, str], ...]
    error: str = ""  # part of what the machine says; without it, results are wrong
    is_harmless: bool = False


FAULTS = {
    "packed halves swapped": Fault(((r'"f"\(second\), "f"\(first\)', '"f"(first), "f"(second)'),)),
    "outputs of ldmatrix swapped": Fault(((r'"=r"\(words\[1\]\), "=r"\(words\[2\]\)', '"=r"(words[2]), "=r"(words[1])'),)),
    "ldmatrix transposes": Fault(((r"m8n8\.x4\.shared", "m8n8.x4.trans.shared"),)),
    "mma of the other half type": Fault(((r"bf16\.bf16\.f32", "f16.f16.f32"),)),
    "operands of mma swapped": Fault(((r'"r"\(b\[0\]\), "r"\(b\[1\]\)', '"r"(b[1]), "r"(b[0])'),)),
    "copies without zeros": Fault(((r"is_there \? 16 : 0;", "16;"),)),
    "one group too few awaited": Fault(((r'"n"\(kGroups\)', '"n"(kGroups + 1)'),), "copy under way"),
    "no group awaited": Fault(
        ((r'asm volatile\("cp\.async\.wait_group %0;" ::"n"\(kGroups\) : "memory"\)', ""),), "copy under way"
    ),
    # Statements that are volatile, or without outputs, keep their order, and the block's barrier orders memory: nvcc makes
    # the same PTX of these.
    "wait_group without a memory clobber": Fault(((r'("n"\(kGroups\)) : "memory"', r"\1"),), is_harmless=True),
    "copies without a memory clobber": Fault(((r'("r"\(bytes\))\s*: "memory"', r"\1"),), is_harmless=True),
    "ldmatrix neither volatile nor with a memory clobber": Fault(
        ((r'asm volatile\(("ldmatrix)', r"asm(\1"), (r'("r"\(address\))\s*: "memory"', r"\1")), is_harmless=True
    ),
}
NONE = Fault(())

# The forward convolution of bfloat16 by vectors, in small tiles.
KERNEL = """
#include "conv.h"

namespace fastconv {

template __global__ void conv_kernel<Shape<Bf16, 128, 64, 2, 2>, Route::kForward, true>(const ConvParams);

}  // namespace fastconv
"""


def kernel_with(number: int, fault: Fault, folder: Path) -> ptx.Kernel:
    """What nvcc makes of the kernel, from sources that are patched in `folder`."""
    folder.mkdir()
    for header in build.CUDA.glob("*.h"):
        shutil.copy(header, folder)
    device = folder / "device.h"
    text = device.read_text()
    for pattern, replacement in fault.edits:
        text, edits = re.subn(pattern, replacement, text)
        assert edits > 0, f"device.h has no {pattern}"
    device.write_text(text)
    source = folder / f"fault_{number}.cu"
    source.write_text(KERNEL)
    (kernel,) = ptx.translate(ptx_build.assemble(source, ptx_build.TRANSLATED, (folder,)))
    return kernel


def link(number: int, kernel: ptx.Kernel) -> ptx_build.Machine:
    """The emulated library with this kernel, its operators in a namespace of their own."""
    name = f"fault_{number}"
    compiled = ptx_build.compile_kernels([kernel], name, ptx_build.TRANSLATED)
    return ptx_build.link([kernel], [compiled], f"fastconv_{name}")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ptx.Kernel]:
    folder = tmp_path_factory.mktemp("faults")
    faults = {"none": NONE, **FAULTS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = [pool.submit(kernel_with, i, fault, folder / str(i)) for i, fault in enumerate(faults.values())]
        return {name: future.result() for name, future in zip(faults, built, strict=True)}


@pytest.fixture(scope="module")
def machines(kernels: dict[str, ptx.Kernel], machine: build.Machine) -> dict[str, ptx_build.Machine]:
    """Of all faults that do harm."""
    wanted = [name for name in kernels if name not in FAULTS or not FAULTS[name].is_harmless]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = [pool.submit(link, i, kernels[name]) for i, name in enumerate(wanted)]
        return {name: future.result() for name, future in zip(wanted, built, strict=True)}


@pytest.fixture
def is_right(monkeypatch: pytest.MonkeyPatch) -> Callable[[ptx_build.Machine], bool]:
    """Whether a machine's convolution is: five steps of products, over a margin, in one tile."""
    monkeypatch.setattr(native_cuda, "tile", 1)
    g = ConvGeometry.of("test", (2, 16, 9, 7), (24, 16, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    x, weight = (torch.randint(-3, 4, shape).bfloat16() for shape in (g.input_shape, g.weight_shape))
    expected = aten.conv2d(x.double(), weight.double(), None, None, g, Policy(torch.float64), False).bfloat16()

    def run(machine: ptx_build.Machine) -> bool:
        with machine.serving():
            output = native.conv2d(x, weight, None, None, g, Policy(torch.bfloat16), False)
        return torch.equal(output, expected)

    return run


def test_none(machines: dict[str, ptx_build.Machine], is_right: Callable[[ptx_build.Machine], bool]) -> None:
    assert is_right(machines["none"])
    assert machines["none"].ran() == 1


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.is_harmless])
def test_fault(name: str, machines: dict[str, ptx_build.Machine], is_right: Callable[[ptx_build.Machine], bool]) -> None:
    if FAULTS[name].error:
        with pytest.raises(RuntimeError, match=FAULTS[name].error):
            is_right(machines[name])
    else:
        assert not is_right(machines[name])


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.is_harmless])
def test_no_harm(name: str, kernels: dict[str, ptx.Kernel]) -> None:
    """Where this fails, nvcc has made something else of the sources: then it is a fault to be caught."""
    assert kernels[name].code == kernels["none"].code
