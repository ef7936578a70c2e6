"""The runner of suites: cases one after another, a table as it goes, records in files after each case."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from fastconv.bench import records, roofline
from fastconv.bench.records import Machine, Record
from fastconv.bench.roofline import Rates
from fastconv.bench.suites import cases, layer_trials, memory, net_trials, overhead, pool_trials
from fastconv.bench.timing import require_alive
from fastconv.bench.trial import Effort, Trial, arithmetic, dtypes_of, header, lines, measure, ours, torch_dtype

SUITES = records.SUITES
COMPILED_BATCH = 32  # of single operators that are compiled too, on a GPU
_DIRECTIONS = ("forward", "backward", "both")

# Layers settle: in a net they stand among their like.
_FULL = {
    "layers": Effort(15, 0.6, settling=1),
    "pools": Effort(15, 0.4, settling=1),
    "models": Effort(20, 4.0),
    "training": Effort(15, 6.0),
    "overhead": Effort(60, 2.0, settling=20),
    "scaling": Effort(15, 0.6, settling=1),
}
_QUICK = dict.fromkeys(SUITES, Effort(7, 0.25)) | {"overhead": Effort(20, 0.5, settling=20)}


class Selection(NamedTuple):
    """What is measured.

    Attributes:
        suites, dtypes: as in records; no dtypes: each suite's own.
        only: cases whose name holds it.
        quick: the short lists, few rounds.
        seconds: after which no further case is begun.
        resume: leave out what the files have already of the same sources, torch and chip.
    """

    suites: tuple[str, ...] = SUITES
    dtypes: tuple[str, ...] = ()
    only: str = ""
    quick: bool = False
    seconds: float | None = None
    resume: bool = False

    @property
    def is_whole(self) -> bool:
        return not (self.dtypes or self.only or self.seconds is not None or self.resume)


class Plan(NamedTuple):
    """A case in a dtype, what makes its trials when its turn has come, and the provider whose record says that it had."""

    suite: str
    case: str
    dtype: str
    trials: Callable[[], Iterator[Trial]]
    provider: str


class Outcome(NamedTuple):
    """Records made, whether all of ours were right, and cases that there was no time for."""

    records: list[Record]
    all_right: bool
    left: int


def plans(suite: str, device: torch.device, quick: bool) -> Iterator[Plan]:
    """The cases of a suite, what matters most first."""
    listed, kind = cases.of(device.type, quick), device.type
    if suite in ("layers", "scaling"):
        directions = _DIRECTIONS if suite == "layers" and not quick else ("forward", "both")
        for case, dtype in _by_batch(listed.layers if suite == "layers" else listed.scaling):
            names = _providers(suite, kind, dtype, case)
            make = _bound(layer_trials.trials, suite, case, dtype, device, directions, names)
            yield Plan(suite, case.case, dtype, make, ours())
    elif suite == "pools":
        for pool, dtype in _by_batch(listed.pools):
            names = _providers(suite, kind, dtype, pool)
            yield Plan(suite, pool.case, dtype, _bound(pool_trials.trials, pool, dtype, device, _DIRECTIONS, names), ours())
    elif suite == "overhead":
        for case_name in overhead.CALLS:
            dtype = "bfloat16" if kind == "cuda" else "float32"
            yield Plan(suite, case_name, dtype, _bound(overhead.trials, case_name, dtype, device), ours())
    else:
        is_step = suite == "training"
        nets = [net for net in listed.nets if net.trains or not is_step]
        # Compilations of whole nets take minutes on a GPU: all have been measured without before the first of them.
        stages = (False, True) if kind == "cuda" else (True,)
        for compiled in stages:
            for net in (net for net in nets if net.is_compiled or not compiled or len(stages) == 1):
                for dtype in net.dtypes:
                    make = _bound(_net, net, dtype, is_step, device, quick, compiled)
                    yield Plan(suite, net.case, dtype, make, "compile_default" if compiled and len(stages) > 1 else ours())


C = TypeVar("C", cases.LayerCase, cases.PoolCase)


def _by_batch(listed: Mapping[str, tuple[C, ...]]) -> Iterator[tuple[C, str]]:
    """Whoever has to stop has all dtypes of one batch, and then of the next."""
    batches = dict.fromkeys(case.batch for of in listed.values() for case in of)
    for batch in batches:
        for dtype, of in listed.items():
            yield from ((case, dtype) for case in of if case.batch == batch)


def _bound(function: Callable[..., Iterator[Trial]], *args: object) -> Callable[[], Iterator[Trial]]:
    return lambda: function(*args)


def _net(net: cases.Net, dtype: str, is_step: bool, device: torch.device, quick: bool, compiled: bool) -> Iterator[Trial]:
    peaks = {}
    if is_step and net.is_compiled and device.type == "cpu" and not quick:
        names = net_trials.providers(net, is_step, "cpu", compiled=False)
        peaks = {name: memory.peak(net, dtype, name) for name in names}
    yield net_trials.trial(net, dtype, is_step, device, peaks, compiled)


def _providers(suite: str, device_type: str, dtype: str, case: cases.LayerCase | cases.PoolCase) -> tuple[str, ...]:
    """Compilations take seconds each: on a GPU bfloat16 at one batch has them, the searched ones and single backends few."""
    names: tuple[str, ...] = (ours(), "eager_channels_last", "eager_nchw")
    if device_type != "cuda":
        return names
    if suite == "layers":
        names += ("cudnn_fused",)
    if (dtype, case.batch) == ("bfloat16", COMPILED_BATCH) and suite != "scaling":
        names += ("compile_default",)
        if isinstance(case, cases.LayerCase) and case.layer in (*cases.RECIPE_224, *cases.VGG16):
            names += ("compile_max_autotune", "fastconv_triton", "fastconv_native")
    return tuple(dict.fromkeys(names))


def run(selection: Selection, device: torch.device, out: Path, say: Callable[[str], None] = print) -> Outcome:
    """Measure what is selected; print a table and keep records under `out` / chip / suite.json."""
    began, quick = time.monotonic(), selection.quick
    machine = records.machine(device)
    folder = out / machine.folder
    say(f"{machine.chip}; torch {machine.torch}; triton {machine.triton}; fastconv {machine.commit}; {machine.date}")
    rates: dict[str, Rates] = {}
    copy = roofline.copy_rate(device)
    say(f"a copy moves {copy * 1e-9:.0f} GB/s; the products' rate stands before each dtype")
    say("medians (20% to 80% quantiles); ratios are paired, above 1 where fastconv is faster; errors against float64")
    made: list[Record] = []
    all_right, left = True, 0
    for at, suite in enumerate(selection.suites):
        passed = time.monotonic() - began  # what time there is, is shared out evenly
        until = None if selection.seconds is None else passed + (selection.seconds - passed) / (len(selection.suites) - at)
        file, is_first = folder / f"{suite}.json", True
        known = _known(file, machine) if selection.resume else set()
        chosen = [plan for plan in plans(suite, device, quick) if _is_wanted(plan, selection, device.type)]
        todo = [plan for plan in chosen if (plan.suite, plan.case, plan.dtype, plan.provider) not in known]
        width = max((len(plan.case) for plan in todo), default=0)
        say(f"\n{suite}: {len(todo)} cases" + (f", {len(chosen) - len(todo)} known" if known else ""))
        say(header(width))
        for done, plan in enumerate(todo):
            if until is not None and time.monotonic() - began > until:
                left += len(todo) - done
                say(f"{suite}: {len(todo) - done} cases left, {until:.0f} s have passed")
                break
            with arithmetic(plan.dtype, device.type):
                if plan.dtype not in rates:
                    rates[plan.dtype] = Rates(copy, roofline.matmul_rate(torch_dtype(plan.dtype), device))
                    say(f"a matrix product in {plan.dtype}: {rates[plan.dtype].matmul * 1e-12:.3g} TFLOP/s")
                found, right = _measured(
                    plan, (_QUICK if quick else _FULL)[suite], machine, device, rates[plan.dtype], say, width
                )
            all_right &= right
            made += found
            if found:
                records.write(file, found, whole=is_first and selection.is_whole)
                is_first = False
    return Outcome(made, all_right, left)


def _measured(
    plan: Plan, effort: Effort, machine: Machine, device: torch.device, rates: Rates, say: Callable[[str], None], width: int
) -> tuple[list[Record], bool]:
    """The records of a case, and whether ours were right; a case that cannot be set up is told, and the others go on."""
    made: list[Record] = []
    all_right = True
    trials = plan.trials()
    while True:
        try:
            trial = next(trials, None)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            require_alive(device, f"{plan.case} {plan.dtype}", error)
            say(f"{plan.case} {plan.dtype} could not be set up: {str(error).partition(chr(10))[0]}")
            return made, False
        if trial is None:
            return made, all_right
        try:
            result = measure(trial, effort, machine, rates)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            require_alive(device, f"{trial.case} {trial.direction} {trial.dtype}", error)
            say(f"{trial.case} {trial.direction} {trial.dtype} could not be timed: {str(error).partition(chr(10))[0]}")
            all_right = False
        else:
            made += result.records.values()
            all_right &= ours() not in result.refused
            say("\n".join(lines(result, width)))
            del result
        finally:
            trial.close()
        del trial
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_wanted(plan: Plan, selection: Selection, device_type: str) -> bool:
    if selection.dtypes and plan.dtype not in selection.dtypes:
        return False
    return selection.only in plan.case and (plan.dtype in dtypes_of(device_type) or plan.dtype.endswith("_autocast"))


def _known(file: Path, machine: Machine) -> set[tuple[str, str, str, str]]:
    """What a file has of these sources on this machine; where ours was refused, a case is measured again."""
    if not file.is_file():
        return set()
    same = ("chip", "torch", "triton", "commit")
    return {
        (record.suite, record.case, record.dtype, record.provider)
        for record in records.read(file)
        if all(getattr(record, name) == getattr(machine, name) for name in same)
    }
