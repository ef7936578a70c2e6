"""A model before and after fastconv.convert: error against float64, then memory and time of forward and training step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastconv.bench import timing
from fastconv.bench.saved import peak_bytes, saved_bytes
from fastconv.bench.timing import Timing
from fastconv.convert import convert, restore
from fastconv.convert.swap import lay_out
from fastconv.convert.trees import copy_modules
from fastconv.precision import get_precision

# The converted model's error against float64 may be so many times the larger one of torch's two layouts. Where theirs is
# less, that of so many roundings is allowed, or, where Winograd's transforms may serve, what they may cost a layer, times
# the square root of the number of layers, whose errors are independent.
ERROR_FACTOR, ROUNDINGS, TRANSFORMED = 4.0, 16.0, 1e-5


@dataclass(frozen=True)
class Errors:
    """Relative norms of the difference to a run in float64, of the outputs in evaluation and training, of all gradients."""

    output: float
    training_output: float
    gradients: float


@dataclass(frozen=True)
class Side:
    """A model as one provider runs it.

    Attributes:
        errors: against float64.
        forward, step: seconds a call, in interleaved rounds; None where errors did not pass.
        peak_bytes: the most memory that a training step has allocated at a time over what was there before.
        saved_bytes: what autograd keeps of its forward.
    """

    errors: Errors
    forward: Timing | None = None
    step: Timing | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A model before and after conversion.

    Attributes:
        sides: 'torch' (in NCHW), 'torch channels_last' and 'fastconv'.
        allowed: the error up to which the last passes, by the names of Errors.
        wrong: what is wrong with it; None where nothing is.
        mode: which mode training outputs and gradients were compared in.
    """

    sides: dict[str, Side]
    allowed: dict[str, float]
    wrong: str | None
    mode: str


OURS = "fastconv"


def compare(
    model: nn.Module,
    input: Tensor,
    *,
    fuse: bool = True,
    fold_batch_norm: bool = True,
    memory_format: torch.memory_format = torch.channels_last,
    repeats: int = 20,
    most_seconds: float = 60.0,
) -> Comparison:
    """Run `model` on torch's layers in NCHW and in channels_last, and converted, on the same images.

    A training step is forward, the mean of squares of all floating-point outputs, backward and SGD, batch norms in training
    mode. `model` is left as it is.

    Args:
        model: any module; one that was converted is restored first.
        input: (N, C, H, W), on the model's device and of its dtype.
        fuse, fold_batch_norm, memory_format: as in fastconv.convert.
        repeats: rounds of timed calls; most_seconds: for each of forward and step.

    Raises:
        ValueError: the model does not run on `input`, or gives nothing to differentiate.
    """
    model = restore(model)
    exact = _own(model, lambda t: t.double() if t.is_floating_point() else t)
    models = {"torch": _own(model), "torch channels_last": _own(model), OURS: _own(model)}
    formats = {"torch": torch.contiguous_format, "torch channels_last": torch.channels_last, OURS: memory_format}
    for name, layout in formats.items():
        lay_out(models[name], layout)
    models[OURS] = convert(
        models[OURS], inplace=True, memory_format=memory_format, fuse=fuse, fold_batch_norm=fold_batch_norm
    )
    inputs = {name: input.contiguous(memory_format=layout) for name, layout in formats.items()}
    wide = input.double()
    training = _error(*(_results(exact, wide, True, seed)[1] for seed in (0, 1))) == 0
    wanted = _results(exact, wide, training)
    sides = {name: Side(_errors(_results(net, inputs[name], training), wanted)) for name, net in models.items()}
    layers = sum(parameter.dim() == 4 for parameter in model.parameters())
    allowed = {field.name: _allowed(sides, input.dtype, layers, field.name) for field in dataclasses.fields(Errors)}
    over = [what for what, most in allowed.items() if not getattr(sides[OURS].errors, what) <= most]
    wrong = None
    if over:
        error = getattr(sides[OURS].errors, over[0])
        wrong = f"{over[0].replace('_', ' ')}: error {error:.1e} against float64, allowed {allowed[over[0]]:.1e}"
    else:
        measured = _measure(models, inputs, repeats, most_seconds)
        sides = {name: dataclasses.replace(side, **measured[name]) for name, side in sides.items()}
    mode = "in training mode, dropout layers off" if training else "in evaluation mode, as the net is random in training"
    return Comparison(sides, allowed, wrong, mode)


