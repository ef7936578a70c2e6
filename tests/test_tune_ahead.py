"""Kernels that are compiled before they are timed: what each process does, and that tune goes on whatever becomes of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import ClassVar

import pytest
import torch
from test_tune import CPU
from test_tune import _call as call

from fastconv.bench import ahead
from fastconv.tuning import Call, Candidate
from fastconv.tuning.candidates import ATEN, NATIVE


class Pool:
    """In place of a pool of processes: what travels to them, and what comes of it at once."""

    outcomes: ClassVar[list[Exception]] = []

    def __init__(self, processes: int, context: multiprocessing.context.BaseContext) -> None:
        assert (processes, context.get_start_method()) == (2, "spawn"), "CUDA does not survive a fork"
        self.seen: list[object] = []
        Pool.made = self

    def submit(self, *task: object) -> Future:
        self.seen.append(pickle.loads(pickle.dumps(task)))
        future: Future = Future()
        future.set_exception(self.outcomes[len(self.seen) - 1])
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        self.is_cancelled = cancel_futures


def test_kernels_are_compiled_ahead_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU. Whatever happens to such a process, tune goes on and meets the reason itself."""
    calls = [call("conv2d_relu", "forward"), call("conv2d", "weight_grad")]
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", lambda *_: pytest.fail("there is nothing to compile"))
    ahead.compile_ahead(calls, CPU)
    Pool.outcomes = [torch.OutOfMemoryError("no memory"), BrokenProcessPool("a fault")]
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 16)
    ahead.compile_ahead(calls, torch.device("cuda"))
    assert Pool.made.seen == [(ahead.run_all, one, torch.device("cuda")) for one in calls]
    assert Pool.made.is_cancelled, "an interrupt waits for what has begun, and not for the rest"


def test_what_a_process_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    tiles = [Candidate("triton", "tma", (("BLOCK_N", n),)) for n in (64, 128)]

    def forcing(_: Call, candidate: Candidate) -> contextlib.AbstractContextManager:
        served.append(candidate)
        if candidate == tiles[0]:
            raise RuntimeError("out of resource: shared memory")
        return contextlib.nullcontext()

    monkeypatch.setattr(ahead.tuning, "candidates", lambda *_: (NATIVE, *tiles, ATEN))
    monkeypatch.setattr(ahead.tuning, "forcing", forcing)
    assert ahead.run_all(call(), CPU) == 1 and served == tiles, "one that is refused keeps none from the others"
    assert ahead.run_all(call(last=False), CPU) == 0
