"""The kernels for Intel's AMX in the compiled library: their machine code, who may call them, where they are left out."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_amx import BUILD, COMPILER, CONV, EMULATED, ROOT, random

from fastconv.backends import native
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning import cpu

needs_compiler = pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs a compiler for x86-64")
BFLOAT16 = Policy(torch.bfloat16)
needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@needs_compiler
def test_equal_operands_do_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "equal.cpp"
    source.write_text(f'#include "{ROOT}/tests/amx/emulated.cpp"\nvoid f() {{ amx::multiply_tiles<0, 1, 1>(); }}\n')
    run = subprocess.run([str(COMPILER), *BUILD, *EMULATED, "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert run.returncode != 0 and "refuses equal operands" in run.stderr


TILE = re.compile(
    r"^\s*([0-9a-f]+):\s.*\b(tdpbf16ps|tileloadd|tilestored|tilezero|ldtilecfg|tilerelease)\b *(.*)$", re.MULTILINE
)


def tile_instructions(binary: Path) -> list[tuple[int, str, str]]:
    """Addresses, names and operands (the destination first), from the machine code."""
    command = ["objdump", "-d", "-M", "intel", "--no-show-raw-insn", str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return [(int(address, 16), name, operands.strip()) for address, name, operands in TILE.findall(listing.stdout)]


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_machine_code(tmp_path: Path) -> None:
    """The production kernels are AMX's instructions, the only ones of the library."""
    subprocess.run([str(COMPILER), *BUILD, "-c", f"{CONV}/amx_kernels.cpp", "-o", str(tmp_path / "k.o")], check=True)
    found = tile_instructions(tmp_path / "k.o")
    assert {name for _, name, _ in found} == {"tdpbf16ps", "tileloadd", "tilestored", "tilezero", "ldtilecfg", "tilerelease"}
    products = {operands for _, name, operands in found if name == "tdpbf16ps"}
    assert products == {"tmm0,tmm4,tmm6", "tmm1,tmm4,tmm7", "tmm2,tmm5,tmm6", "tmm3,tmm5,tmm7"}
    assert {o[:4] for _, name, o in found if name == "tileloadd"} == {f"tmm{i}" for i in range(8)}
    assert {o[-4:] for _, name, o in found if name == "tilestored"} == {f"tmm{i}" for i in range(4)}
    using = {p.name for p in (ROOT / "csrc").rglob("*.*") if re.search(r"tdpbf16ps|tileload|ldtilecfg", p.read_text())}
    assert using == {"amx_tiles.h"}
    if native.unavailable() is None and native.library().build_info()["amx"]:
        library = tile_instructions(Path(native.library().__file__))
        assert library, "the library says that it has AMX kernels"
        addresses = [address for address, _, _ in library]
        text = subprocess.run(["size", "-A", str(tmp_path / "k.o")], capture_output=True, text=True, check=True).stdout
        own = sum(int(size) for size in re.findall(r"^\.text\S*\s+(\d+)", text, re.MULTILINE))
        assert max(addresses) - min(addresses) < 2 * own, "tile instructions lie in one object"


@needs_compiler
def test_compiles_without_amx() -> None:
    """Where the compiler does not know it, and on other architectures."""
    flags = [*BUILD, "-DFASTCONV_AMX=0", "-Wall", "-Werror", "-fsyntax-only"]
    subprocess.run([str(COMPILER), *flags, f"{CONV}/amx.cpp", f"{CONV}/amx_kernels.cpp"], check=True)


def test_when_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(
        size: int, channels: int = 32, stride: int = 1, groups: int = 1, kernel: int = 3, padding: int = 1
    ) -> ConvGeometry:
        weight = (64, channels // groups, kernel, kernel)
        shape = (2, channels, size, size)
        return ConvGeometry.of("test", shape, weight, None, (stride, stride), (padding, padding), (1, 1), groups)

    def first(g: ConvGeometry, direction: str = "forward", policy: Policy = BFLOAT16) -> str:
        return cpu.algorithms(direction, g, policy)[0]

    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    assert first(of(14)) == first(of(14), "weight_grad") == first(of(14), "input_grad") == "amx"
    assert cpu.algorithms("input_grad", of(14, channels=8), BFLOAT16) == ("", "amx")
    # First layers: where there are many products, oneDNN's tiles are faster than our kernels without.
    for direction, layer, wanted in (
        ("forward", of(56, channels=3), "first"),
        ("forward", of(224, channels=3), ""),
        ("weight_grad", of(224, channels=3), "first"),
        ("forward", of(56, channels=3, kernel=7), ""),
        ("weight_grad", of(56, channels=3, kernel=7), ""),
    ):
        assert first(layer, direction) == wanted
        assert first(layer, direction, Policy(torch.float32)) == "first"
    assert first(of(14), policy=Policy(torch.bfloat16, direct=True)) == "amx", "AMX sums products as they are"
    for other in (of(14, stride=2), of(14, groups=2), of(14, kernel=5), of(14, padding=3)):
        assert cpu.algorithms("forward", other, BFLOAT16) == ("",)
    for dtype in (torch.float32, torch.float16):
        assert "amx" not in cpu.algorithms("forward", of(56), Policy(dtype))
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)
    assert "amx" not in cpu.algorithms("forward", of(56), BFLOAT16)


@needs_library
def test_operators_ask_whether_there_is_amx() -> None:
    """After their arguments, whose checks test_native_operands.py covers."""
    operator = torch.ops.fastconv_native.amx_conv2d
    x, weight, y = random(1, 32, 6, 6), random(16, 32, 3, 3), random(1, 16, 6, 6)
    if native.library().has_amx():
        operator(x, weight, None, None, y, None, (6, 6), (1, 1), True, False)
    else:
        with pytest.raises(RuntimeError, match="this process has no AMX"):
            operator(x, weight, None, None, y, None, (6, 6), (1, 1), True, False)
