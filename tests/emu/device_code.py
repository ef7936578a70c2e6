"""The CUDA sources compiled by nvcc for chips that need not be there, and what their machine code says.

Run as a script, it writes the table of docs/cuda.md: `python tests/emu/device_code.py docs/cuda.md`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "nvcc"
CAPABILITIES = (80, 90)


def _setup() -> ModuleType:
    """setup.py, which knows how the libraries are built."""
    spec = importlib.util.spec_from_file_location("fastconv_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = _setup()
TARGET_VERSION = f"-DTORCH_TARGET_VERSION={SETUP.TORCH_TARGET_VERSION}"
FLAGS = ("-std=c++20", *SETUP.NVCC_FLAGS, TARGET_VERSION, "-Xcompiler", "-fPIC")

# Of instructions, by what they do: products, fragments from shared memory, copies of 16 bytes to it, stores of 16 bytes.
_INSTRUCTIONS = {
    "products": r"HMMA\.",
    "fragments": r"LDSM\.\S*M(T)?88\.4",
    "copies": r"LDGSTS\S*\.128",
    "wide_loads": r"LDG\S*\.128",
    "wide_stores": r"STG\S*\.128",
}


class Kernel(NamedTuple):
    """One kernel on one chip."""

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    instructions: Counter[str]


def unavailable() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if nvcc() is None:
        return "no nvcc"
    return None if _tool("cuobjdump").exists() else "no disassembler: it comes with Triton"


def nvcc() -> str | None:
    found: str | None = SETUP.find_nvcc()
    return found


def version() -> str | None:
    """Of nvcc, '13.0'; None where there is none."""
    compiler = nvcc()
    if compiler is None:
        return None
    printed = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", printed)
    return found[1] if found else None


def sources() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


def compile_all(capabilities: Sequence[int] = CAPABILITIES) -> dict[Path, Path]:
    """An object for each source, compiled unless it is there already from the same text and headers.

    Raises:
        RuntimeError: a source does not compile.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    text = b"".join(path.read_bytes() for path in sorted([*CUDA.glob("*.h"), *(ROOT / "csrc").glob("*.h")]))

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(repr((FLAGS, capabilities, torch.__version__)).encode() + text + source.read_bytes())
        target = BUILD / f"{source.stem}.{key.hexdigest()[:16]}.o"
        if not (target.exists() and _log(target).exists()):
            chips = (("-gencode", f"arch=compute_{chip},code=sm_{chip}") for chip in capabilities)
            include = Path(torch.__file__).parent / "include"
            unfinished = target.with_suffix(f".{os.getpid()}.o")
            command = [str(nvcc()), *FLAGS, f"-I{include}", *(word for chip in chips for word in chip), "-Xptxas", "-v"]
            result = subprocess.run([*command, "-c", str(source), "-o", str(unfinished)], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{source.name} does not compile:\n{result.stderr[-4000:]}")
            _log(target).write_text(result.stderr)
            unfinished.replace(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sources(), pool.map(compile_one, sources()), strict=True))


def kernels(objects: dict[Path, Path]) -> list[Kernel]:
    """What ptxas says of every kernel, and what its machine code holds."""
    return [kernel for target in objects.values() for kernel in _kernels(target)]


def _kernels(target: Path) -> Iterator[Kernel]:
    code = {key: Counter(_counts(lines)) for key, lines in _functions(target)}
    parts = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'",
        r"(\d+) bytes spill stores, (\d+) bytes",
        r"Used (\d+) registers",
    )
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    for name, capability, stores, loads, registers in pattern.findall(_log(target).read_text()):
        key = (name, int(capability))
        yield Kernel(demangled(name), key[1], int(registers), int(stores) + int(loads), code[key])


