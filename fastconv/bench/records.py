"""What a measurement leaves behind: flat records, as lists in JSON files, one file for each suite of a chip."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastconv import backends
from fastconv.tuning import tables

SUITES = ("layers", "models", "training", "overhead", "scaling")
DIRECTIONS = ("forward", "input_grad", "weight_grad", "backward", "both", "step")
DTYPES = ("float32", "bfloat16", "float16", "bfloat16_autocast", "float16_autocast")
_PROVIDER = re.compile(r"fastconv(_\w+)?|eager_(nchw|channels_last)|compile_\w+")


@dataclass(frozen=True)
class Machine:
    """Where, with what and when something was measured.

    Attributes:
        chip: a GPU's name and compute capability, a CPU's name and torch's threads.
        driver, cudnn: None on a CPU; triton: None where it is not installed.
        commit: of fastconv's working tree, '-dirty' behind it where files differ; None where it is no git repository.
        date: UTC, to the second.
    """

    chip: str
    driver: str | None
    torch: str
    triton: str | None
    cudnn: str | None
    commit: str | None
    date: str

    @property
    def folder(self) -> str:
        """The chip as a folder's name: 'amd-epyc-9b14-cpu-2'."""
        return tables.file_name(self.chip).removesuffix(".json")


def machine(device: torch.device) -> Machine:
    """This one, now."""
    on_gpu = device.type == "cuda"
    return Machine(
        chip=backends.chip(device.type, device.index or 0),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        torch=torch.__version__,
        triton=_version("triton"),
        cudnn=str(torch.backends.cudnn.version()) if on_gpu else None,
        commit=_output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class Record:
    """The time of one provider for one case. None exists unless its result was held against float64 and was right.

    Attributes:
        direction: 'both' is forward and backward, 'backward' all gradients at once, 'step' a training step.
        dtype: 'bfloat16' is bfloat16 throughout, 'bfloat16_autocast' float32 weights under autocast.
        provider: 'fastconv', 'fastconv_<backend>' or 'fastconv_frozen'; stock torch's 'eager_nchw', 'eager_channels_last',
            'compile_default', 'compile_freezing'.
        median_ms, q20_ms, q80_ms, runs: of a call, over `runs` rounds in which the providers of a case took turns.
        over_eager, over_eager_q20, over_eager_q80: eager's time over this one's, paired within a round.
        max_error, rms_error: the largest and the root mean square error, in units of the exact result's root mean square;
            of a step rms_error is of all its gradients together, and max_error the rms_error of the worst parameter.
        peak_bytes: memory; what it counts is its suite's to say. None where it was not measured.
    """

    suite: str
    case: str
    direction: str
    dtype: str
    provider: str
    median_ms: float
    q20_ms: float
    q80_ms: float
    runs: int
    over_eager: float | None
    over_eager_q20: float | None
    over_eager_q80: float | None
    gate_passed: bool
    max_error: float
    rms_error: float
    peak_bytes: int | None
    chip: str
    driver: str | None
    torch: str
    triton: str | None
    cudnn: str | None
    commit: str | None
    date: str

    def __post_init__(self) -> None:
        for name, allowed in (("suite", SUITES), ("direction", DIRECTIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Record: {name} must be one of {', '.join(allowed)}, got {name}={getattr(self, name)!r}")
        if not _PROVIDER.fullmatch(self.provider):
            raise ValueError(f"Record: unknown provider={self.provider!r}")
        if self.gate_passed is not True:
            raise ValueError(f"Record: {self.case} ({self.provider}) did not pass its gate, so it has no time")
        if not 0 < self.q20_ms <= self.median_ms <= self.q80_ms:
            raise ValueError(f"Record: quantiles {self.q20_ms}, {self.median_ms}, {self.q80_ms} are not in order")


def write(path: Path, records: Iterable[Record], *, whole: bool) -> None:
    """Make `path` hold `records`: nothing else if they are the `whole` of a suite, or beside what it has of other trials.

    Raises:
        ValueError: what lies there is no list of records, and would be kept.
    """
    made = list(records)
    trials = {_trial(record) for record in made}
    kept = [] if whole or not path.is_file() else [record for record in read(path) if _trial(record) not in trials]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in (*kept, *made)]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: it is not JSON, no list, or holds what is no record.
    """
    rows: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a list of records is wanted, got {type(rows).__name__}")
    try:
        return [Record(**row) for row in rows]
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _trial(record: Record) -> tuple[str, ...]:
    """What providers are compared within."""
    return (record.suite, record.case, record.direction, record.dtype)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """A command's first line, run beside the package; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
