"""fastconv.explain: what became of each layer of a model, what runs for it, and what it costs before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from fastconv import backends, tuning
from fastconv.backends import native_amx, triton_launch
from fastconv.bench.attribution import Recorder, Work
from fastconv.bench.saved import saving
from fastconv.convert import Layer, restore
from fastconv.convert.report import after, before
from fastconv.convert.swap import Conversion, lay_out
from fastconv.convert.trees import copy_modules
from fastconv.tuning import cpu
from fastconv.tuning.candidates import is_cpu


@dataclass(frozen=True)
class Choice:
    """What runs for one kind of call of a layer.

    Attributes:
        op: the operator, as in torch.ops.fastconv.
        direction: 'forward', 'input_grad', 'weight_grad', 'bias_grad' or 'backward'.
        backend: 'triton', 'native' or 'aten'.
        kernel: the family of kernels and its settings, '' where the backend has one way.
        reason: why tuning puts it first.
        times: how often it comes in a run.
    """

    op: str
    direction: str
    backend: str
    kernel: str
    reason: str
    times: int


@dataclass(frozen=True)
class LayoutCopy:
    """An operand that does not lie in memory as the kernels of its layer read it.

    Attributes:
        layer: path of the layer.
        direction: 'forward' or 'backward'.
        operand: its name in the operator ('input', 'weight', 'grad', ...), 'result' of what the operator itself made.
        shape: of the operand; bytes: its size.
        copied: it is copied to the other memory format; else torch's own kernels serve, as they would not otherwise.
        source: whose output it is: a module's path, 'input', 'parameter', 'loss', a function ('cat', 'cat in block'), or
            the 'gradient of' one of these.
    """

    layer: str
    direction: str
    operand: str
    shape: tuple[int, ...]
    bytes: int
    copied: bool
    source: str


@dataclass(frozen=True)
class Figures:
    """Costs of a training step, forward and backward without loss and optimizer.

    Attributes:
        forward_flops, step_flops: multiply-adds counted as two, of convolutions and matrix products.
        moved_before, moved_after: bytes of each operator's operands and results, each once, with layout copies.
        saved_before, saved_after: bytes that autograd keeps for backward, by whose result they are, parameters excluded.
    """

    forward_flops: int = 0
    step_flops: int = 0
    moved_before: int = 0
    moved_after: int = 0
    saved_before: int = 0
    saved_after: int = 0


@dataclass(frozen=True)
class LayerReport(Figures):
    """A layer: what became of it, what runs for it in a training step, and its costs.

    Attributes:
        path, kind, done, detail: as in fastconv.convert.Layer. A function in a forward has the path of the module whose
            forward it is, and the function's name for its kind.
        shape: of its output; None where it is not called by itself.
        choices: in training mode, forward and backward; empty where only torch's operators run.
        evaluation: of forward in evaluation mode without gradients.
    """

    path: str = ""
    kind: str = ""
    done: str = ""
    detail: str = ""
    shape: tuple[int, ...] | None = None
    choices: tuple[Choice, ...] = ()
    evaluation: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What `fastconv.explain` found; `str()` of it is a table.

    Attributes:
        model: its class.
        chip: what kernels were chosen for.
        example: shape and dtype of each tensor given.
        layers: in the order of named_modules.
        forwards: (path, reason) of modules whose forward is run layer by layer.
        copies: operands of fastconv's layers that lie otherwise than their kernels want.
        others: what no layer of the list does: linear layers, losses, functions, and the inputs that are saved.
        total: of all.
    """

    model: str
    chip: str
    example: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    forwards: tuple[tuple[str, str], ...]
    copies: tuple[LayoutCopy, ...]
    others: Figures
    total: Figures

    def table(self) -> str:
        """At most 160 columns: the layers, what was left alone and why, layout copies."""
        from fastconv.bench.explain_table import table

        return table(self)

    def __str__(self) -> str:
        return self.table()


