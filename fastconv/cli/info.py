"""`fastconv info`: what is installed, what can run where, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from types import ModuleType
from typing import Any

import torch

import fastconv
from fastconv import backends
from fastconv.backends import native, native_amx, native_library
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy, get_precision
from fastconv.tuning import tables

_OPTIONAL = ("scikit-learn", "matplotlib", "numpy", "Pillow", "tqdm")


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info",
        help="versions, devices, and which backend serves what",
        description="Print versions and devices, which backend serves CPU and CUDA tensors and, if one cannot, why.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    for name, value in rows():
        print(f"{name:<22} {value}".rstrip())


def rows() -> list[tuple[str, str]]:
    """Names and values, in the order printed."""
    return [*_versions(), *_devices(), *_native(), _cuda_library(), *_backends(), *_tables()]


def _versions() -> list[tuple[str, str]]:
    found = [
        ("fastconv", fastconv.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("Triton", _version("triton") or "not installed; the triton backend needs it: pip install 'triton>=3.6'"),
    ]
    missing = [name for name in _OPTIONAL if _version(name) is None]
    if missing:
        found.append(("for `fastconv train`", f"missing: {', '.join(missing)}; pip install 'fastconv[train]'"))
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [("CPU", cpu)]
    if not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no device, or its driver does not answer"
        return [*found, ("CUDA", f"none: {reason}")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append((f"CUDA {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory:.0f} GiB"))
    return found


def _native() -> list[tuple[str, str]]:
    """What the compiled library says about itself, or why there is none."""
    missing = native.unavailable()
    if missing is not None:
        return [("compiled library", f"none: {missing}"), ("", "a C++ compiler is, for instance, Debian's package g++")]
    library = native.library()
    missing = native_amx.unavailable()
    amx = "ready" if missing is None else f"no: {missing}"
    found = [("its CPU kernels", library.cpu_capability()), ("its AMX kernels", amx)]
    return [("compiled library", _build(library)), *found]


def _cuda_library() -> tuple[str, str]:
    library = native_library.cuda_library()
    return ("CUDA library", f"none: {library}" if isinstance(library, str) else _build(library))


def _build(library: ModuleType) -> str:
    return ", ".join(f"{key} {value}" for key, value in library.build_info().items())


def _backends() -> list[tuple[str, str]]:
    """For each backend and kind of device: whether it serves an ordinary convolution, or the reason why not."""
    geometry = ConvGeometry.of("conv2d_relu", (8, 64, 16, 16), (64, 64, 3, 3), (64,), (1, 1), (1, 1), (1, 1), 1)
    found = [("backend asked for", backends.requested()), ("precision", get_precision())]
    for name in backends.NAMES:
        for device_type in ("cpu", "cuda"):
            if device_type == "cuda" and not torch.cuda.is_available():
                continue
            reason = backends.load(name).supports("conv2d_relu", "forward", geometry, Policy(torch.float32), device_type)
            found.append((f"{name} on {device_type}", "ready" if reason is None else f"no: {reason}"))
    return found


def _tables() -> list[tuple[str, str]]:
    """The chips of this machine, and the tables of measurements that choices on them come from."""
    chips = [backends.chip("cpu")]
    if torch.cuda.is_available():
        chips += [backends.chip("cuda", index) for index in range(torch.cuda.device_count())]
    found = []
    for chip in dict.fromkeys(chips):
        files = [f"{path}: {tables.describe(path, chip)}" for path in tables.files(chip)]
        found += [("table for", chip), *(("", line) for line in files or ["none: `fastconv tune` measures one"])]
    return found
