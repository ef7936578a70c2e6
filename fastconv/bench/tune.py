"""The search behind `fastconv tune`: times every candidate for each call of a training step, and writes a table.

A candidate runs as it will in a training: through its operator, with dispatch and layouts, the choice forced. None is timed
before its result was held against float64 on fresh random data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastconv import backends, tuning
from fastconv.bench import gate, sources
from fastconv.bench.audit import winners
from fastconv.bench.timing import Timing, compare, ratio, require_alive
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import set_precision
from fastconv.tuning import Call, Candidate, tables

# A winner that leads what is chosen anyway by less than this stays unnoted: the next run might say the reverse.
_MARGIN = 1.02
_POOL = ((2, 2), (2, 2), (0, 0), (1, 1), False)  # the pool that a fused call has

Results = tuple[Tensor, ...]


class Problem(NamedTuple):
    """A call to measure.

    Attributes:
        operands: random tensors in the call's dtype and layout.
        run: (operands, backend) → results.
        verify: (results, those in float64, operands) → None, or what is wrong with them.
    """

    operands: Results
    run: Callable[[Results, str], Results]
    verify: Callable[[Results, Results, Results], str | None]


class Measurement(NamedTuple):
    """What came out for a call.

    Attributes:
        timings: of each candidate that gave the right result, in the same rounds.
        rejected: the others, and why.
        winner: None where fewer than two candidates were right, and there was nothing to choose.
    """

    call: Call
    timings: dict[Candidate, Timing]
    rejected: dict[Candidate, str]
    winner: Candidate | None

    def gain(self) -> Timing | None:
        """aten's time over the winner's, paired; None where either is missing."""
        against = next((timing for candidate, timing in self.timings.items() if candidate.backend == "aten"), None)
        return None if against is None or self.winner is None else ratio(against, self.timings[self.winner])

    def entry(self) -> tables.Entry | None:
        if self.winner is None:
            return None
        others = [(c, timing.median) for c, timing in self.timings.items() if c != self.winner]
        return tables.Entry(self.call, self.winner, self.timings[self.winner].median, tuple(others))


def training_step(model: nn.Module, input: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward of `model`, the 16-bit dtypes by autocast; gradients are dropped again."""
    with torch.autocast(input.device.type, dtype, enabled=dtype != torch.float32):
        output = model(input)
    output.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def observe(step: Callable[[], object]) -> Counter[Call]:
    """The distinct calls for which `step` has a backend chosen and which can be measured, and how often each comes.

    Under 'fast', whose entries serve 'ieee' too; what `step` itself runs under 'ieee' is left out.
    """
    with backends.use_backend("auto"), set_precision("fast"), tuning.observing() as calls:
        step()
    return Counter(
        {call: count for call, count in calls.items() if (call.op, call.direction) in PROBLEMS and not call.policy.direct}
    )


def tune(
    calls: Counter[Call], device: torch.device, path: Path, *, budget: float, rounds: int = 20
) -> Iterator[Measurement]:
    """Measure calls one by one, and write each result to the table at `path` before the next is begun.

    Args:
        calls: as from `observe`.
        device: where they run.
        path: a table of that device; entries for other calls stay.
        budget: seconds of timed runs in all, shared evenly; each candidate gets at least three.

    Raises:
        fastconv.tuning.tables.TableError: what lies at `path` is no table for this device.
    """
    if path.is_file():
        tables.read(path, backends.chip(device.type, device.index))  # not found foreign only after minutes of measuring
    made_with = sources.digest()
    try:
        for call in calls:
            measurement = measure(call, device, budget / len(calls), rounds)
            entry = measurement.entry()
            if entry is not None:
                tables.write(path, call.chip, [entry._replace(sources=made_with)])
            yield measurement
    finally:  # whoever stops early has written entries too
        tuning.forget()


def measured(path: Path, chip: str) -> set[Call]:
    """The calls that the table at `path` has, if there is one, from these very sources and versions."""
    made_with = sources.digest()
    return {entry.call for entry in tables.read(path, chip) if entry.sources == made_with} if path.is_file() else set()


