"""What a GPU's counters say of a training step, kernel by kernel: `python -m fastconv.bench.counters --help`.

Nsight Compute (`ncu`) runs this module once more for each kind of layers, and one step of that under its counters: each
kernel several times, with caches emptied before, so that the times are none of a step's; `fastconv.bench.timing` has those.
Beside the bytes that memory moved stand those that `fastconv.bench.traffic` counts from shapes.

Source:
    Nsight Compute CLI and Profiling Guide, docs.nvidia.com/nsight-compute.
"""

from __future__ import annotations

import argparse
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
# In the middle of a kernel's time, in percent.
_SHARES = {
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "compute": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hits": "lts__t_sector_hit_rate.pct",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
_METRICS = (_TIME, _READ, _WRITTEN, *_SHARES.values())
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


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit: on PATH, or under $CUDA_HOME."""
    return shutil.which(name) or shutil.which(name, path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))


def read(lines: Iterable[str]) -> list[Counted]:
    """What ncu wrote with --csv and --print-units base: a line for each launch and counter. The most time first.

    Raises:
        ValueError: there is not one counted launch; ncu's own errors are in the message.
    """
    written = list(lines)
    rows = csv.DictReader(line for line in written if line.startswith('"'))
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in rows:
        name, metrics = launches.setdefault(f"{row['Process ID']} {row['ID']}", (row["Kernel Name"], {}))
        value = row["Metric Value"].replace(",", "")
        try:
            metrics[row["Metric Name"]] = float(value)
        except ValueError:  # 'n/a', of a counter that this chip does not have
            continue
    by_kernel: dict[str, list[dict[str, float]]] = {}
    for name, metrics in launches.values():
        if _TIME in metrics:
            by_kernel.setdefault(name, []).append(metrics)
    if not by_kernel:
        said = "; ".join(line.removeprefix("==ERROR==").strip() for line in written if line.startswith("==ERROR=="))
        raise ValueError(f"ncu counted nothing: {said or 'no launch was seen'}")
    counted = [_summed(name, found) for name, found in by_kernel.items()]
    return sorted(counted, key=lambda kernel: -kernel.microseconds)


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


def count(options: argparse.Namespace, layers: str) -> list[Counted]:
    """One training step under ncu.

    Raises:
        FileNotFoundError: there is no ncu.
        ValueError: it counted nothing, as where the driver keeps counters to administrators.
    """
    program = tool("ncu")
    if program is None:
        raise FileNotFoundError("ncu (Nsight Compute) is neither on PATH nor under $CUDA_HOME/bin")
    step = [sys.executable, "-m", "fastconv.bench.counters", "--step", layers]
    for name in ("model", "device", "dtype", "batch", "size", "backend"):
        step += [f"--{name}", str(getattr(options, name))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        how = ["--csv", "--log-file", str(log), "--print-units", "base", "--metrics", ",".join(_METRICS)]
        how += ["--clock-control", "none", "--profile-from-start", "off"]  # clocks are the machine's to set
        process = subprocess.run([program, *how, *step], capture_output=True, text=True, check=False)
        written = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    if process.returncode:
        written += [f"==ERROR== status {process.returncode}: {line}" for line in process.stderr.splitlines()[-1:]]
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
        model = models.build(options.model, resolution=options.size, layers=layers).to(dtype)
        shape = (options.batch, models.native(options.model).channels, options.size, options.size)
        images = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
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
    status = 0
    for layers in LAYERS:
        name = f"{kernels.title(options, layers)}{f', {options.backend}' if layers == 'fastconv' else ''}"
        try:
            print(f"{name}\n{table(count(options, layers), options.most, expected(options, layers))}\n", flush=True)
        except (FileNotFoundError, ValueError) as error:
            print(f"{name}: {error}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
