"""Kernels of candidates compiled before any of them is timed, in several processes: Triton itself compiles on one core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from fastconv import tuning
from fastconv.bench import tune
from fastconv.precision import set_precision
from fastconv.tuning import Call

_MOST_PROCESSES = 12  # each has the operands of a call in the GPU's memory, and a context


def compile_ahead(calls: Collection[Call], device: torch.device) -> None:
    """Run Triton's candidates for these calls once, so that its cache on disk has them; on a GPU, where they are compiled.

    What a candidate's failure means is for `tune.tune` to say, which comes to it again.
    """
    processes = min(len(calls), _MOST_PROCESSES, (os.cpu_count() or 2) - 1)
    if device.type != "cuda" or processes < 2:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(run_all, call, device) for call in calls]
        with contextlib.suppress(BrokenProcessPool):  # by a fault of the GPU, which `tune.tune` will name
            for done in pending:
                done.result()


def run_all(call: Call, device: torch.device) -> int:
    """How many of Triton's candidates for a call ran."""
    ran = 0
    with set_precision("fast"):
        problem = tune.PROBLEMS[call.op, call.direction](call, device)
        for candidate in tuning.candidates(
            call.op, call.direction, call.geometry, call.policy, call.chip, call.channels_last
        ):
            if candidate.backend == "triton":
                with (
                    contextlib.suppress(Exception),
                    tuning.forcing(call, candidate),
                ):  # of a compiler or driver, in their ways
                    problem.run(problem.operands, "auto")
                    ran += 1
    return ran
