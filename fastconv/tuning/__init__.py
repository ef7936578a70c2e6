"""Which backend and kernel is the fastest for a call: `pick`, and what it picks from.

The order of a call's candidates comes from the entry of a table that was measured for it, else from the nearest entry in
its bucket, else from a model of cost; on a CPU and for passes without a product, from a rule. Nothing is measured here:
`fastconv tune` does that, and writes tables.
"""

from __future__ import annotations

from typing import NamedTuple

from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import cost, tables
from fastconv.tuning.calls import Call, cached, cached_unless_watched, forced, forcing, forget, observe, observing
from fastconv.tuning.candidates import Candidate, candidates, capability, is_cpu
from fastconv.tuning.fused import note_fused

__all__ = [
    "Call",
    "Candidate",
    "cached_unless_watched",
    "candidates",
    "capability",
    "explain",
    "forcing",
    "forget",
    "note_fused",
    "observe",
    "observing",
    "pick",
    "tables",
]


class Choice(NamedTuple):
    order: tuple[Candidate, ...]
    reason: str


def pick(
    op: str,
    direction: str,
    geometry: ConvGeometry | PoolGeometry,
    policy: Policy,
    chip: str,
    channels_last: bool = True,
) -> tuple[Candidate, ...]:
    """Ways to run a call, in the order in which to try them; 'aten' is always among them.

    Args:
        op: the operator's name, as in torch.ops.fastconv.
        direction: 'forward', 'input_grad', 'weight_grad', 'bias_grad' or 'backward'.
        geometry: the call's sizes.
        policy: the call's arithmetic.
        chip: a GPU's name and compute capability ('NVIDIA H100 80GB HBM3 sm_90'), a CPU's name and threads
            ('AMD EPYC 9B14 cpu-2') or 'cpu', or 'interpreter'.
        channels_last: whether the operands lie as the kernels want them.
    """
    call = Call(op, direction, geometry, policy, chip, channels_last)
    measured = forced(call)
    return (measured,) if measured is not None else _choose(call).order


def explain(
    op: str,
    direction: str,
    geometry: ConvGeometry | PoolGeometry,
    policy: Policy,
    chip: str,
    channels_last: bool = True,
) -> str:
    """Why `pick` puts its first candidate first: a table's entry, the nearest entry, the model of cost, or a rule."""
    call = Call(op, direction, geometry, policy, chip, channels_last)
    measured = forced(call)
    return _choose(call).reason if measured is None else f"forced: {measured} is being measured"


@cached
def _choose(call: Call) -> Choice:
    allowed = candidates(call.op, call.direction, call.geometry, call.policy, call.chip, call.channels_last)
    entry = tables.load(call.chip).lookup(call, allowed)
    if entry is not None:
        medians = entry.medians()
        # Times of other sizes order only what they were measured to be best.
        measured = [c for c in medians if c in allowed] if entry.call == tables.as_measured(call) else [entry.candidate]
        rest = [candidate for candidate in _modelled(call, allowed).order if candidate not in measured]
        return Choice((*measured, *rest), _measured_reason(call, entry, medians))
    return _modelled(call, allowed)


def _measured_reason(call: Call, entry: tables.Entry, medians: dict[Candidate, float]) -> str:
    where = "table: measured" if entry.call == tables.as_measured(call) else f"nearest in table, {entry.call}: measured"
    aten = next((seconds for candidate, seconds in medians.items() if candidate.backend == "aten"), None)
    against = "" if aten is None or entry.candidate.backend == "aten" else f", {aten / entry.seconds:.2f}× aten"
    return f"{where} {entry.candidate} {_microseconds(entry.seconds)}{against}, on {call.chip}"


def _modelled(call: Call, allowed: tuple[Candidate, ...]) -> Choice:
    g = call.geometry
    if capability(call.chip) is None or not isinstance(g, ConvGeometry):
        what = "passes of ours read and write channels_last" if not is_cpu(call.chip) else "native reads channels_last"
        return Choice(allowed, f"rule: {what}, operands {'do' if call.channels_last else 'do not'}: {allowed[0]}")
    seconds = {c: cost.seconds(call.op, call.direction, g, call.policy, call.chip, c) for c in allowed}
    order = _native_behind(tuple(sorted(allowed, key=seconds.__getitem__)))
    if not call.channels_last:  # a pass over the input and one over the output more, and nothing gained
        order = (*(c for c in order if c.backend == "aten"), *(c for c in order if c.backend != "aten"))
        return Choice(order, f"rule: kernels of ours read channels_last, operands do not: {order[0]}")
    runner_up = next((c for c in order if c.backend != order[0].backend), None)
    against = "" if runner_up is None else f", {runner_up} {_microseconds(seconds[runner_up])}"
    return Choice(order, f"cost model: {order[0]} {_microseconds(seconds[order[0]])}{against}")


def _native_behind(order: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Of a GPU: native kernels, until a table has timed them, stand in for Triton's where those cannot serve.

    They come behind the Triton candidates that are faster than aten, and before aten where the model has them faster too.
    """
    natives = [candidate for candidate in order if candidate.backend == "native"]
    others = [candidate for candidate in order if candidate.backend != "native"]
    aten = next(index for index, candidate in enumerate(others) if candidate.backend == "aten")
    pays = aten > 0 and natives and order.index(natives[0]) < order.index(others[aten])
    place = aten if pays else aten + 1
    return (*others[:place], *natives, *others[place:])


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"
