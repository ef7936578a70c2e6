"""From a case that is ready to run to records: the gate first, then the time, then a line of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fastconv import backends
from fastconv.bench import timing
from fastconv.bench.records import Machine, Record
from fastconv.bench.timing import Timing


class Verdict(NamedTuple):
    """What a gate found: None or what is wrong, and errors as in Record."""

    wrong: str | None
    max_error: float
    rms_error: float


@dataclass
class Trial:
    """A case that is ready to run.

    Attributes:
        suite, case, direction, dtype: as in Record.
        calls: by provider, what is timed.
        check: a provider's result, held against float64. It is the first that a provider does.
        fresh: draws the inputs anew, in place.
        peaks: bytes by provider, where they were measured.
        close: frees what the trial holds elsewhere.
    """

    suite: str
    case: str
    direction: str
    dtype: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[str], Verdict]
    fresh: Callable[[], object]
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


def is_ours(provider: str) -> bool:
    return provider.startswith("fastconv")


def measure(trial: Trial, effort: Effort, machine: Machine) -> Result:
    """Check every provider of a trial, then time those that are right against each other."""
    verdicts, refused = {}, {}
    for provider in trial.calls:
        try:
            verdict = trial.check(provider)
        # A missing compiler and a failing kernel raise what they like: it is told in the table, and the others go on.
        except Exception as error:
            verdict = Verdict(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 0.0, 0.0)
        if verdict.wrong is None:
            verdicts[provider] = verdict
        else:
            refused[provider] = verdict.wrong
    calls = {provider: trial.calls[provider] for provider in verdicts}
    if not calls:
        return Result(trial, {}, {}, refused)
    rounds, seconds, settling = effort
    timings = timing.compare(calls, rounds=rounds, most_seconds=seconds, warmup=2, fresh=trial.fresh, settling=settling)
    eager = next((timings[provider] for provider in timings if provider.startswith("eager")), None)
    records = {}
    for provider, taken in timings.items():
        gain = None if eager is None else timing.ratio(eager, taken)
        records[provider] = Record(
            **{key: getattr(trial, key) for key in ("suite", "case", "direction", "dtype")},
            provider=provider,
            median_ms=taken.median * 1e3,
            q20_ms=taken.q20 * 1e3,
            q80_ms=taken.q80 * 1e3,
            runs=len(taken.runs),
            over_eager=None if gain is None else gain.median,
            over_eager_q20=None if gain is None else gain.q20,
            over_eager_q80=None if gain is None else gain.q80,
            gate_passed=True,
            max_error=verdicts[provider].max_error,
            rms_error=verdicts[provider].rms_error,
            peak_bytes=trial.peaks.get(provider),
            **dataclasses.asdict(machine),
        )
    return Result(trial, records, timings, refused)


HEADER = (
    f"{'case':<36}{'':<12}{'dtype':<18}{'fastconv':<24}{'eager':<24}{'eager / fastconv':<22}"
    f"{'fastest stock / fastconv':<40}error, eager's"
)


def lines(result: Result) -> list[str]:
    """A line for each of our providers, and one for each provider that was refused."""
    trial, timings = result.trial, result.timings
    what = f"{trial.case:<36}{trial.direction:<12}{trial.dtype:<18}"
    stock = {provider: taken for provider, taken in timings.items() if not is_ours(provider)}
    eager = next((provider for provider in stock if provider.startswith("eager")), None)
    fastest = min(stock, key=lambda provider: stock[provider].median, default=None)
    made = [f"{what}{provider} has no time: {reason}" for provider, reason in result.refused.items()]
    for provider in timings:
        if not is_ours(provider):
            continue
        taken = timings[provider]
        columns = [f"{timing.seconds(taken):<24}", f"{'' if eager is None else timing.seconds(stock[eager]):<24}"]
        columns += [f"{'' if eager is None else timing.times(timing.ratio(stock[eager], taken)):<22}"]
        best = "" if fastest is None else f"{timing.times(timing.ratio(stock[fastest], taken))} {fastest}"
        columns += [f"{'eager' if fastest is not None and fastest == eager else best:<40}"]
        errors = [result.records[name].rms_error for name in (provider, eager) if name is not None]
        columns += [", ".join(f"{error:.1e}" for error in errors)]
        peaks = [result.records[name].peak_bytes for name in (provider, eager) if name is not None]
        if peaks and None not in peaks:
            columns += ["; peak " + ", ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks if peak is not None)]
        name = "" if provider == "fastconv" else f" ({provider})"
        made.append(f"{what}{''.join(columns)}{name}")
    return made
