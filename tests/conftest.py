"""Shared set-up: Triton's interpreter where there is no GPU, fresh random data, poisoned allocations, the `gpu` marker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import report
from emu import build

import fastconv
from fastconv import tuning
from fastconv.backends import native_library
from fastconv.tuning import tables


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item for item in items if "cpu_kernels" not in item.keywords or _params(item).get("compiled", "cpu") == "cpu"
    ]
    for item in items:
        params = _params(item)
        on_gpu = "gpu" in item.keywords
        if on_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif params.get("device") == "cuda" and params.get("backend") == "native" and native_library.unavailable_cuda():
            item.add_marker(pytest.mark.skip(reason=str(native_library.unavailable_cuda())))
        elif params.get("backend") == "triton" and not on_gpu and torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter is off where there is a GPU"))


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


@pytest.fixture(autouse=True)
def _fresh_and_poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """A seed of its own for every test; torch.empty filled with NaN, so that an element nobody wrote shows."""
    torch.manual_seed(sum(map(ord, request.node.nodeid)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    fastconv.use_backend("auto")
    fastconv.set_precision("fast")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a user's tables, which is not there yet; and nothing is remembered of other ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tables, "_reported", set())
    tuning.forget()
    yield tmp_path / "fastconv"
    tuning.forget()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in report.LINES:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def machine() -> Iterator[build.Machine]:
    """The CUDA kernels, run on a CPU."""
    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    machine = build.machine()
    yield machine
    machine.counts()
    totals = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in machine.totals.items())
    report.note(f"CUDA kernels run on a CPU: {totals}")


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose kernels the native backend's launchers launch: the CPU library's, or the CUDA library's, run on a CPU or a GPU.

    On a GPU tensors are made there unless a test says otherwise. Tests marked `cpu_kernels` are of the first only.
    """
    if request.param == "emulated":
        with request.getfixturevalue("machine").serving():
            yield "emulated"
    elif request.param == "cuda":
        if (reason := native_library.unavailable_cuda()) is not None:
            pytest.skip(reason)
        with torch.device("cuda"):
            yield "cuda"
    else:
        yield "cpu"
