"""What `make gpu` runs: the commands of each part, in the order in which they are run."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

PARTS = ("tests", "tune", "layers", "models", "training", "inspect")


class Setup(NamedTuple):
    """Where parts run.

    Attributes:
        arch: of the chips that `fastconv inspect` knows, the one nearest to this.
        root, folder: of results, and in it the chip's own.
        cache: in place of the user's cache directory, so that no table of the user's has a say.
        table: where later processes read the chip's table of measurements.
    """

    device: str
    is_quick: bool
    chip: str
    arch: str
    root: Path
    folder: Path
    cache: Path
    table: Path


class Step(NamedTuple):
    """A command; "{seconds}" in it stands for the seconds in which it may begin new work.

    Attributes:
        most: seconds that it may take; a step that has no such limit has what is left of its part.
        unfinished: its exit status when it stopped in time with work left.
        is_page: what it prints goes into inspect.md.
    """

    name: str
    command: tuple[str, ...]
    most: float = math.inf
    unfinished: int = 3
    is_page: bool = False


def parts(setup: Setup) -> dict[str, list[Step]]:
    """The steps of each part."""
    suites = {"layers": ("overhead", "scaling", "pools", "layers"), "models": ("models",), "training": ("training",)}
    benches = {part: [_bench(setup, *suites)] for part, suites in suites.items()}
    return {"tests": _tests(setup), "tune": _tune(setup), **benches, "inspect": _inspect(setup)}


def _fastconv(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "fastconv", *arguments)


def _bench(setup: Setup, *suites: str) -> Step:
    chosen = [word for suite in suites for word in ("--suite", suite)]
    options = ["--device", setup.device, "--out", str(setup.root), "--resume", "--seconds", "{seconds}", "--no-plots"]
    return Step(" ".join(suites), _fastconv("bench", *chosen, *options, *(["--quick"] if setup.is_quick else [])))


def _tests(setup: Setup) -> list[Step]:
    quiet = ("-q", "-rfE", "--tb=short")
    pytest = (sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", *quiet, "--seconds", "{seconds}")
    every = ("-m", "gpu", "--durations=15", "--continue-on-collection-errors", "-o", "faulthandler_timeout=120")
    if setup.device == "cuda" and importlib.util.find_spec(
        "xdist"
    ):  # most of the time goes into compiling, on one core each
        every = (*every, "-n", str(max(1, min(8, (os.cpu_count() or 2) // 2))))
    steps = [Step("gpu", (*pytest, *every, "--passed", str(setup.folder / "passed.txt"), "tests"), unfinished=75)]
    if setup.device == "cpu":
        few = ("-m", "not gpu", "-k", "TestReLUBackward and cpu", "tests/test_native_kernels.py")
        return [*steps, Step("cpu", (*pytest, *few), unfinished=75)]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    )
    if sanitizer is None:
        return [*steps, Step("sanitizer", ("echo", "left out: no compute-sanitizer on PATH or under $CUDA_HOME/bin"))]
    # Small convolutions in every direction, on the native kernels and on Triton's.
    few = (
        "(test_native_kernels.py and 3x3-torch and (True-True-True or with_pool or gradients)) or "
        "(test_native_kernels.py and test_relu and True and 64) or "
        "(triton and cuda-3x3-bfloat16 and channels_last and (test_conv2d_relu_max_pool2d and 2x2 or plain))"
    )
    chosen = ("-m", "gpu", "-k", few, "tests/test_native_kernels.py", "tests/test_functional.py")
    # What libraries ask of the driver and are refused is none of our errors.
    for tool, options in (("memcheck", ("--report-api-errors", "no")), ("racecheck", ())):
        # Allocations that are not cached: what lies behind a tensor is no other tensor's.
        checked = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", tool, "--error-exitcode", "86", *options)
        steps.append(Step(tool, (*checked, *pytest, *chosen), most=120.0, unfinished=75))
    return steps


def _tune(setup: Setup) -> list[Step]:
    nets = [("recipe", "256x3x224x224"), ("recipe", "128x3x32x32"), ("vgg16", "32x3x224x224")]
    dtypes, budget = ["bfloat16", "float16", "float32"], "45"
    if setup.is_quick:
        nets, dtypes, budget = [("recipe", "2x3x8x8")], ["float32"], "1"
    where = ("--device", setup.device, "--out", str(setup.folder / "tuning.json"))
    how = ("--budget", budget, "--resume", "--seconds", "{seconds}")
    return [
        Step(f"{net} {shape} {dtype}", _fastconv("tune", "--model", net, "--input", shape, "--dtype", dtype, *where, *how))
        for dtype in dtypes
        for net, shape in nets
    ]


def _inspect(setup: Setup) -> list[Step]:
    nets = [("recipe", 256, 224), ("vgg16", 32, 224)] if not setup.is_quick else [("recipe", 2, 32), ("vgg16", 1, 32)]
    steps = [Step("What is installed", _fastconv("info"), is_page=True)]
    for net, batch, size in nets:
        explain = ("--model", net, "--input", f"3x{size}x{size}", "--batch", str(batch), "--chip", setup.chip)
        steps.append(Step(f"What runs for {net}, R = {size}, batch {batch}", _fastconv("explain", *explain), is_page=True))
    kernels = (sys.executable, "-m", "fastconv.bench.kernels", "--device", setup.device)
    for net, batch, size in nets:
        which = ("--model", net, "--batch", str(batch), "--size", str(size))
        steps.append(Step(f"Kernels of a training step: {net}", (*kernels, *which), is_page=True))
    few = ["--first", "--kernel", "max_pool"] if setup.is_quick else ["--processes", str(os.cpu_count() or 2)]
    return [*steps, Step("What Triton's kernels compile to", _fastconv("inspect", "--arch", setup.arch, *few), is_page=True)]
