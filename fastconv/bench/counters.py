"""What a GPU's counters say of a training step, kernel by kernel: `python -m fastconv.bench.counters --help`.

Nsight Compute (`ncu`) runs this module again, once for each kind of layers, and counts one step. It repeats each kernel with
emptied caches, so that its times are not those of a real step; `fastconv.bench.timing` measures those. Beside the bytes that
memory moved stand those that `fastconv.bench.traffic` counts from shapes.

Source:
    Nsight Compute CLI and Profiling Guide, docs.nvidia.com/nsight-compute.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from fastconv import backends, models, tuning
from fastconv.backends.triton_launch import PROCESSORS
from fastconv.bench import kernels, traffic
from fastconv.models.layers import LAYERS

_TIME = "gpu__time_duration.sum"
_READ, _WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
# Averages over a kernel's time, in percent.
_SHARES = {
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "compute": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hits": "lts__t_sector_hit_rate.pct",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
_METRICS = (_TIME, _READ, _WRITTEN, *_SHARES.values())
_ERROR = "==ERROR=="
_REFUSED = "ERR_NVGPUCTRPERM"  # where the driver keeps counters to administrators
_HEADER = f"{'µs':>9} {'launches':>8} {'MB':>9} {'counted':>9} " + " ".join(f"{name:>8}" for name in _SHARES) + "  kernel"


class Counted(NamedTuple):
    """All launches of a kernel in one step.

    Attributes:
        microseconds: by themselves, one after the other.
        moved: bytes that memory read and wrote.
        shares: percent by the names of the table's columns: of the memory's and the processors' peak rates, of the L2
            cache's accesses, of the warps that fit; means over launches, weighted by their time. A counter that the chip
            does not have is left out.
    """

    name: str
    launches: int
    microseconds: float
    moved: int
    shares: dict[str, float]


def ncu() -> str | None:
    """The path of Nsight Compute's command."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("ncu") or shutil.which("ncu", path=str(folder))


class Counts(NamedTuple):
    """What ncu wrote: its counts, the most time first, and its errors, after which the counts may not be all."""

    kernels: list[Counted]
    errors: list[str]


def read(lines: Iterable[str]) -> Counts:
    """Of --csv and --print-units base: a line for each launch and counter."""
    written = list(lines)
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(line for line in written if line.startswith('"')):
        name, metrics = launches.setdefault(f"{row['Process ID']} {row['ID']}", (row["Kernel Name"], {}))
        with contextlib.suppress(ValueError):  # 'n/a', of a counter that this chip does not have
            metrics[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    by_kernel: dict[str, list[dict[str, float]]] = {}
    for name, metrics in launches.values():
        if _TIME in metrics:
            by_kernel.setdefault(name, []).append(metrics)
    counted = [_summed(name, found) for name, found in by_kernel.items()]
    errors = [line.removeprefix(_ERROR).strip() for line in written if line.startswith(_ERROR)]
    if not counted and not errors:
        errors = ["no launch was seen"]
    return Counts(sorted(counted, key=lambda kernel: -kernel.microseconds), errors)


def _summed(name: str, launches: list[dict[str, float]]) -> Counted:
    moved = sum(metrics.get(_READ, 0.0) + metrics.get(_WRITTEN, 0.0) for metrics in launches)
    shares = {}
    for column, metric in _SHARES.items():
        known = [(metrics[_TIME], metrics[metric]) for metrics in launches if metric in metrics]
        if known:
            shares[column] = sum(time * share for time, share in known) / max(sum(time for time, _ in known), 1e-9)
    return Counted(name, len(launches), sum(metrics[_TIME] for metrics in launches) / 1e3, round(moved), shares)


def table(found: list[Counted], most: int, counted: Mapping[str, int]) -> str:
    """The first `most` of them as lines, and the sum of all.

    Args:
        counted: bytes by kernel as they follow from shapes; of a kernel that is not named nothing is told.
    """
    total = Counted(
        "all", sum(k.launches for k in found), sum(k.microseconds for k in found), sum(k.moved for k in found), {}
    )
    return "\n".join([_HEADER, *(_line(kernel, counted.get(kernel.name)) for kernel in (*found[:most], total))])


def _line(kernel: Counted, counted: int | None) -> str:
    shares = " ".join(f"{kernel.shares[name]:>7.0f}%" if name in kernel.shares else " " * 8 for name in _SHARES)
    expected = "" if counted is None else f"{counted / 1e6:.1f}"
    begin = f"{kernel.microseconds:>9.0f} {kernel.launches:>8} {kernel.moved / 1e6:>9.1f} {expected:>9}"
    return f"{begin} {shares}  {kernel.name[: kernels.NAME_WIDTH]}"


def count(options: argparse.Namespace, layers: str) -> Counts:
    """One training step under ncu."""
    program = ncu() or "ncu"
    step = [sys.executable, "-m", "fastconv.bench.counters", "--step", layers]
    for name in ("model", "device", "dtype", "batch", "backend"):
        step += [f"--{name}", str(getattr(options, name))]
    step += ["--size", str(kernels.size(options))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        how = ["--csv", "--log-file", str(log), "--print-units", "base", "--metrics", ",".join(_METRICS)]
        how += ["--clock-control", "none", "--profile-from-start", "off"]  # clocks are the machine's to set
        process = subprocess.run([program, *how, *step], capture_output=True, text=True, check=False)
        written = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    if process.returncode:
        written += [f"{_ERROR} status {process.returncode}: {line}" for line in process.stderr.splitlines()[-1:]]
    return read(written)


def expected(options: argparse.Namespace, layers: str) -> dict[str, int]:
    """Bytes by kernel, counted from shapes: of Triton's kernels, of which traffic knows the names.

    None of torch's layers, of other backends, and of chips that launches are not recorded for.
    """
    if layers != "fastconv" or options.backend != "triton":
        return {}
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    chip = backends.chip(device.type, device.index or 0)
    capability = tuning.capability(chip) or 0
    if f"sm_{capability}" not in PROCESSORS:
        return {}
    with torch.device("meta"):
        model = models.build(options.model, resolution=kernels.size(options), layers=layers).to(dtype)
        images = torch.empty(kernels.shape(options), dtype=dtype).contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = traffic.measure(model, images, capability, chip)
    return {name: moved.tensors for name, moved in found.moved.items() if name.endswith("_kernel")}


def _step(options: argparse.Namespace) -> int:
    """What ncu runs: a step that is not counted, for what happens only once, and one that is."""
    with backends.use_backend(options.backend):
        step = kernels.net_step(options, options.step)
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = kernels.parser("Counters of one training step, on fastconv's layers and on torch's.")
    parser.add_argument("--backend", choices=("auto", "triton", "native", "aten"), default="triton", help="fastconv's")
    parser.add_argument("--step", choices=LAYERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
        print(f"counters: a CUDA device is wanted, got --device {options.device}", file=sys.stderr)
        return 2
    if options.step:
        return _step(options)
    if ncu() is None:
        print("counters: ncu (Nsight Compute) is neither on PATH nor under $CUDA_HOME/bin", file=sys.stderr)
        return 2
    status = 0
    for layers in LAYERS:
        found = count(options, layers)
        print(f"{kernels.title(options, layers)}{f', {options.backend}' if layers == 'fastconv' else ''}")
        print("".join(f"ncu: {error}\n" for error in found.errors), end="")
        print(f"{table(found.kernels, options.most, expected(options, layers))}\n", flush=True)
        status |= any(_REFUSED not in error for error in found.errors)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