def measure(call: Call, device: torch.device, most_seconds: float, rounds: int = 20) -> Measurement:
    """Verify the candidates for a call, and time those that are right where there is a choice."""
    with set_precision("fast"), gate.searching(True):
        return _measure(call, device, most_seconds, rounds)


def _measure(call: Call, device: torch.device, most_seconds: float, rounds: int) -> Measurement:
    problem = PROBLEMS[call.op, call.direction](call, device)
    right, rejected = _gated(call, problem)
    if len(right) < 2:
        return Measurement(call, {}, rejected, None)

    def runner(candidate: Candidate) -> Callable[[], object]:
        def run() -> Results:
            with tuning.forcing(call, candidate):
                return problem.run(problem.operands, "auto")

        return run

    calls = {str(candidate): runner(candidate) for candidate in right}
    timings = compare(calls, device=device, rounds=rounds, most_seconds=most_seconds, queued=True)
    by_candidate = {candidate: timings[str(candidate)] for candidate in right}
    winner = min(right, key=lambda candidate: by_candidate[candidate].median)
    usual = next((candidate for candidate in tuning.pick(*call) if candidate in right), winner)
    if ratio(by_candidate[usual], by_candidate[winner]).median < _MARGIN:
        winner = usual
    return Measurement(call, by_candidate, rejected, winner)


def _gated(call: Call, problem: Problem) -> tuple[list[Candidate], dict[Candidate, str]]:
    """The candidates that give the right result, and why the others do not."""
    candidates = tuning.candidates(call.op, call.direction, call.geometry, call.policy, call.chip, call.channels_last)
    if not call.channels_last:  # the Triton backend chooses its tiles as for channels_last operands, to which it brings them
        ours = next((c for c in tuning.pick(*call[:-1], True) if c.backend == "triton"), None)
        candidates = tuple(c for c in candidates if c.backend != "triton" or c == ours)
    try:
        exact_operands = tuple(t.double() if t.is_floating_point() else t for t in problem.operands)
        with gate.searching(False):  # which takes cuDNN seconds in float64
            exact = problem.run(exact_operands, "aten")
    # Four times the memory of a 16-bit call may not be there: the calls that are smaller can still be measured.
    except Exception as error:
        require_alive(problem.operands[0].device, f"{call.op} {call.direction} in float64", error)
        return [], dict.fromkeys(candidates, f"no result in float64 to hold it against: {type(error).__name__}: {error}")
    right, rejected = [], {}
    device_type = problem.operands[0].device.type
    for candidate in candidates:
        supports = backends.load(candidate.backend).supports
        reason = supports(call.op, call.direction, call.geometry, call.policy, device_type)
        if reason is None:
            try:
                with tuning.forcing(call, candidate):
                    results = problem.run(problem.operands, "auto")
                reason = problem.verify(results, exact, exact_operands)
            # A compiler or a driver refuses a configuration in ways of its own; whatever it says becomes the reason.
            except Exception as error:
                require_alive(problem.operands[0].device, f"{call.op} {call.direction} {candidate}", error)
                reason = f"{type(error).__name__}: {error}"
        if reason is None:
            right.append(candidate)
        else:
            rejected[candidate] = reason
    return right, rejected


def _random(shape: tuple[int, ...], call: Call, device: torch.device, scale: float = 1.0) -> Tensor:
    values = (torch.randn(shape, device=device) * scale).to(call.policy.dtype)
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    return values.to(memory_format=layout) if values.dim() == 4 else values


def _verify(*reductions: int, call: Call) -> Callable[[Results, Results, Results], str | None]:
    """Every result against its own in float64; `reductions` are the numbers of products summed into their elements."""

    def verify(results: Results, exact: Results, operands: Results) -> str | None:
        reasons = (
            gate.deviation(result, wanted, reduction, call.policy.tf32, transformed=_transformed(call))
            for result, wanted, reduction in zip(results, exact, reductions, strict=True)
        )
        return next((reason for reason in reasons if reason is not None), None)

    return verify


def _transformed(call: Call) -> bool:
    g = call.geometry
    if not isinstance(g, ConvGeometry) or not tuning.is_cpu(call.chip):
        return False
    return gate.may_transform("cpu", (g.kernel_height, g.kernel_width), g.stride)


