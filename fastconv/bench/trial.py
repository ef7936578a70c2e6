"""From a case that is ready to run to records: the gate first, then memory and launches, then the time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastconv import backends
from fastconv.bench import kernels, saved, timing
from fastconv.bench.records import Machine, Record, is_ours
from fastconv.bench.roofline import Rates
from fastconv.bench.timing import Timing
from fastconv.precision import set_precision


class Verdict(NamedTuple):
    """What a gate found: None or what is wrong, and errors as in Record."""

    wrong: str | None
    max_error: float
    rms_error: float


class Work(NamedTuple):
    """Floating-point operations and bytes that a call cannot do without, as in Record."""

    flops: int | None = None
    bytes: int | None = None


@dataclass
class Trial:
    """A case that is ready to run.

    Attributes:
        suite, case, direction, dtype: as in Record.
        calls: by provider, what is timed.
        check: a provider's result, held against float64. It is the first that a provider does.
        fresh: draws the inputs anew, in place.
        on_host: what is timed is the host's work, on a GPU too.
        records: a call records for backward.
        peaks: bytes by provider, where they were measured elsewhere.
        close: frees what the trial holds elsewhere.
    """

    suite: str
    case: str
    direction: str
    dtype: str
    device: torch.device
    calls: dict[str, Callable[[], object]]
    check: Callable[[str], Verdict]
    fresh: Callable[[], object]
    work: Work = field(default_factory=Work)
    on_host: bool = False
    records: bool = False
    peaks: Mapping[str, int] = field(default_factory=dict)
    close: Callable[[], object] = lambda: None


class Effort(NamedTuple):
    """How long to measure: at most so many rounds and, of each case, seconds; untimed calls before each timed one."""

    rounds: int
    seconds: float
    settling: int = 0


class Result(NamedTuple):
    """Records and timings by provider, and why others have none."""

    trial: Trial
    records: dict[str, Record]
    timings: dict[str, Timing]
    refused: dict[str, str]


def ours() -> str:
    """The provider's name under the backend asked for."""
    name = backends.requested()
    return "fastconv" if name == "auto" else f"fastconv_{name}"


def torch_dtype(dtype: str) -> torch.dtype:
    """Of maps, by a record's name of it."""
    name = dtype.removesuffix("_autocast")
    found: torch.dtype = getattr(torch, {"tf32": "float32", "float32_ieee": "float32"}.get(name, name))
    return found


def dtypes_of(device_type: str) -> tuple[str, ...]:
    """The names that records of a device use: where float32 may mean TF32, it has to be said which."""
    return ("tf32" if device_type == "cuda" else "float32", "float32_ieee", "bfloat16", "float16", "bfloat16_autocast")


@contextlib.contextmanager
def arithmetic(dtype: str, device_type: str) -> Iterator[None]:
    """The precision that a record's dtype names, for fastconv and for torch; cuDNN searches its algorithms."""
    with set_precision("ieee" if dtype == "float32_ieee" else "fast"):
        if device_type != "cuda":
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        try:
            cudnn.benchmark = True
            cudnn.allow_tf32 = matmul.allow_tf32 = dtype == "tf32"
            yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def measure(trial: Trial, effort: Effort, machine: Machine, rates: Rates | None = None) -> Result:
    """Check every provider of a trial, then time those that are right against each other."""
    verdicts, refused = {}, {}
    for provider in trial.calls:
        try:
            verdict = trial.check(provider)
        # A missing compiler and a failing kernel raise what they like: it is told in the table, and the others go on.
        except Exception as error:
            verdict = Verdict(_told(error), 0.0, 0.0)
        if verdict.wrong is None:
            verdicts[provider] = verdict
        else:
            refused[provider] = verdict.wrong
    held = {}
    for provider in verdicts:
        try:
            held[provider] = _memory(trial, provider)
        except Exception as error:  # as above: out of memory, for one
            refused[provider] = _told(error)
    calls = {provider: trial.calls[provider] for provider in held}
    if not calls:
        return Result(trial, {}, {}, refused)
    timings = timing.compare(
        calls,
        device="cpu" if trial.on_host else trial.device,
        rounds=effort.rounds,
        most_seconds=effort.seconds,
        warmup=2,
        fresh=trial.fresh,
        settling=effort.settling,
        queued=trial.device.type == "cuda" and trial.suite in _OF_KERNELS,
    )
    stock = {provider: taken for provider, taken in timings.items() if not is_ours(provider)}
    fastest = min(stock, key=lambda provider: stock[provider].median, default=None)
    # Where an eager provider was refused, the fastest of those left may not be the fastest; on the host unlike work is done.
    is_comparable = not trial.on_host and not any(provider.startswith("eager") for provider in refused)
    least = rates.seconds(*trial.work) if rates is not None and trial.work != Work() else None
    records = {}
    for provider, taken in timings.items():
        gain = timing.ratio(stock[fastest], taken) if fastest is not None and is_comparable else None
        records[provider] = Record(
            **{key: getattr(trial, key) for key in ("suite", "case", "direction", "dtype")},
            provider=provider,
            median_ms=taken.median * 1e3,
            q20_ms=taken.q20 * 1e3,
            q80_ms=taken.q80 * 1e3,
            runs=len(taken.runs),
            fastest_stock=fastest,
            over_stock=None if gain is None else gain.median,
            over_stock_q20=None if gain is None else gain.q20,
            over_stock_q80=None if gain is None else gain.q80,
            gate_passed=True,
            max_error=verdicts[provider].max_error,
            rms_error=verdicts[provider].rms_error,
            **trial.work._asdict(),
            roofline_percent=None if least is None else 100 * least / taken.median,
            **held[provider],
            copy_gb_per_s=None if rates is None else rates.copy * 1e-9,
            matmul_tflop_per_s=None if rates is None else rates.matmul * 1e-12,
            **dataclasses.asdict(machine),
        )
    return Result(trial, records, timings, refused)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# Suites whose time on a GPU is that of kernels, launches being hidden: what the host adds shows in "overhead" and in nets.
