"""Every CUDA source compiled by nvcc for sm_80 and sm_90, and its machine code read: registers, spills, instructions."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest
import report
import torch
from emu import build, device_code
from emu.device_code import CAPABILITIES, Kernel

# Slow: nvcc, once for each chip. What it makes of one is run by tests/test_cuda_ptx.py.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(device_code.unavailable() is not None, reason=str(device_code.unavailable())),
]

MOST_REGISTERS = 65536  # of a processor

# Registers and instructions are one compiler's: another version spills elsewhere.
this_compiler = pytest.mark.skipif(device_code.version() != "13.0", reason="machine code is held for nvcc 13.0")


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found = device_code.kernels(device_code.compile_all())
    spilled = [kernel for kernel in found if kernel.spilled_bytes]
    most = max(found, key=lambda kernel: kernel.registers)
    report.note(
        f"CUDA kernels compiled by nvcc: {len(found)} for {', '.join(f'sm_{chip}' for chip in CAPABILITIES)}, "
        f"{len(spilled)} with spills, at most {most.registers} registers ({most.name})"
    )
    return found


def convolutions(kernels: list[Kernel], vector: bool, ieee: bool) -> list[Kernel]:
    found = [k for k in kernels if re.match(r"(conv|weight_grad)_kernel", k.name)]
    return [k for k in found if k.name.endswith(f"{str(vector).lower()}>") and ("Ieee" in k.name) == ieee]


def test_every_kernel_is_compiled_for_every_chip(kernels: list[Kernel]) -> None:
    text = "".join(path.read_text() for path in device_code.CUDA.iterdir())
    named = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*\) )?(\w+)\(", text))
    assert named, "no kernels are found in the sources"
    for capability in CAPABILITIES:
        assert {k.name.partition("<")[0] for k in kernels if k.capability == capability} == named


def test_the_library_links(kernels: list[Kernel], tmp_path: Path) -> None:
    """Whatever one source takes from another is there: what is left to find is torch's, CUDA's and Python's."""
    registry, library = tmp_path / "registry.o", tmp_path / "_cuda.so"
    includes = [f"-I{path}" for path in (Path(torch.__file__).parent / "include", sysconfig.get_path("include"))]
    told = [f'-DFASTCONV_{name}="9.0"' for name in ("ARCHITECTURES", "CUDA", "SCHEMAS")]
    compiler = str(device_code.nvcc())
    build.run(
        [compiler, *device_code.FLAGS, *told, *includes, "-c", str(device_code.CUDA / "registry.cpp"), "-o", str(registry)]
    )
    objects = [str(path) for path in device_code.compile_all().values()]
    build.run([compiler, "-shared", *objects, str(registry), "-o", str(library)])
    symbols = build.run(["nm", "--demangle", "--dynamic", "--undefined-only", str(library)])
    missing = {line.split(maxsplit=1)[1].partition("@")[0] for line in symbols.splitlines() if " U " in line}
    assert not {name for name in missing if "fastconv" in name}
    assert any(name.startswith("aoti_torch_get_current_cuda_stream") for name in missing)
    exported = build.run(["nm", "--dynamic", "--defined-only", str(library)])
    assert "PyInit__cuda" in exported


@this_compiler
def test_nothing_is_spilled(kernels: list[Kernel]) -> None:
    """But for one register, written once and read once outside of the inner loop, of some direct kernels' 128."""
    one_register = 4 + 4
    spilled = [k for k in kernels if k.spilled_bytes > (one_register if k.name.startswith("direct") else 0)]
    assert [(k.name, k.capability, k.spilled_bytes) for k in spilled] == []


@this_compiler
def test_blocks_fit_a_processor(kernels: list[Kernel]) -> None:
    """Two blocks of 256 threads, three of 128: what latency is hidden by."""
    for k in convolutions(kernels, vector=True, ieee=False):
        threads = 256 if re.search(r"128, 128,", k.name) else 128
        blocks = 2 if threads == 256 else 3
        assert -(-k.registers // 8) * 8 * threads * blocks <= MOST_REGISTERS, k


def test_fast_paths_use_tensor_cores_and_wide_copies(kernels: list[Kernel]) -> None:
    fast = convolutions(kernels, vector=True, ieee=False)
    assert len({k.name for k in fast}) == 3 * (3 * 2 + 2), "arithmetic × (routes × tiles + tiles of the weight gradient)"
    for k in fast:
        assert k.instructions["products"] > 0 and k.instructions["copies"] > 0, k
        # Of 32-bit operands that lie the other way round, no instruction loads fragments: the weight gradient has two.
        is_loaded_word_by_word = "Tf32" in k.name and k.name.startswith("weight_grad")
        assert (k.instructions["fragments"] > 0) != is_loaded_word_by_word, k
        assert (k.instructions["wide_stores"] > 0) == k.name.startswith("conv"), k  # partial sums leave in pairs


def test_ieee_does_without_tensor_cores(kernels: list[Kernel]) -> None:
    for vector in (True, False):
        found = convolutions(kernels, vector, ieee=True)
        assert found and not any(k.instructions["products"] or k.instructions["fragments"] for k in found)


def test_passes_load_and_store_vectors(kernels: list[Kernel]) -> None:
    wide = [k for k in kernels if re.search(r"<(float, .*4|b?f16, .*8)\b", k.name) and not k.name.startswith("conv")]
    assert len({k.name.partition("<")[0] for k in wide}) >= 10
    for k in wide:
        assert k.instructions["wide_loads"] > 0, k
        sums_only = re.match(r"(backward_sums|statistics|global_avg_pool_kernel|direct_weight_grad)", k.name)
        assert sums_only or k.instructions["wide_stores"] > 0, k


@this_compiler
def test_the_table_is_of_these_kernels(kernels: list[Kernel]) -> None:
    text = (Path(device_code.ROOT) / "docs" / "cuda.md").read_text(encoding="utf-8")
    assert device_code.table(kernels) in text, "run `make docs`"
