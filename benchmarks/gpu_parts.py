"""What `make gpu` runs: the commands of each part, in the order in which they are run."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

PARTS = ("tests", "tune", "layers", "models", "training", "inspect", "train")


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
        unfinished: its exit status when it stopped in time with work left; None where it does not.
        is_page: what it prints goes into a page of the part's name, as inspect.md.
        always: it is run even if the steps before it have used up the part's time.
    """

    name: str
    command: tuple[str, ...]
    most: float = math.inf
    unfinished: int | None = 3
    is_page: bool = False
    always: bool = False


def parts(setup: Setup) -> dict[str, list[Step]]:
    """The steps of each part."""
    suites = {"layers": ("overhead", "scaling", "pools", "layers"), "models": ("models",), "training": ("training",)}
    benches = {part: [_bench(setup, *suites), _goals(setup)] for part, suites in suites.items()}
    return {"tests": _tests(setup), "tune": _tune(setup), **benches, "inspect": _inspect(setup), "train": _train(setup)}


def _fastconv(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "fastconv", *arguments)


def _bench(setup: Setup, *suites: str) -> Step:
    chosen = [word for suite in suites for word in ("--suite", suite)]
    options = ["--device", setup.device, "--out", str(setup.root), "--resume", "--seconds", "{seconds}", "--no-plots"]
    return Step(" ".join(suites), _fastconv("bench", *chosen, *options, *(["--quick"] if setup.is_quick else [])))


def _goals(setup: Setup) -> Step:
    return Step(
        "goals", (sys.executable, "-m", "benchmarks.goals", str(setup.folder)), most=30.0, unfinished=None, always=True
    )


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit. This file runs before torch is installed, so that it imports nothing of fastconv."""
    return shutil.which(name) or shutil.which(name, path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))


def _tests(setup: Setup) -> list[Step]:
    quiet = ("-q", "-rfE", "--tb=short")
    pytest = (sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", *quiet, "--seconds", "{seconds}")
    every = ("-m", "gpu", "--durations=15", "--continue-on-collection-errors", "-o", "faulthandler_timeout=120")
    # Most of the time goes into compiling, on one core each.
    if setup.device == "cuda" and importlib.util.find_spec("xdist"):
        every = (*every, "-n", str(max(1, min(12, (os.cpu_count() or 2) - 2))))
    steps = [Step("gpu", (*pytest, *every, "--passed", str(setup.folder / "passed.txt"), "tests"), unfinished=75)]
    if setup.device == "cpu":
        few = ("-m", "not gpu", "-k", "TestReLUBackward and cpu", "tests/test_native_kernels.py")
        return [*steps, Step("cpu", (*pytest, *few), unfinished=75)]
    sanitizer = _tool("compute-sanitizer")
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
    for checker, options in (("memcheck", ("--report-api-errors", "no")), ("racecheck", ())):
        # Allocations that are not cached: what lies behind a tensor is no other tensor's.
        under = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", checker, "--error-exitcode", "86")
        steps.append(Step(checker, (*under, *options, *pytest, *chosen), most=120.0, unfinished=75))
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
    steps += [_counted(setup, net, size) for net, _, size in nets] if setup.device == "cuda" else []
    few = ["--first", "--kernel", "max_pool"] if setup.is_quick else ["--processes", str(os.cpu_count() or 2)]
    return [*steps, Step("What Triton's kernels compile to", _fastconv("inspect", "--arch", setup.arch, *few), is_page=True)]


def _counted(setup: Setup, net: str, size: int) -> Step:
    name = f"Counters of a training step: {net}"
    if _tool("ncu") is None:
        return Step(name, ("echo", "left out: no ncu on PATH or under $CUDA_HOME/bin"), is_page=True)
    which = ("--model", net, "--batch", "2" if setup.is_quick else "32", "--size", str(size), "--device", setup.device)
    return Step(name, (sys.executable, "-m", "fastconv.bench.counters", *which), most=90.0, unfinished=None, is_page=True)


def _train(setup: Setup) -> list[Step]:
    """Whole trainings, from images to test accuracy: real digits where they are installed, and drawn images at R = 224."""
    if importlib.util.find_spec("tqdm") is None:
        return [Step("fastconv train", ("echo", "left out: no tqdm, which shows its progress"))]
    images = ("--data", "synthetic:8192", "--resolution", "224", "--batch-size", "256")
    large = (*images, "--dtype", "bfloat16", "--epochs", "4")
    wide = ("--option", "width=64", "--option", "max_width=512")
    small = ("--data", "synthetic:200", "--resolution", "16", "--batch-size", "32", "--epochs", "1")
    narrow = ("--option", "width=8", "--option", "max_width=16")
    runs = {"synthetic": ("--compare", "fastconv,torch", *((*small, *narrow) if setup.is_quick else (*large, *wide)))}
    if importlib.util.find_spec("sklearn") and not setup.is_quick:
        runs = {"digits": ("--compare",), **runs}
    where = ("--runs", str(setup.cache / "train"), "--overwrite", "--device", setup.device)
    return [
        Step(
            f"fastconv train: {name}",
            _fastconv("train", "--name", name, *how, *where),
            most=220.0,
            unfinished=None,
            is_page=True,
        )
        for name, how in runs.items()
    ]