_OF_KERNELS = ("layers", "pools", "scaling")


def _memory(trial: Trial, provider: str) -> dict[str, Any]:
    """Peak, saved bytes and launches of a call, which the calls that are timed then repeat."""
    call, peak, launches = trial.calls[provider], trial.peaks.get(provider), None
    kept = None
    replays = provider.endswith("cuda_graph") or (provider == "compile_max_autotune" and trial.suite not in _OF_KERNELS)
    if trial.records and not provider.startswith("compile") and not replays:
        with saved.saving() as storages:
            call()
        kept = sum(storage.nbytes() for storage in storages.values())
        del storages
    if trial.device.type == "cuda" and not trial.on_host and not replays:  # a graph's memory was taken when it was captured
        call()
        torch.cuda.synchronize(trial.device)
        torch.cuda.reset_peak_memory_stats(trial.device)
        before = torch.cuda.memory_allocated(trial.device)
        call()
        torch.cuda.synchronize(trial.device)
        peak = torch.cuda.max_memory_allocated(trial.device) - before
        # Behind the first profile every launch may take the host longer: not where the host's time counts.
        if trial.suite in _OF_KERNELS and (is_ours(provider) or provider == "eager_channels_last"):
            launches = kernels.count_launches(call, trial.device)
    return {"peak_bytes": peak, "saved_bytes": kept, "launches": launches}


def header(width: int) -> str:
    """The table's head, over cases of up to `width` characters."""
    columns = (
        f"{'case':<{width}} {'direction':<11} {'dtype':<17} {'fastconv':<23} {'ratio':<19} {'fastest of stock torch':<43}"
    )
    return f"{columns} {'of roofline':<12} error, its"


def lines(result: Result, width: int = 0) -> list[str]:
    """A line for each of our providers, and one for each provider that was refused."""
    trial, timings = result.trial, result.timings
    what = f"{trial.case:<{width}} {trial.direction:<11} {trial.dtype:<17} "
    made = [f"{what}{provider} has no time: {reason}" for provider, reason in result.refused.items()]
    for provider, record in result.records.items():
        if not is_ours(provider):
            continue
        taken, best = timings[provider], record.fastest_stock
        columns = [f"{timing.seconds(taken):<23}"]
        columns += [
            f"{'' if best is None or record.over_stock is None else timing.times(timing.ratio(timings[best], taken)):<19}"
        ]
        columns += [f"{'' if best is None else f'{timing.seconds(timings[best])} {best}':<43}"]
        columns += [f"{'' if record.roofline_percent is None else f'{record.roofline_percent:.0f} %':<12}"]
        held = [result.records[name] for name in (provider, best) if name is not None]
        columns += [", ".join("0" if one.rms_error == 0 else f"{one.rms_error:.1e}" for one in held)]
        peaks = [one.peak_bytes for one in held if one.peak_bytes is not None]
        columns += ["peak " + ", ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " MiB"] if len(peaks) == 2 else []
        columns += [] if provider == "fastconv" else [f"({provider})"]
        made.append(what + " ".join(columns))
    return made
