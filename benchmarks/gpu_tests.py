"""What `make gpu` adds to pytest (`-p benchmarks.gpu_tests`): it ends in time, and the next run goes on where it stopped."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.bench import sources

UNFINISHED = 75  # pytest's own statuses end at 5
_FIRST = ("test_cuda_probe.py", "test_native_kernels.py", "test_gpu.py")  # little is compiled for these,
_LAST = ("test_ops.py",)  # and much for this


def pytest_addoption(parser: pytest.Parser) -> None:
    option = parser.getgroup("fastconv").addoption
    option("--passed", type=Path, help="a file of tests that passed with these sources: they are left out, more are added")
    option("--seconds", type=float, help=f"begin no test when so many seconds have passed; status {UNFINISHED}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Faults(is_worker=hasattr(config, "workerinput")))
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the process that started it
        config.pluginmanager.register(_Progress(config.getoption("passed"), config.getoption("seconds")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = _read(config.getoption("passed"))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = sorted((item for item in items if item.nodeid not in passed), key=_rank)


def _rank(item: pytest.Item) -> int:
    name = item.path.name
    return -1 if name in _FIRST else 1 if name in _LAST else 0


def _read(file: Path | None) -> set[str]:
    if file is None or not file.is_file():
        return set()
    made_with, *passed = file.read_text(encoding="utf-8").splitlines()
    return set(passed) if made_with == _sources() else set()


def _sources() -> str:
    return sources.digest(Path(__file__).parents[1] / "tests")


class _Faults:
    """After a fault no kernel of the process runs: what fails behind it would hide the test that made it."""

    def __init__(self, is_worker: bool) -> None:
        self._is_worker = is_worker

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and torch.cuda.is_initialized() and _is_lost():
            if self._is_worker:
                os._exit(1)  # pytest-xdist names the test and starts another process
            pytest.exit(f"{report.nodeid}: the GPU no longer answers", returncode=1)


def _is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Progress:
    def __init__(self, file: Path | None, seconds: float | None) -> None:
        self._file, self._end = file, None if seconds is None else time.monotonic() + seconds
        self._called: set[str] = set()
        self._had = _read(file)
        self._done = 0
        self._is_over = False
        if file is not None and not self._had:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{_sources()}\n", encoding="utf-8")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when == "call":
            self._called.add(report.nodeid)
        elif report.passed and report.when == "teardown" and report.nodeid in self._called and self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._done += 1
        if self._end is not None and time.monotonic() > self._end and self._done < self._session.testscollected:
            self._is_over = True
            pytest.exit("out of time: run again to go on", returncode=pytest.ExitCode.INTERRUPTED)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: Any) -> None:
        if self._is_over:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if session.testsfailed else UNFINISHED
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._had:
            session.exitstatus = pytest.ExitCode.OK