def _conv_arguments(g: ConvGeometry) -> tuple[object, ...]:
    return (g.stride, g.padding, g.dilation, g.groups)


def _forward(call: Call, device: torch.device) -> Problem:
    g = call.geometry
    assert isinstance(g, ConvGeometry)
    products = g.taps * g.group_in_channels
    x, bias = _random(g.input_shape, call, device), _random((g.out_channels,), call, device)
    weight = _random(g.weight_shape, call, device, products**-0.5)
    arguments = _conv_arguments(g)

    def run(operands: Results, backend: str) -> Results:
        if call.op == "conv2d":
            return (torch.ops.fastconv.conv2d(*operands, *arguments, backend),)
        return (torch.ops.fastconv.conv2d_relu(*operands, None, *arguments, backend),)

    return Problem((x, weight, bias), run, _verify(products, call=call))


def _forward_pool(call: Call, device: torch.device) -> Problem:
    g = call.geometry
    assert isinstance(g, ConvGeometry)
    operands = _forward(call, device).operands
    pool = PoolGeometry.of(call.op, g.output_shape, *_POOL)
    arguments = _conv_arguments(g)

    def run(operands: Results, backend: str) -> Results:
        return tuple(torch.ops.fastconv.conv2d_relu_max_pool2d(*operands, *arguments, *_POOL, backend))

    def unpooled(operands: Results) -> Tensor:
        return torch.ops.fastconv.conv2d(*operands, *arguments, "aten")

    verify = _verify_winners(pool, unpooled, True, g.taps * g.group_in_channels, call)
    return Problem(operands, run, verify)


def _verify_winners(
    pool: PoolGeometry, unpooled: Callable[[Results], Tensor], relu: bool, reduction: int, call: Call
) -> Callable[[Results, Results, Results], str | None]:
    """Maxima against float64's, and the elements that the codes name, which may differ in near ties, against the maxima."""

    def verify(results: Results, exact: Results, operands: Results) -> str | None:
        (output, code), maxima = results, exact[0]
        wrong = gate.deviation(output, maxima, reduction, call.policy.tf32, transformed=_transformed(call))
        if wrong is not None:
            return wrong
        return winners(output, code, maxima, unpooled(operands), pool, relu, reduction, call.policy.tf32, _transformed(call))

    return verify


def _input_grad(call: Call, device: torch.device) -> Problem:
    g = call.geometry
    assert isinstance(g, ConvGeometry)
    products = g.taps * g.group_out_channels
    operands = _random(g.output_shape, call, device), _random(g.weight_shape, call, device, products**-0.5)
    shapes = (g.input_shape, g.weight_shape, call.channels_last)

    def run(operands: Results, backend: str) -> Results:
        grad, weight = operands
        return (torch.ops.fastconv.conv2d_backward(grad, None, weight, *shapes, *_conv_arguments(g), backend)[0],)

    return Problem(operands, run, _verify(products, call=call))


def _masked_input_grad(call: Call, device: torch.device) -> Problem:
    """With the backward of the ReLU below, whose output is the convolution's input, and the sums of that."""
    g = call.geometry
    assert isinstance(g, ConvGeometry)
    grad, weight = _input_grad(call, device).operands
    x = _random(g.input_shape, call, device).relu()

    def run(operands: Results, backend: str) -> Results:
        masked, _, bias = torch.ops.fastconv.conv2d_backward_relu(*operands, False, True, *_conv_arguments(g), backend)
        return masked, bias

    products, sums = g.taps * g.group_out_channels, g.batch * g.height * g.width
    return Problem((grad, x, weight), run, _verify(products, products + sums, call=call))


def _weight_grad(call: Call, device: torch.device) -> Problem:
    g = call.geometry
    assert isinstance(g, ConvGeometry)
    operands = _random(g.output_shape, call, device, g.out_pixels**-0.5), _random(g.input_shape, call, device)
    shapes = (g.input_shape, g.weight_shape, call.channels_last)

    def run(operands: Results, backend: str) -> Results:
        grad, x = operands
        return (torch.ops.fastconv.conv2d_backward(grad, x, None, *shapes, *_conv_arguments(g), backend)[1],)

    return Problem(operands, run, _verify(g.out_pixels, call=call))


