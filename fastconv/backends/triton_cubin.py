"""What a compiled kernel's machine code says: registers, stack, and the instructions that speed hangs on.

Read by the tools that come with Triton. Starting the disassembler takes longer than its work, so that the code of many
kernels is disassembled at once.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_MMA = {"hgmma": r"\bHGMMA", "tcgen05": r"\bUTC\w*MMA", "hmma": r"\bHMMA"}
_COUNTS = {
    "tma_loads": r"\bUTMALDG",
    "tma_stores": r"\bUTMASTG",
    "copies": r"\bLDGSTS",
    "wide_copies": r"\bLDGSTS\S*\.128",
    "loads": r"\bLDG\.",
    "wide_loads": r"\bLDG\.\S*\.128",
}
_ASSEMBLY = {80: "SM80", 90: "SM90a", 100: "SM100a"}
# Every instruction of these chips is 16 bytes.
_INSTRUCTION = 16


def machine_code(files: Sequence[Path], capability: int) -> list[dict[str, Any]]:
    """For each cubin: registers and stack_bytes of a thread, mma ('hgmma', 'tcgen05', 'hmma' or 'none'), counts of
    instructions, and loop_instructions, those of the smallest loop with a product in it (0 where there is none).
    """
    texts = [_text(file.read_bytes()) for file in files]
    lines = _disassemble(b"".join(texts), capability) if texts else []
    found, start = [], 0
    for file, text in zip(files, texts, strict=True):
        end = start + len(text) // _INSTRUCTION
        found.append({**_resources(file), **_instructions(lines[start:end], start)})
        start = end
    return found


def _resources(cubin: Path) -> dict[str, int]:
    usage = subprocess.check_output([_tool("cuobjdump"), "-res-usage", cubin], text=True)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    return {"registers": int(resources[1]), "stack_bytes": int(resources[2])}


def _instructions(lines: Sequence[str], start: int) -> dict[str, Any]:
    code = "\n".join(lines)
    products = {name: len(re.findall(pattern, code)) for name, pattern in _MMA.items()}
    mma = next((name for name, count in products.items() if count), "none")
    counts = {name: len(re.findall(pattern, code)) for name, pattern in _COUNTS.items()}
    loop = min(_product_loops(lines, start), default=0)
    return {"mma": mma, "mma_count": products.get(mma, 0), **counts, "loop_instructions": loop}


def _product_loops(lines: Sequence[str], start: int) -> Iterator[int]:
    """The length of each loop that has a product in it, from the target of a branch back to that branch.

    Args:
        start: how many instructions came before `lines` in what was disassembled.
    """
    products = [index for index, line in enumerate(lines) if re.search("|".join(_MMA.values()), line)]
    for index, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
        target = int(branch[1], 16) // _INSTRUCTION - start if branch else index
        if 0 <= target < index and any(target <= product <= index for product in products):
            yield index - target + 1


def _disassemble(code: bytes, capability: int) -> list[str]:
    """One line for each instruction; targets of branches are addresses within `code`."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(code)
        file.flush()
        command: list[str | Path] = [_tool("nvdisasm"), "-b", _ASSEMBLY[capability], file.name]
        printed = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    lines = [line for line in printed.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    assert len(lines) * _INSTRUCTION == len(code), "not every instruction was disassembled"
    return lines


def _text(cubin: bytes) -> bytes:
    """The instructions of a cubin's kernel: the one section of an ELF file that is named .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, name_section = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * entry_size) for index in range(count)]
    names = sections[name_section][4]
    (text,) = (
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin.startswith(b".text.", names + name)
    )
    return text


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
