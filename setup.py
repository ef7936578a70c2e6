"""Builds the compiled library (csrc), or decides not to, and says which and why.

FASTCONV_BUILD=auto (the default)  the CPU library where torch and a C++ compiler are found, else pure Python
FASTCONV_BUILD=cpu                 the CPU library; an error where torch or the compiler is missing
FASTCONV_BUILD=none                pure Python

FASTCONV_SANITIZE=address,undefined builds a library for debugging, with g++'s sanitizers of these names: a finding ends the
process. `make sanitize` builds one into a folder of its own and preloads what it needs.

A compiler that is found but fails is an error in every mode but 'none'. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from types import ModuleType

from setuptools import setup

MODES = ("auto", "cpu", "none")
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
)
# -ffp-contract=off: element-wise passes give the same bits on every instruction set, with or without fused multiply-adds.
# -fno-math-errno and -fno-trapping-math only free the vectoriser; NaN and infinities keep their meaning.
FLAGS = ("-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
# In place of -O3 -g0 under FASTCONV_SANITIZE: reports name lines and callers.
SANITIZER_FLAGS = ("-O2", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
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


def choose(mode: str, torch: ModuleType | None, compiler: str | None) -> tuple[bool, str]:
    """Whether to build the library, and why.

    Raises:
        SystemExit: the mode is unknown, or asks for a library that cannot be built.
    """
    if mode not in MODES:
        raise SystemExit(f"FASTCONV_BUILD={mode!r} is unknown; allowed: {', '.join(MODES)}")
    if mode == "none":
        return False, "FASTCONV_BUILD=none"
    missing = []
    if torch is None:
        missing.append("torch is not installed in this environment (install it first)")
    if compiler is None:
        missing.append("no C++ compiler was found ($CXX, c++, g++, clang++)")
    if not missing:
        return True, f"FASTCONV_BUILD={mode}, torch {torch.__version__}, compiler {compiler}"
    reason = " and ".join(missing)
    if mode == "cpu":
        raise SystemExit(f"FASTCONV_BUILD=cpu, but {reason}")
    return False, reason


def flags(sanitizers: str) -> tuple[list[str], list[str]]:
    """(the compiler's flags, the linker's), with g++'s `sanitizers` ('address,undefined'); without where that is empty."""
    compile_flags, link_flags = [*FLAGS], ["-s"]
    if sanitizers:
        kept = (flag for flag in FLAGS if flag not in ("-O3", "-g0"))
        compile_flags, link_flags = [*kept, *SANITIZER_FLAGS, f"-fsanitize={sanitizers}"], [f"-fsanitize={sanitizers}"]
    return compile_flags, link_flags


def extension(compiler: str) -> dict[str, object]:
    """setup()'s arguments for the compiled library."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.environ.setdefault("CXX", compiler)
    compile_flags, link_flags = flags(os.environ.get("FASTCONV_SANITIZE", ""))
    told = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f'-DFASTCONV_FLAGS="{" ".join(compile_flags)}"']
    module = CppExtension(
        "fastconv._C",
        list(SOURCES),
        depends=list(HEADERS),
        extra_compile_args={"cxx": [*compile_flags, *told]},
        extra_link_args=link_flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def main() -> None:
    mode = os.environ.get("FASTCONV_BUILD", "auto")
    compiler = find_compiler()
    torch = None if mode == "none" else find_torch()
    build, reason = choose(mode, torch, compiler)
    # Standard error: metadata commands answer on standard output. pip shows it with -v.
    print(f"fastconv: {'the CPU library' if build else 'pure Python, without the library'} ({reason})", file=sys.stderr)
    setup(**(extension(compiler) if build and compiler else {}))


if __name__ == "__main__":
    main()
