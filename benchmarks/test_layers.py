"""Layers and pools under pytest-benchmark: `pytest benchmarks --benchmark-only`, with all of its options.

Groups hold what may be compared: one case, direction and dtype, by each provider. Unlike `fastconv bench`, pytest-benchmark
runs the providers one after another: a machine that drifts shows in the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastconv.bench.suites import cases, layer_trials, pool_trials
from fastconv.bench.trial import Trial, arithmetic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LISTS = cases.of(DEVICE.type, quick=True)
DTYPE = next(iter(LISTS.layers))
PROVIDERS = ("fastconv", "eager_channels_last", "eager_nchw")
DIRECTIONS = ("forward", "both")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", LISTS.layers[DTYPE], ids=lambda case: case.case)
def test_layer(benchmark: Any, case: cases.LayerCase, direction: str, provider: str) -> None:
    _run(benchmark, provider, lambda: layer_trials.trials("layers", case, DTYPE, DEVICE, (direction,), (provider,)))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", LISTS.pools[DTYPE], ids=lambda case: case.case)
def test_pool(benchmark: Any, case: cases.PoolCase, direction: str, provider: str) -> None:
    _run(benchmark, provider, lambda: pool_trials.trials(case, DTYPE, DEVICE, (direction,), (provider,)))


def _run(benchmark: Any, provider: str, trials: Callable[[], Iterator[Trial]]) -> None:
    """The gate, and then the time of the same calls."""
    with arithmetic(DTYPE, DEVICE.type):
        (trial,) = trials()
        verdict = trial.check(provider)
        assert verdict.wrong is None
        benchmark.group = f"{trial.case}, {trial.direction}, {trial.dtype}"
        benchmark.extra_info.update(provider=provider, max_error=verdict.max_error, rms_error=verdict.rms_error)
        benchmark(_until_done(trial.calls[provider]))


def _until_done(call: Callable[[], object]) -> Callable[[], object]:
    if DEVICE.type != "cuda":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize(DEVICE)

    return wait
