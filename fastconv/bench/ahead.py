"""Kernels of candidates compiled before any of them is timed, in several processes: Triton itself compiles on one core."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from fastconv import tuning
from fastconv.bench import tune
from fastconv.precision import set_precision
from fastconv.tuning import Call

_MOST_PROCESSES = 12  # each has the operands of a call in the GPU's memory, and a context


def compile_ahead(calls: Collection[Call], device: torch.device, seconds: float = math.inf) -> None:
    """Run Triton's candidates for these calls once, so that its cache on disk has them; on a GPU, where they are compiled.

    What does not run here, for want of memory too, comes again in `tune.tune`, which says what became of it.

    Args:
        seconds: that it may take; calls that have begun are finished.
    """
    processes = min(len(calls), _MOST_PROCESSES, (os.cpu_count() or 2) - 1)
    if device.type != "cuda" or processes < 2:
        return
    torch.cuda.empty_cache()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        wait([pool.submit(run_all, call, device) for call in calls], None if seconds == math.inf else seconds)
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(call: Call, device: torch.device) -> int:
    """How many of Triton's candidates for a channels_last call ran."""
    ran = 0
    with set_precision("fast"):
        problem = tune.PROBLEMS[call.op, call.direction](call, device)
        for candidate in tuning.candidates(
            call.op, call.direction, call.geometry, call.policy, call.chip, call.channels_last
        ):
            if candidate.backend != "triton" or not call.channels_last:
                continue
            with (
                contextlib.suppress(Exception),
                tuning.forcing(call, candidate),
            ):  # compilers and drivers refuse in many ways
                problem.run(problem.operands, "auto")
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ran += 1
    del problem
    torch.cuda.empty_cache()
    return ran
