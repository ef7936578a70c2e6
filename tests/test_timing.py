"""fastconv.bench.timing: interleaving, pairing, and quantiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from fastconv.bench.timing import Timing, compare, ratio, seconds, stopwatch, times


def _sleeper(duration: float, name: str, calls: list[str]) -> Callable[[], None]:
    def call() -> None:
        calls.append(name)
        time.sleep(duration)

    return call


def test_compare_interleaves_and_rotates() -> None:
    calls: list[str] = []
    duration = {"a": 1e-3, "b": 1e-3, "c": 1e-3}
    timings = compare({n: _sleeper(d, n, calls) for n, d in duration.items()}, rounds=3, warmup=1)
    assert calls[-9:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(len(timing.runs) == 3 for timing in timings.values())


def test_compare_measures() -> None:
    calls: list[str] = []
    timings = compare({"slow": _sleeper(8e-3, "slow", calls), "fast": _sleeper(1e-3, "fast", calls)}, rounds=5)
    assert timings["slow"].median >= 8e-3
    assert timings["fast"].median >= 1e-3
    # The bound leaves room for a busy machine, on which a sleep of 1 ms may take several.
    assert ratio(timings["slow"], timings["fast"]).median > 1.2


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[int] = []
    compare({"short": lambda: calls.append(1)}, rounds=2, warmup=0)
    assert len(calls) > 20


def test_compare_stops_in_time() -> None:
    calls: list[str] = []
    timings = compare({"a": _sleeper(5e-3, "a", calls)}, rounds=1000, most_seconds=0.02)
    assert 3 <= len(timings["a"].runs) < 20


def test_quantiles() -> None:
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0, 6.0))
    assert timing.median == 3.5
    assert (timing.q20, timing.q80) == (2.0, 5.0)
    assert Timing((2.0,)).q20 == Timing((2.0,)).q80 == 2.0


def test_ratio_is_paired() -> None:
    drifting = ratio(Timing((2.0, 20.0, 200.0)), Timing((1.0, 10.0, 100.0)))
    assert drifting.runs == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="paired"):
        ratio(Timing((1.0,)), Timing((1.0, 2.0)))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="one call"):
        compare({})
    with pytest.raises(ValueError, match="rounds=0"):
        compare({"a": lambda: None}, rounds=0)
    with pytest.raises(ValueError, match="no run"):
        Timing(())


def test_stopwatch(device: str) -> None:
    with stopwatch(device) as watch:
        torch.ones(8, device=device).sum()
        time.sleep(5e-3)
    assert watch.seconds >= 5e-3


def test_text() -> None:
    assert seconds(Timing((1.25,))) == "1.25 s (1.25–1.25)"
    assert seconds(Timing((0.00125,))) == "1.25 ms (1.25–1.25)"
    assert seconds(Timing((2e-8,))) == "0.02 µs (0.02–0.02)"
    assert times(Timing((1.5,))) == "1.50× (1.50–1.50)"


@pytest.mark.gpu
def test_cuda_events() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    timings = compare({"large": lambda: x @ x, "small": lambda: x[:64] @ x}, device="cuda", rounds=9)
    assert ratio(timings["large"], timings["small"]).median > 1.2


@pytest.mark.gpu
def test_what_is_queued_hides_the_host() -> None:
    """A host that dawdles between two launches shows only in what is not queued as a whole."""
    x = torch.randn(256, 256, device="cuda")

    def call() -> None:
        x.sin()
        time.sleep(2e-3)
        x.cos()

    assert compare({"call": call}, device="cuda", rounds=5)["call"].median > 2e-3
    assert compare({"call": call}, device="cuda", rounds=5, queued=True)["call"].median < 1e-3