def explain(model: nn.Module, example: Any, *, chip: str | None = None) -> Explanation:
    """What fastconv.convert makes of each layer of `model`, what then runs for it, and its costs before and after.

    A model that convert has not changed is explained as convert makes it by default; one that it has, as it is. 'Before' is
    what fastconv.restore makes of it. Both run a training step and the second an evaluation, on copies: parameters, buffers,
    modes and the state of random numbers stay what they are. What hooks and forwards do to other objects is done, though.
    Choices are those of the backend 'auto'.

    Args:
        model: any module.
        example: what it is called with: a tensor, a tuple of positional arguments or a dict of keywords. Where model and
            example lie on the meta device nothing is computed, and kernels are those for this machine's GPU or CPU.
        chip: whose kernels: a GPU's name and compute capability as tables are named by, or sm_80, sm_90, ...; nothing is
            computed then, and Triton has to be installed. By default the example's device, where both models are run.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: a model that has parameters without a shape yet, does not run on `example`, or, with `chip`, not
            without data.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> [(layer.kind, layer.done) for layer in explain(net, torch.randn(1, 3, 8, 8)).layers]
        [('Conv2d', 'fused'), ('ReLU', 'absorbed')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"explain: model has parameters without a shape ({lazy[0]}): call it once before")
    if chip is not None and tuning.capability(chip) is None and not is_cpu(chip):
        raise ValueError(f"explain: chip must be a name that ends in sm_80, sm_90, ..., or a CPU's ('cpu'), got {chip!r}")
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    device = next((t.device for t in (*tensors, *model.parameters())), torch.device("cpu"))
    simulated = chip is not None or device.type == "meta"
    if chip is None:
        chip = (
            backends.chip("cuda" if torch.cuda.is_available() else "cpu", 0)
            if simulated
            else backends.chip(device.type, device.index)
        )
    held = _on_meta if simulated else _apart
    cuda = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda), backends.use_backend("auto"):
        plain, ours, layers, reasons = _convert(model, held)
        with _simulation(chip) if simulated else contextlib.nullcontext():
            paths = [layer.path for layer in layers]
            evaluated = _run(ours, paths, example, held, training=False)
            stepped = _run(ours, paths, example, held, training=True)
            functions = [owner for owner in stepped.work if owner is not None and owner not in paths]
            original = _run(plain, paths, example, held, training=True, functions=functions)
            rows = _rows(layers, functions, original, stepped, evaluated)
    others = _figures(original.work.get(None, Work()), stepped.work.get(None, Work()))
    return Explanation(
        model=type(plain).__name__,
        chip=chip,
        example=tuple(f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for t in tensors),
        layers=rows,
        forwards=tuple((path, reason) for path, reason in reasons.items() if path not in paths),
        copies=tuple(dict.fromkeys(LayoutCopy(*copy) for copy in stepped.copies)),
        others=others,
        total=_sum([*rows, others]),
    )


def _convert(model: nn.Module, held: Callable[[Tensor], Tensor]) -> tuple[nn.Module, nn.Module, list[Layer], dict[str, str]]:
    """Copies of the restored and of the converted model, what became of each layer, and why there is no more to modules."""
    restored = restore(model)
    plain = copy_modules(restored, held)
    conversion = Conversion(copy_modules(restored, held), fuse=True, fold=True)
    found = before(conversion.model, conversion.shared)
    ours = conversion.model
    conversion.run()
    lay_out(ours, torch.channels_last)
    layers = conversion.report()
    if [*map(type, model.modules())] != [*map(type, restored.modules())]:
        ours = copy_modules(model, held)
        default = {layer.path: layer for layer in layers}
        layers = [_beside(layer, default[layer.path]) for layer in after(ours, found, conversion.reasons)]
    return plain, ours, layers, conversion.reasons


def _beside(layer: Layer, default: Layer) -> Layer:
    if layer[2:] == default[2:] or (layer.done == "left" and default.done == "left"):
        return layer
    return layer._replace(detail=f"{layer.detail}; by default {default.done}: {default.detail}".removeprefix("; "))


def _on_meta(tensor: Tensor) -> Tensor:
    return _as(tensor, torch.empty_like(tensor, device="meta"))


def _apart(tensor: Tensor) -> Tensor:
    return _as(tensor, tensor.detach().clone())


def _as(tensor: Tensor, made: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.detach().requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _simulation(chip: str) -> Iterator[None]:
    """On the meta device, as on `chip`."""
    try:
        triton_launch.kernels()
    except ImportError as error:
        raise ValueError(f"explain: chip={chip!r} needs Triton, whose launches are recorded ({error})") from error
    with backends.simulating(chip), triton_launch.recording(90):  # what is launched does not count
        yield


def _run(
    model: nn.Module,
    paths: list[str],
    example: Any,
    held: Callable[[Tensor], Tensor],
    *,
    training: bool,
    functions: Collection[str] = (),
) -> Recorder:
    """What the model does in a training step, or in the forward of an evaluation."""
    recorder = Recorder(model.train(training), paths, functions)
    example = tree_map(lambda leaf: held(leaf) if isinstance(leaf, Tensor) else leaf, example)
    recorder.note_inputs(example)
    args, kwargs = (), {}
    if isinstance(example, dict):
        kwargs = example
    else:
        args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    shapes = [list(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
    try:
        with torch.set_grad_enabled(training), recorder, saving() as storages:
            output = model(*args, **kwargs)
        recorder.note_saved(storages.values())
        storages.clear()
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if outputs:
            recorder.is_backward = True
            grads = [torch.ones_like(leaf) for leaf in outputs]
            recorder.note_inputs(grads, "loss")
            with recorder:
                torch.autograd.backward(outputs, grads)
    # Whatever a forward raises on an input that it was not written for.
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise ValueError(
            f"explain: the model does not run on example={shapes} in {mode} mode: {type(error).__name__}: {error}"
        ) from error
    return recorder


def _rows(
    layers: list[Layer], functions: list[str], original: Recorder, stepped: Recorder, evaluated: Recorder
) -> tuple[LayerReport, ...]:
    def row(key: str, layer: Layer) -> LayerReport:
        work = stepped.work.get(key, Work())
        plain = original.work.get(key, Work())
        return LayerReport(
            **vars(_figures(plain, work)),
            **layer._asdict(),
            shape=work.shape or plain.shape,
            choices=_choices(work),
            evaluation=_choices(evaluated.work.get(key, Work())),
        )

    rows = [row(layer.path, layer) for layer in layers]
    for key in functions:
        at, _, name = key.rpartition(".")
        found = row(key, Layer(at, name, "swapped", "a function in its forward"))
        inside = [i for i, other in enumerate(rows) if not at or other.path.startswith(f"{at}.")]
        rows.insert(inside[-1] + 1 if inside else len(rows), found)
    return tuple(rows)


def _figures(plain: Work, work: Work) -> Figures:
    return Figures(work.forward_flops, work.flops, plain.moved, work.moved, plain.saved, work.saved)


def _sum(parts: Collection[Figures]) -> Figures:
    return Figures(*(sum(getattr(part, field.name) for part in parts) for field in fields(Figures)))


def _choices(work: Work) -> tuple[Choice, ...]:
    return tuple(_choice(call, times) for call, times in work.calls.items())


def _choice(call: tuning.Call, times: int) -> Choice:
    device_type = "cpu" if tuning.capability(call.chip) is None else "cuda"
    refusals: list[str] = []
    for candidate in tuning.pick(*call):
        g = call.geometry
        refusal = backends.load(candidate.backend).supports(call.op, call.direction, g, call.policy, device_type)
        if candidate.kernel == cpu.AMX:
            refusal = refusal or native_amx.unavailable()
        if refusal is None:
            kernel = str(candidate._replace(backend="")).strip()
            reason = "; ".join([*refusals, tuning.explain(*call)])
            return Choice(call.op, call.direction, candidate.backend, kernel, reason, times)
        refusals.append(f"{candidate} cannot serve ({refusal})")
    raise RuntimeError(f"explain: no backend serves {call}")
