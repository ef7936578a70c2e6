"""Builds the compiled library (csrc), or decides not to, and says which and why.

FASTCONV_BUILD=auto (the default)  the CPU library where torch and a C++ compiler are found, and the CUDA library beside it
                                   where torch was built for CUDA and nvcc is found; else pure Python
FASTCONV_BUILD=cpu                 the CPU library; an error where torch or the compiler is missing
FASTCONV_BUILD=cuda                both libraries; an error where anything is missing
FASTCONV_BUILD=none                pure Python

Whether a GPU is visible is never asked. TORCH_CUDA_ARCH_LIST says what nvcc compiles for, else ARCHITECTURES does.

FASTCONV_SANITIZE=address,undefined builds a library for debugging, with g++'s sanitizers of these names: a finding ends the
process. `make sanitize` builds one into a folder of its own and preloads what it needs.

A compiler that is found but fails is an error in every mode but 'none'. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
SOURCES = (
    "csrc/registry.cpp",
    "csrc/cpu/avg_pool.cpp",
    "csrc/cpu/batch_norm.cpp",
    "csrc/cpu/batch_norm_backward.cpp",
    "csrc/cpu/batch_norm_pool.cpp",
    "csrc/cpu/conv.cpp",
    "csrc/cpu/conv/amx.cpp",
    "csrc/cpu/conv/amx_kernels.cpp",
    "csrc/cpu/conv/amx_operators.cpp",
    "csrc/cpu/conv/first.cpp",
    "csrc/cpu/conv/kernels_avx2.cpp",
    "csrc/cpu/conv/kernels_avx512.cpp",
    "csrc/cpu/conv/kernels_avx512_bf16.cpp",
    "csrc/cpu/conv/kernels_default.cpp",
    "csrc/cpu/conv/winograd.cpp",
    "csrc/cpu/max_pool.cpp",
    "csrc/cpu/max_pool_backward.cpp",
    "csrc/cpu/relu.cpp",
    "csrc/cpu/simd.cpp",
)
CUDA_SOURCES = (
    "csrc/cuda/avg_pool.cu",
    "csrc/cuda/batch_norm.cu",
    "csrc/cuda/batch_norm_backward.cu",
    "csrc/cuda/conv.cu",
    "csrc/cuda/conv_bf16.cu",
    "csrc/cuda/conv_direct.cu",
    "csrc/cuda/conv_direct_wgrad.cu",
    "csrc/cuda/conv_f16.cu",
    "csrc/cuda/conv_ieee.cu",
    "csrc/cuda/conv_tf32.cu",
    "csrc/cuda/max_pool.cu",
    "csrc/cuda/relu.cu",
    "csrc/cuda/registry.cpp",
)
# Both libraries'.
HEADERS = (
    "csrc/cpu/batch_norm.h",
    "csrc/cpu/channel_sums.h",
    "csrc/cpu/conv/amx.h",
    "csrc/cpu/conv/amx_conv.h",
    "csrc/cpu/conv/amx_pack.h",
    "csrc/cpu/conv/amx_tiles.h",
    "csrc/cpu/conv/amx_weight_grad.h",
    "csrc/cpu/conv/conv3x3.h",
    "csrc/cpu/conv/conv3x3_operands.h",
    "csrc/cpu/conv/dispatch.h",
    "csrc/cpu/conv/epilogue.h",
    "csrc/cpu/conv/first.h",
    "csrc/cpu/conv/first_kernels.h",
    "csrc/cpu/conv/kernels.h",
    "csrc/cpu/conv/kernels.inc",
    "csrc/cpu/conv/output.h",
    "csrc/cpu/conv/product.h",
    "csrc/cpu/conv/vec.h",
    "csrc/cpu/conv/winograd.h",
    "csrc/cpu/conv/winograd_direct.h",
    "csrc/cpu/conv/winograd_kernels.h",
    "csrc/cpu/conv/winograd_transforms.h",
    "csrc/cpu/inline.h",
    "csrc/cpu/memory.h",
    "csrc/cpu/operators.h",
    "csrc/cpu/parallel.h",
    "csrc/cpu/scalar.h",
    "csrc/cpu/simd.h",
    "csrc/cpu/tensors.h",
    "csrc/cpu/windows.h",
    "csrc/cuda/batch_norm.h",
    "csrc/cuda/conv.h",
    "csrc/cuda/conv_direct.h",
    "csrc/cuda/conv_kernels.h",
    "csrc/cuda/conv_launch.h",
    "csrc/cuda/conv_wgrad.h",
    "csrc/cuda/device.h",
    "csrc/cuda/launch.h",
    "csrc/cuda/operands.h",
    "csrc/cuda/operators.h",
    "csrc/cuda/pixels.h",
    "csrc/cuda/sum_rows.h",
    "csrc/cuda/tensors.h",
    "csrc/cuda/tile.h",
    "csrc/cuda/values.h",
    "csrc/cuda/walk.h",
    "csrc/cuda/windows.h",
    "csrc/maps.h",
    "csrc/passes.h",
    "csrc/schemas.h",
)
# -ffp-contract=off: element-wise passes give the same bits on every instruction set, with or without fused multiply-adds.
# -fno-math-errno and -fno-trapping-math only free the vectoriser; NaN and infinities keep their meaning.
FLAGS = ("-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
# In place of -O3 -g0 under FASTCONV_SANITIZE: reports name lines and callers.
SANITIZER_FLAGS = ("-O2", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
NVCC_FLAGS = ("-O3", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden")
# Compute capabilities: one for each kind of tensor core. The last nvcc knows comes as PTX too, for chips that are newer.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0")
# torch's names for some.
NAMED = {"Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0 12.0+PTX"}
# The oldest torch whose stable ABI the library may use; one binary then serves it and every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"


def find_torch() -> ModuleType | None:
    """The environment's own torch.

    pip's build isolation hides it. Listing torch in build-system.requires would download another one of several GB, so
    look into the environment's site-packages instead: appended, so that the isolated setuptools comes first.
    """
    for folder in (None, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if folder is not None and folder not in sys.path:
            sys.path.append(folder)
        try:
            import torch
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
        else:
            return torch
    return None


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++ and clang++ on PATH."""
    if "CXX" in os.environ:
        words = shlex.split(os.environ["CXX"])
        return os.environ["CXX"] if words and shutil.which(words[-1]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc() -> str | None:
    """CUDA's compiler: of $CUDA_HOME or $CUDA_PATH, else on PATH, else where CUDA installs itself."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return shutil.which("nvcc", path=os.path.join(os.environ[name], "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def choose(mode: str, torch: ModuleType | None, compiler: str | None, nvcc: str | None) -> tuple[tuple[str, ...], str]:
    """Which libraries to build, 'cpu' and 'cuda', and why.

    Raises:
        SystemExit: the mode is unknown, or asks for a library that cannot be built.
    """
    if mode not in MODES:
        raise SystemExit(f"FASTCONV_BUILD={mode!r} is unknown; allowed: {', '.join(MODES)}")
    if mode == "none":
        return (), "FASTCONV_BUILD=none"
    missing = []
    if torch is None:
        missing.append("torch is not installed in this environment (install it first)")
    if compiler is None:
        missing.append("no C++ compiler was found ($CXX, c++, g++, clang++)")
    no_cuda = None if mode == "cpu" or torch is None else without_cuda(torch, nvcc)
    if mode == "cuda" and no_cuda is not None:
        missing.append(no_cuda)
    if missing and mode != "auto":
        raise SystemExit(f"FASTCONV_BUILD={mode}, but {' and '.join(missing)}")
    if missing:
        return (), " and ".join(missing)
    assert torch is not None
    found = f"FASTCONV_BUILD={mode}, torch {torch.__version__}, compiler {compiler}"
    if mode == "cpu":
        return ("cpu",), found
    if no_cuda is not None:
        return ("cpu",), f"{found}; no CUDA library: {no_cuda}"
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    wanted = f" (TORCH_CUDA_ARCH_LIST={asked!r})" if asked else ""
    return ("cpu", "cuda"), f"{found}, {nvcc} for {' '.join(architectures(nvcc))}{wanted}"


def without_cuda(torch: ModuleType, nvcc: str | None) -> str | None:
    """Why there can be no CUDA library; None where there can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if nvcc is None:
        return "no nvcc was found ($CUDA_HOME, PATH, /usr/local/cuda)"
    version = re.search(r"release (\S+),", said_by(nvcc, "--version"))
    if version is None:
        return f"{nvcc} does not say its version: it does not work"
    if version[1].partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return f"{nvcc} is of CUDA {version[1]}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    if not architectures(nvcc):
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        return (
            f"TORCH_CUDA_ARCH_LIST={asked!r} asks for no compute capability from 8.0 on, which the kernels need: cp.async, "
            f"and tensor cores that know bfloat16 and TF32; allowed: such as '8.0;9.0+PTX', and {', '.join(NAMED)}"
        )
    return None


def said_by(nvcc: str, *arguments: str) -> str:
    """What nvcc prints; nothing where it does not work."""
    try:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout + result.stderr if result.returncode == 0 else ""


def architectures(nvcc: str | None) -> list[str]:
    """Compute capabilities to compile for, as torch's extensions take them: '9.0', or '9.0+PTX'. None below 8.0."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if nvcc is None or (asked and {"native", "All", "Common"}.isdisjoint(asked)):
        numbers = " ".join(NAMED.get(name, name) for name in asked).split()
        return [each for each in numbers if re.fullmatch(r"([89]|\d\d)\.\d[af]?(\+PTX)?", each)]
    listed = said_by(nvcc, "--list-gpu-arch").split()
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed]
    return [*known[:-1], *(f"{last}+PTX" for last in known[-1:])]


def flags(sanitizers: str) -> tuple[list[str], list[str]]:
    """(the compiler's flags, the linker's), with g++'s `sanitizers` ('address,undefined'); without where that is empty."""
    compile_flags, link_flags = [*FLAGS], ["-s"]
    if sanitizers:
        kept = (flag for flag in FLAGS if flag not in ("-O3", "-g0"))
        compile_flags, link_flags = [*kept, *SANITIZER_FLAGS, f"-fsanitize={sanitizers}"], [f"-fsanitize={sanitizers}"]
    return compile_flags, link_flags


def extensions(libraries: tuple[str, ...], compiler: str, nvcc: str | None) -> dict[str, object]:
    """setup()'s arguments for the compiled libraries."""
    os.environ.setdefault("CXX", compiler)
    if "cuda" in libraries and nvcc is not None:  # they are read when torch's module is imported, or when it builds
        os.environ.setdefault("CUDA_HOME", toolkit_of(nvcc))
        os.environ.setdefault("CC", shlex.split(compiler)[-1])  # by which torch's extensions tell nvcc its host compiler
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures(nvcc))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    from torch.version import cuda as torch_cuda

    compile_flags, link_flags = flags(os.environ.get("FASTCONV_SANITIZE", ""))
    stable = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    # The libraries know each other's operators by their schemas.
    digest = hashlib.sha256(Path(__file__).with_name("csrc").joinpath("schemas.h").read_bytes()).hexdigest()[:16]
    schemas = f'-DFASTCONV_SCHEMAS="{digest}"'
    modules = [
        CppExtension(
            "fastconv._C",
            list(SOURCES),
            depends=list(HEADERS),
            extra_compile_args={"cxx": [*compile_flags, stable, schemas, f'-DFASTCONV_FLAGS="{" ".join(compile_flags)}"']},
            extra_link_args=link_flags,
        )
    ]
    if "cuda" in libraries and nvcc is not None:
        told = [
            f'-DFASTCONV_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"',
            f'-DFASTCONV_CUDA="{torch_cuda}"',
            schemas,
        ]
        modules.append(
            CUDAExtension(
                "fastconv._cuda",
                list(CUDA_SOURCES),
                depends=list(HEADERS),
                extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA", stable, *told], "nvcc": [*NVCC_FLAGS, stable]},
                extra_link_args=["-s"],
            )
        )

    class BuildWithAdvice(BuildExtension):
        def build_extension(self, ext: object) -> None:
            try:
                super().build_extension(ext)
            except BaseException:
                if getattr(ext, "name", "") == "fastconv._cuda":
                    print("fastconv: the CUDA library was not built; FASTCONV_BUILD=cpu builds without it", file=sys.stderr)
                raise

    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildWithAdvice}}


def toolkit_of(nvcc: str) -> str:
    """The folder of the toolkit that `nvcc`, which may be a script somewhere else, belongs to."""
    found = re.search(r"^#\$ TOP=(.+)$", said_by(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return os.path.realpath(found[1] if found else os.path.join(os.path.dirname(os.path.realpath(nvcc)), ".."))


def main() -> None:
    mode = os.environ.get("FASTCONV_BUILD", "auto")
    compiler, nvcc = find_compiler(), find_nvcc()
    torch = None if mode == "none" else find_torch()
    libraries, reason = choose(mode, torch, compiler, nvcc)
    built = {(): "pure Python, without libraries", ("cpu",): "the CPU library"}.get(
        libraries, "the CPU and the CUDA library"
    )
    # Standard error: metadata commands answer on standard output. pip shows it with -v.
    print(f"fastconv: {built} ({reason})", file=sys.stderr)
    setup(**(extensions(libraries, compiler, nvcc) if libraries and compiler else {}))


if __name__ == "__main__":
    main()
