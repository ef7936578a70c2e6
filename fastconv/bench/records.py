"""What a measurement leaves behind: flat records, as lists in JSON files, one file for each suite of a chip."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastconv import backends
from fastconv.bench import sources
from fastconv.tuning import tables

SUITES = ("layers", "pools", "models", "training", "overhead", "scaling")
DIRECTIONS = ("forward", "input_grad", "weight_grad", "backward", "both", "step")
DTYPES = ("float32", "float32_ieee", "tf32", "bfloat16", "float16", "bfloat16_autocast", "float16_autocast")
PROVIDERS = (
    "fastconv",
    "eager_nchw",
    "eager_channels_last",
    "cudnn_fused",
    "compile_default",
    "compile_max_autotune",
    "compile_freezing",
)
_PROVIDER = re.compile("|".join(PROVIDERS) + r"|fastconv_\w+|eager_cuda_graph")
_DIGITS = 6  # significant ones that a file keeps


@dataclass(frozen=True)
class Machine:
    """Where, with what and when something was measured.

    Attributes:
        chip: a GPU's name and compute capability, a CPU's name and torch's threads.
        driver, cudnn: None on a CPU; triton: None where it is not installed.
        commit: of fastconv's working tree, with a digest of the sources behind it where the package's or csrc's differ;
            without a git repository the digest alone, 'sources-…'.
        date: UTC, to the second.
    """

    chip: str
    driver: str | None
    torch: str
    triton: str | None
    cudnn: str | None
    commit: str
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
        triton=tables.version("triton"),
        cudnn=str(torch.backends.cudnn.version()) if on_gpu else None,
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


class Trial(NamedTuple):
    """What providers are compared within."""

    suite: str
    case: str
    direction: str
    dtype: str


@dataclass(frozen=True)
class Record:
    """The time of one provider for one case. None exists unless its result was held against float64 and was right.

    Attributes:
        case: a layer ('64-128@56 3x3/2+pool batch 32': channels in and out, size of the map, window / stride), a pool, or a
            net ('vgg16 R=224 batch 2').
        direction: 'forward' without gradients; 'backward' all gradients at once, of a forward that ran before; 'both' a
            recorded forward and its backward; 'step' a training step; 'input_grad' and 'weight_grad' one gradient of a
            convolution by itself.
        dtype: 'float32' on a CPU under set_precision("fast"), 'float32_ieee' under "ieee" and without TF32, 'tf32' on a GPU;
            'bfloat16' is bfloat16 throughout, 'bfloat16_autocast' float32 weights under autocast.
        provider: 'fastconv', 'fastconv_<backend>', 'fastconv_frozen', 'fastconv_cuda_graph', or one of stock torch's.
        median_ms, q20_ms, q80_ms, runs: of a call, over `runs` rounds in which the providers of a case took turns.
        fastest_stock: the provider of stock torch with the least median; None where none was right.
        over_stock, over_stock_q20, over_stock_q80: its time over this one's, paired within a round; None where an eager
            provider was refused, and of the host's time, where launchers of ours do nothing.
        max_error, rms_error: the largest and the root mean square error, in units of the exact result's root mean square;
            of a step rms_error is of all its gradients together, and max_error the rms_error of the worst parameter.
        flops: floating-point operations by the definition, a multiply-add being two; None where it is none's measure.
        bytes: the least that has to move: each operand and each result once; None of whole nets.
        roofline_percent: the least time for both, at the rates below, of the median. Winograd's transforms take fewer
            operations than the definition, so that it may pass 100.
        peak_bytes: the most memory that a call had in use above what there was before: on a GPU as torch's allocator tells
            it, on a CPU the growth of a process that does nothing else. None where it was not measured.
        saved_bytes: kept for backward, parameters aside; None where nothing is or it was not counted.
        launches: kernels started on a GPU by a call; None on a CPU.
        copy_gb_per_s, matmul_tflop_per_s: this machine's rates, measured before: bytes read and written by a copy of a large
            buffer, and a large matrix product in `dtype`.
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
    fastest_stock: str | None
    over_stock: float | None
    over_stock_q20: float | None
    over_stock_q80: float | None
    gate_passed: bool
    max_error: float
    rms_error: float
    flops: int | None
    bytes: int | None
    roofline_percent: float | None
    peak_bytes: int | None
    saved_bytes: int | None
    launches: int | None
    copy_gb_per_s: float | None
    matmul_tflop_per_s: float | None
    chip: str
    driver: str | None
    torch: str
    triton: str | None
    cudnn: str | None
    commit: str
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

    @property
    def trial(self) -> Trial:
        return Trial(self.suite, self.case, self.direction, self.dtype)

    @property
    def is_ours(self) -> bool:
        return is_ours(self.provider)


def is_ours(provider: str) -> bool:
    return provider.startswith("fastconv")


def write(path: Path, records: Iterable[Record], *, whole: bool) -> None:
    """Make `path` hold `records`: nothing else if they are the `whole` of a suite, or beside what it has of other trials.

    Raises:
        ValueError: what lies there is no list of records, and would be kept.
    """
    made = list(records)
    trials = {record.trial for record in made}
    kept = [] if whole or not path.is_file() else [record for record in read(path) if record.trial not in trials]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(_row(record), ensure_ascii=False) for record in (*kept, *made)]
    text = "[\n" + ",\n".join(rows) + "\n]\n"
    beside = path.with_name(f"{path.name}.new")  # whoever is stopped in the middle leaves what was there
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> list[Record]:
    """The records of a file, or of all files named after a suite in a folder.

    Raises:
        ValueError: a file is not JSON, no list, or holds what is no record; a folder holds none.
        FileNotFoundError: there is nothing at `path`.
    """
    if path.is_dir():
        files = [file for suite in SUITES if (file := path / f"{suite}.json").is_file()]
        if not files:
            raise ValueError(f"{path}: no file of records in this folder, such as {SUITES[0]}.json")
        return [record for file in files for record in read(file)]
    rows: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a list of records is wanted, got {type(rows).__name__}")
    try:
        return [Record(**row) for row in rows]
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _row(record: Record) -> dict[str, Any]:
    row = dataclasses.asdict(record)
    return {name: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for name, value in row.items()}


def _commit() -> str:
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head is not None and _output("git", "status", "--porcelain", "--", "..", ":/csrc") is None:
        return head
    digest = sources.digest(with_tables=True)
    return f"sources-{digest}" if head is None else f"{head}-dirty-{digest}"


def _output(*command: str) -> str | None:
    """A command's first line, run beside the package; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
