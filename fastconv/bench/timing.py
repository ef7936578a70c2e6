"""How long something takes, and how sure one can be of it.

A machine's speed drifts: clocks change, neighbours come and go. So calls that are to be compared are timed in
interleaved rounds, one call of each per round in a rotating order, and a ratio is the median over rounds of the ratio
within a round. On a GPU each call lies between two CUDA events, after the L2 cache was overwritten, so that a small
operand does not sit there from the call before; on a CPU caches stay as a running program would leave them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_LEAST_SAMPLE = 200e-6  # seconds: shorter calls are repeated within a sample, or the clock's own cost would show
_FLUSH_FACTOR = 2  # the flushed buffer, in sizes of the L2 cache
_CLOCK = 2e9  # cycles a second that a sleeping GPU counts, at most: a lower clock sleeps longer
_LONGEST_QUEUE = 10e-3  # seconds of a host's work that are hidden


@dataclass(frozen=True)
class Timing:
    """Seconds (or a ratio) over runs: the median and the 20% and 80% quantiles."""

    runs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("Timing: no run was measured")

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def q20(self) -> float:
        return self._quantile(0.2)

    @property
    def q80(self) -> float:
        return self._quantile(0.8)

    def _quantile(self, share: float) -> float:
        ordered = sorted(self.runs)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class stopwatch:
    """Wall-clock seconds of a `with` block, work queued on a GPU included.

    Example:
        >>> with stopwatch() as watch:
        ...     _ = sum(range(1000))
        >>> watch.seconds > 0
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.seconds = 0.0

    def __enter__(self) -> stopwatch:
        _synchronize(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        _synchronize(self._device)
        self.seconds = time.perf_counter() - self._start


def ratio(slower: Timing, faster: Timing) -> Timing:
    """`slower` over `faster`, run by run: above 1 where `faster` is the faster one.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if len(slower.runs) != len(faster.runs):
        raise ValueError(f"ratio: runs must be paired, got {len(slower.runs)} and {len(faster.runs)} runs")
    return Timing(tuple(s / f for s, f in zip(slower.runs, faster.runs, strict=True)))


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    warmup: int = 3,
    most_seconds: float | None = None,
    fresh: Callable[[], object] | None = None,
    settling: int = 0,
    queued: bool = False,
) -> dict[str, Timing]:
    """Time several calls against each other, in interleaved rounds.

    Args:
        calls: name → function without arguments.
        device: where they run; CUDA events and an L2 flush on a GPU, the monotonic clock on a CPU.
        rounds: timed calls of each.
        warmup: untimed calls of each beforehand (compilation, allocation, caches of algorithms).
        most_seconds: stop after the round in which this much time has passed; at least three rounds are run.
        fresh: called, untimed, before every round: draws the inputs that all calls of that round get.
        settling: untimed calls before every sample. With one, a short call finds threads awake and its own code in the
            caches, as it does behind others of its kind; without, it pays for what the call of another kind left.
        queued: on a GPU a call is queued as a whole before its first kernel starts, so that what is timed is the GPU's work;
            without, a GPU that has to wait for the host does so within the time.

    Returns:
        name → Timing in seconds a call, all with the same number of paired runs.

    Raises:
        ValueError: no calls, or rounds below 1.
    """
    if not calls or rounds < 1:
        raise ValueError(f"compare: needs at least one call and one round, got {len(calls)} calls, rounds={rounds}")
    device = torch.device(device)
    sampler = _CudaSampler(device, queued) if device.type == "cuda" else _CpuSampler()
    for call in calls.values():
        for _ in range(warmup):
            call()
        sampler.prepare(call)
    names = list(calls)
    runs: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if fresh is not None:
            fresh()
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            for _ in range(settling):
                calls[name]()
            runs[name].append(sampler.sample(calls[name]))
        if most_seconds is not None and done >= 2 and time.perf_counter() - start > most_seconds:
            break
    return {name: Timing(tuple(values)) for name, values in runs.items()}


class _CpuSampler:
    """The monotonic clock around as many calls as make a measurable time."""

    def __init__(self) -> None:
        self._repeats = 1

    def prepare(self, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        took = max(time.perf_counter() - start, 1e-9)
        # The same number for all calls, so that no one's loop is amortised better than another's.
        self._repeats = max(self._repeats, min(1000, int(_LEAST_SAMPLE / took) + 1))

    def sample(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(self._repeats):
            call()
        return (time.perf_counter() - start) / self._repeats


class _CudaSampler:
    """A pair of events around one call, with a cold L2 cache."""

    def __init__(self, device: torch.device, queued: bool) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(max(_FLUSH_FACTOR * properties.L2_cache_size, 1), dtype=torch.int8, device=device)
        self._queued, self._cycles = queued, 0

    def prepare(self, call: Callable[[], object]) -> None:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start  # the host's part, or all of a call that waits for the GPU
        torch.cuda.synchronize(self._device)
        if self._queued:
            self._cycles = max(self._cycles, int(2 * min(took, _LONGEST_QUEUE) * _CLOCK))

    def sample(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self._device):
            self._flush.zero_()
            if self._queued:
                torch.cuda._sleep(self._cycles)
            else:
                torch.cuda.synchronize(self._device)  # or the flush would hide a part of the host's work
            start.record()
            call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(timing: Timing) -> str:
    """'1.52 s (1.48–1.60)': the median and the 20% and 80% quantiles, in a unit that suits them."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if timing.median * s >= 1), ("µs", 1e6))
    low, mid, high = (f"{value * scale:.3g}" for value in (timing.q20, timing.median, timing.q80))
    return f"{mid} {unit} ({low}–{high})"


def times(timing: Timing) -> str:
    """'1.25× (1.21–1.30)': a ratio, its 20% and 80% quantiles."""
    return f"{timing.median:.2f}× ({timing.q20:.2f}–{timing.q80:.2f})"


def require_alive(device: torch.device, what: str, cause: Exception) -> None:
    """After an error that is none of ours: whether the device still answers. After a fault no kernel of the process runs.

    Raises:
        RuntimeError: it does not; `what` was the last thing that it ran.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as fault:
            raise RuntimeError(
                f"{what}: the GPU no longer answers this process ({fault}); the first error was: {cause}"
            ) from cause
