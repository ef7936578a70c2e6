"""Builds and loads libraries whose kernels are nvcc's: its PTX of the sources, translated, in place of g++'s kernels."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from emu import build, device_code, ptx

TRANSLATED = build.BUILD / "ptx"
# As setup.py builds, for the least architecture it builds for.
_FLAGS = (*device_code.FLAGS, "-arch=compute_80", "-ptx")
# A translation is long and runs for a moment: what costs time is compiling it.
_CPP_FLAGS = ("-O0", "-w", "-fno-strict-aliasing", "-fwrapv")

# What is translated of a file: entries in whose mangled names a pattern is found. `conv` has the sums of weight gradients.
SOURCES = {
    "avg_pool": "4bf16",
    "batch_norm": "4bf16",
    "batch_norm_backward": "4bf16",
    "conv": "",
    "conv_bf16": "4Bf16",
    "conv_direct": "4bf16",
    "conv_direct_wgrad": "4bf16",
    "conv_f16": "3F16",
    "conv_ieee": "4Ieee",
    "conv_tf32": "4Tf32",
    "max_pool": "4bf16",
    "relu": "4bf16",
}


def unavailable() -> str | None:
    """Why nothing can be translated here; None where it can."""
    if (reason := build.unavailable()) is not None:
        return reason
    return None if device_code.nvcc() else "no CUDA compiler (nvcc)"


@functools.cache
def _nvcc() -> tuple[str, str]:
    """The compiler, and which it is."""
    nvcc = device_code.nvcc()
    assert nvcc is not None
    return nvcc, build.run([nvcc, "--version"])


def assemble(file: Path, folder: Path, includes: Sequence[Path] = (build.CUDA,)) -> str:
    """nvcc's PTX of a file, kept in `folder`; headers beside the sources are those of the first of `includes`."""
    nvcc, version = _nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    paths = (*includes, build.ROOT / "csrc", Path(torch.__file__).parent / "include")
    digest = hashlib.sha256(repr((_FLAGS, version, torch.__version__)).encode())
    for source in (file, *sorted(p for path in paths[:-1] for p in path.glob("*.h"))):
        digest.update(source.read_bytes())
    target = folder / f"{file.stem}.{digest.hexdigest()[:16]}.ptx"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        build.run([nvcc, *_FLAGS, *(f"-I{path}" for path in paths), str(file), "-o", str(unfinished)])
        unfinished.replace(target)
    return target.read_text()


def compile_kernels(kernels: Sequence[ptx.Kernel], stem: str, folder: Path) -> Path:
    text = ptx.source(kernels)
    file = folder / f"{stem}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    if not file.exists():
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(text)
        unfinished.replace(file)
    (compiled,) = build.compile_objects([file], _CPP_FLAGS, folder=folder)
    return compiled


class Machine(build.Machine):
    """A library with translated kernels."""

    def __init__(self, library: Path, namespace: str, kernels: Iterable[ptx.Kernel]) -> None:
        super().__init__(library, namespace)
        self.kernels = {kernel.name: kernel for kernel in kernels}

    def threads(self) -> dict[str, int]:
        """How many threads have run each translated kernel."""
        return {name: ctypes.c_uint64.in_dll(self._library, f"threads_of_{name}").value for name in self.kernels}

    def ran(self) -> int:
        """How many translated kernels have been run."""
        return sum(threads > 0 for threads in self.threads().values())


def link(kernels: Sequence[ptx.Kernel], objects: Sequence[Path], namespace: str) -> Machine:
    """The emulated library with its operators in `namespace`, in which `objects` define `kernels` once more.

    A definition that is not weak is taken, by all callers of the library (-Bsymbolic: its own, whatever else is loaded).
    """
    inputs = [*build.library_objects(namespace), *objects]
    return Machine(build.link_library(namespace, inputs, ["-Wl,-Bsymbolic"]), namespace, kernels)


def machine() -> Machine:
    """The sources as they are."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda stem: assemble(build.CUDA / f"{stem}.cu", TRANSLATED), SOURCES))
        kernels: dict[str, ptx.Kernel] = {}
        files: dict[str, list[ptx.Kernel]] = {}
        for (stem, pattern), text in zip(SOURCES.items(), texts, strict=True):
            files[stem] = [k for k in ptx.translate(text, pattern) if k.name not in kernels]
            kernels |= {kernel.name: kernel for kernel in files[stem]}
        objects = list(pool.map(lambda stem: compile_kernels(files[stem], stem, TRANSLATED), files))
    return link(list(kernels.values()), objects, "fastconv_translated")