def _functions(target: Path) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """((mangled name, capability), lines of the disassembly) of each kernel in an object."""
    printed = subprocess.run([_tool("cuobjdump"), "-sass", target], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, int], list[str]] = {}
    capability, lines = 0, []
    for line in printed.splitlines():
        if chip := re.match(r"\s*(?:code for|arch =) sm_(\d+)", line):
            capability = int(chip[1])
        elif function := re.match(r"\s*Function : (\S+)", line):
            lines = found.setdefault((function[1], capability), [])
        else:
            lines.append(line)
    yield from found.items()


def _counts(lines: list[str]) -> dict[str, int]:
    code = "\n".join(lines)
    return {what: len(re.findall(pattern, code)) for what, pattern in _INSTRUCTIONS.items()}


def demangled(name: str) -> str:
    """Template and arguments, without what every name has."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"^void ", "", plain).replace("fastconv::", "")
    plain = re.sub(r"\(Route\)(\d)", lambda found: ("forward", "forward+pool", "input gradient")[int(found[1])], plain)
    return re.sub(r"\([^()]*\)$", "", plain)


def _log(target: Path) -> Path:
    return target.with_suffix(".ptxas")


def _tool(name: str) -> Path:
    try:
        import triton
    except ImportError:
        return Path(name)
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


_DTYPES = {"Bf16": "bfloat16", "F16": "float16", "Tf32": "TF32", "Ieee": "float32"}
_DTYPES |= {"bf16": "bfloat16", "f16": "float16", "float": "float32"}


def _place(name: str) -> tuple[str, str]:
    """(row, column) of the table: a kernel without its dtype, and the dtype.

    Threads take vectors of 16 bytes, or single elements.
    """
    found = re.search(r"\b(Bf16|F16|Tf32|Ieee|bf16|f16|float)\b(, )?", name)
    if found is None:
        return name, ""
    vector = "4" if found[1] == "float" else "8"
    row = name[: found.start()] + name[found.end() :]
    row = re.sub(r"\b1(?=[,>])", "single", re.sub(rf"\b{vector}(?=[,>])", "vector", row))
    row = (
        row.replace("Shape<", "")
        .replace(" 2, 4>", " 8 warps")
        .replace(" 2, 2>", " 4 warps")
        .replace("unsigned char", "uint8")
    )
    row = re.sub(r"true>$", "vector>", re.sub(r"false>$", "single>", row)) if row.startswith(("conv", "weight")) else row
    return row.replace("<>", ""), _DTYPES[found[1]]


def table(found: Sequence[Kernel]) -> str:
    """Markdown: the registers of every kernel, on each chip in turn, and the bytes that it spills where there are any."""
    cells: dict[str, dict[str, list[str]]] = {}
    for kernel in sorted({(k.name, k.capability): k for k in found}.values()):
        row, column = _place(kernel.name)
        spilled = f" ({kernel.spilled_bytes} B spilled)" if kernel.spilled_bytes else ""
        cells.setdefault(row, {}).setdefault(column, []).append(f"{kernel.registers}{spilled}")
    columns = ("bfloat16", "float16", "TF32", "float32")
    lines = [f"| kernel | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row, by_dtype in sorted(cells.items()):
        lines.append(f"| `{row}` | " + " | ".join(" / ".join(by_dtype.get(column, [])) for column in columns) + " |")
    return "\n".join(lines)


def write_table(path: Path, found: Sequence[Kernel]) -> None:
    """In place of the one in `path`, between its marks."""
    text = path.read_text(encoding="utf-8")
    before, after = text.partition(_MARKS[0])[0], text.partition(_MARKS[1])[2]
    path.write_text(f"{before}{_MARKS[0]}\n{table(found)}\n{_MARKS[1]}{after}", encoding="utf-8")


_MARKS = ("<!-- table: make docs -->", "<!-- end of table -->")


if __name__ == "__main__":
    if (reason := unavailable()) is not None:
        sys.exit(f"docs/cuda.md is left as it is: {reason}")
    write_table(Path(sys.argv[1]), kernels(compile_all()))