def _allowed(sides: dict[str, Side], dtype: torch.dtype, layers: int, what: str) -> float:
    """Of gradients, twice the square root of what outputs may have beyond the original's: see gate.net_bounds."""
    stock = max(getattr(side.errors, what) for name, side in sides.items() if name != OURS)
    least = ROUNDINGS * torch.finfo(dtype).eps / 2
    if get_precision() == "fast" and dtype == torch.float32:
        least = max(least, TRANSFORMED * math.sqrt(layers))
    return max(ERROR_FACTOR * stock, 2 * math.sqrt(least) if what == "gradients" else least)


def _own(model: nn.Module, changed: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy around tensors of its own."""

    def held(tensor: Tensor) -> Tensor:
        made = changed(tensor.detach().clone())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    return copy_modules(model, held)


def _outputs(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _loss(output: object) -> Tensor:
    """The mean of squares of every floating-point output, summed over them; in float32, or float64."""
    outputs = _outputs(output)
    if not any(leaf.requires_grad for leaf in outputs):
        raise ValueError("the model's output does not depend on a parameter that requires a gradient: no step to train")
    wide = [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in outputs]
    return torch.stack([leaf.square().mean() for leaf in wide]).sum()


_Results = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _results(model: nn.Module, input: Tensor, training: bool, seed: int = 0) -> _Results:
    """Outputs in evaluation mode; outputs and gradients in the other; running statistics are left as they were.

    Dropout layers are off: what they draw hangs on dtype and memory format.
    """
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [input.device] if input.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            with torch.no_grad():
                evaluated = [leaf.double() for leaf in _outputs(model.eval()(input))]
            model.train(training)
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()
            trained = model(input)
            loss = _loss(trained)
        # Whatever a forward raises on an input that it was not written for.
        except Exception as error:
            shape = "x".join(map(str, input.shape))
            raise ValueError(f"the model does not run on {shape} {input.dtype}: {type(error).__name__}: {error}") from error
        loss.backward()
    for buffer, value in kept:
        buffer.copy_(value)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    found = (evaluated, [leaf.detach().double() for leaf in _outputs(trained)], [grad.double() for grad in gradients])
    model.zero_grad(set_to_none=True)
    return found


def _errors(found: _Results, exact: _Results) -> Errors:
    return Errors(*map(_error, found, exact))


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to that of `exact`; infinity where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in exact]:
        return math.inf
    difference = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(found, exact, strict=True)))
    size = math.sqrt(sum(b.square().sum().item() for b in exact))
    return difference / size if size else difference


def _measure(
    models: dict[str, nn.Module], inputs: dict[str, Tensor], repeats: int, most_seconds: float
) -> dict[str, dict[str, Any]]:
    device = inputs[OURS].device
    forwards = {name: _forward(model, inputs[name]) for name, model in models.items()}
    steps = {name: _step(model, inputs[name]) for name, model in models.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        steps[name]()  # what is allocated once
        model.train()
        saved = saved_bytes(lambda model=model, name=name: model(inputs[name]))  # type: ignore[misc]
        found[name] = {"saved_bytes": saved, "peak_bytes": _peak(steps[name], device)}
    for what, calls in (("forward", forwards), ("step", steps)):
        for model in models.values():
            model.train(what == "step")
        with torch.no_grad() if what == "forward" else contextlib.nullcontext():
            taken = timing.compare(calls, device=device, rounds=repeats, warmup=2, most_seconds=most_seconds)
        for name, value in taken.items():
            found[name][what] = value
    return found


def _forward(model: nn.Module, input: Tensor) -> Callable[[], object]:
    return lambda: model(input)


def _step(model: nn.Module, input: Tensor) -> Callable[[], object]:
    # So small a step that weights, and with them the share of ReLUs that are open, stay what they are.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-8)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(model(input)).backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's profiler writes to standard error of its own starting and stopping off the screen."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peak(step: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        with _quiet():
            return peak_bytes(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
