"""Builds and loads the emulated library: the sources of csrc/cuda as operators of torch.ops.fastconv_emulated."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from emu.device_code import TARGET_VERSION
from fastconv import tuning
from fastconv.backends import native_library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
NAMESPACE = "fastconv_emulated"
BUILD = ROOT / "build" / "emu"
COMPILER = os.environ.get("CXX", "g++")

# Products are fused into sums where the source says so: by fmaf.
_FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas")
_DEFINED = ("-DFASTCONV_EMULATED", TARGET_VERSION)
COUNTS = (
    "launches",
    "blocks",
    "barriers",
    "multiplications",
    "matrix_loads",
    "matrix_load_conflicts",
    "async_copies",
    "shared_accesses",
    "global_accesses",
)


def unavailable() -> str | None:
    """Why nothing can be emulated here; None where it can."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    return native_library.unavailable()


def compile_objects(files: Sequence[Path], flags: Sequence[str] = (), csrc: Path = CSRC, folder: Path = BUILD) -> list[Path]:
    """Objects of C++ files in `folder`, each compiled unless it is there already, from the same text, headers and flags."""
    folder.mkdir(parents=True, exist_ok=True)
    folders = (HERE, csrc, csrc / "cuda")
    includes = [f"-I{path}" for path in (*folders, Path(torch.__file__).parent / "include")]
    shared = hashlib.sha256(repr((_FLAGS, flags, torch.__version__, COMPILER)).encode())
    for header in sorted(header for path in folders for header in path.glob("*.h")):
        shared.update(header.read_bytes())

    def compile_one(file: Path) -> Path:
        digest = shared.copy()
        digest.update(file.read_bytes())
        target = folder / f"{file.stem}.{digest.hexdigest()[:16]}.o"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")
            run([COMPILER, *_FLAGS, *_DEFINED, *flags, *includes, "-x", "c++", "-c", str(file), "-o", str(unfinished)])
            unfinished.replace(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))


def link(objects: Sequence[Path], target: Path, flags: Sequence[str] = ()) -> Path:
    """A library for this process, in which torch's own are loaded."""
    folder = Path(torch.__file__).parent / "lib"
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    run([COMPILER, "-shared", *flags, "-o", str(unfinished), *map(str, objects), f"-L{folder}", "-ltorch_cpu"])
    unfinished.replace(target)
    return target


def run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


class Machine:
    """A loaded library, and what its machine counts."""

    def __init__(self, library: Path, namespace: str) -> None:
        torch.ops.load_library(library)
        self.namespace = namespace
        self.totals = dict.fromkeys(COUNTS, 0)
        self._library = ctypes.CDLL(str(library))

    def set_schedule(self, seed: int) -> None:
        self._library.emu_set_schedule(seed)

    def set_fault(self, number: int) -> None:
        self._library.emu_set_fault(number)

    def counts(self) -> dict[str, int]:
        """Since the last call."""
        values = (ctypes.c_uint64 * len(COUNTS))()
        self._library.emu_counts(values)
        self._library.emu_reset_counts()
        found = dict(zip(COUNTS, values, strict=True))
        self.totals = {name: self.totals[name] + value for name, value in found.items()}
        return found

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A block in which the launchers of the native backend call this library."""
        before, native_library.namespace = native_library.namespace, self.namespace
        tuning.forget()
        try:
            yield
        finally:
            native_library.namespace = before
            tuning.forget()


def library_objects(namespace: str, csrc: Path = CSRC) -> list[Path]:
    """Of all of csrc/cuda but what registers it as CUDA operators, of the machine, and of operators in `namespace`."""
    sources = [*sorted((csrc / "cuda").glob("*.cu")), HERE / "machine.cpp"]
    operators = compile_objects([HERE / "library.cpp"], [f"-DFASTCONV_NAMESPACE={namespace}", "-O0"], csrc)
    return [*compile_objects(sources, csrc=csrc), *operators]


def link_library(namespace: str, objects: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    names = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    target = BUILD / f"{namespace}.{names}.so"
    return target if target.exists() else link(objects, target, flags)


def machine(csrc: Path = CSRC, namespace: str = NAMESPACE) -> Machine:
    """The library of the sources in `csrc`."""
    return Machine(link_library(namespace, library_objects(namespace, csrc)), namespace)