def _bias_grad(call: Call, device: torch.device) -> Problem:
    shape = call.geometry.input_shape

    def run(operands: Results, backend: str) -> Results:
        return (torch.ops.fastconv.bias_grad(*operands, backend),)

    return Problem((_random(shape, call, device),), run, _verify(math.prod(shape) // shape[1], call=call))


def _relu_backward(call: Call, device: torch.device) -> Problem:
    shape = call.geometry.input_shape

    def run(operands: Results, backend: str) -> Results:
        return tuple(torch.ops.fastconv.relu_backward(*operands, True, backend))

    operands = _random(shape, call, device), _random(shape, call, device)
    return Problem(operands, run, _verify(1, math.prod(shape) // shape[1], call=call))


def _pool_arguments(pool: PoolGeometry) -> tuple[object, ...]:
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


def _max_pool(call: Call, device: torch.device) -> Problem:
    pool = call.geometry
    assert isinstance(pool, PoolGeometry)
    relu = call.op == "relu_max_pool2d"

    def run(operands: Results, backend: str) -> Results:
        return tuple(torch.ops.fastconv.max_pool2d(*operands, *_pool_arguments(pool), relu, backend))

    verify = _verify_winners(pool, lambda operands: operands[0], relu, 1, call)
    return Problem((_random(pool.input_shape, call, device),), run, verify)


def _max_pool_backward(call: Call, device: torch.device) -> Problem:
    pool = call.geometry
    assert isinstance(pool, PoolGeometry)
    arguments = _pool_arguments(pool)
    x = _random(pool.input_shape, call, device)
    code = torch.ops.fastconv.max_pool2d(x, *arguments, True, "aten")[1]

    def run(operands: Results, backend: str) -> Results:
        return tuple(torch.ops.fastconv.max_pool2d_backward(*operands, pool.input_shape, *arguments, True, backend))

    sums = pool.batch * pool.out_height * pool.out_width
    operands = _random(pool.output_shape, call, device), code
    return Problem(operands, run, _verify(pool.positions, sums, call=call))


def _average(call: Call, device: torch.device) -> Problem:
    pool = call.geometry
    assert isinstance(pool, PoolGeometry)
    is_global, is_backward = call.op == "global_avg_pool2d", call.direction == "backward"
    operators = torch.ops.fastconv
    window = _pool_arguments(pool)

    def run(operands: Results, backend: str) -> Results:
        if is_global and is_backward:
            sizes = (pool.height, pool.width, call.channels_last)
            return (operators.global_avg_pool2d_backward(*operands, *sizes, backend),)
        if is_global:
            return (operators.global_avg_pool2d(*operands, backend),)
        if is_backward:
            arguments = (pool.input_shape, *window, True, None, call.channels_last)
            return (operators.avg_pool2d_backward(*operands, *arguments, backend),)
        return (operators.avg_pool2d(*operands, *window, True, None, backend),)

    operand = _random(pool.output_shape if is_backward else pool.input_shape, call, device)
    return Problem((operand,), run, _verify(pool.positions, call=call))


PROBLEMS: dict[tuple[str, str], Callable[[Call, torch.device], Problem]] = {
    ("conv2d", "forward"): _forward,
    ("conv2d_relu", "forward"): _forward,
    ("conv2d_relu_max_pool2d", "forward"): _forward_pool,
    ("conv2d", "input_grad"): _input_grad,
    ("conv2d_relu", "input_grad"): _masked_input_grad,
    ("conv2d", "weight_grad"): _weight_grad,
    ("conv2d", "bias_grad"): _bias_grad,
    ("relu", "backward"): _relu_backward,
    ("max_pool2d", "forward"): _max_pool,
    ("relu_max_pool2d", "forward"): _max_pool,
    ("max_pool2d", "backward"): _max_pool_backward,
    ("avg_pool2d", "forward"): _average,
    ("avg_pool2d", "backward"): _average,
    ("global_avg_pool2d", "forward"): _average,
    ("global_avg_pool2d", "backward"): _average,
}
