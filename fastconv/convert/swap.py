"""fastconv.convert: a walk over a model's modules that fuses what runs together and swaps what runs alone."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from fastconv.convert.chains import fuse_chains, make_chain
from fastconv.convert.layers import runs_in_order, swap, why_not
from fastconv.convert.match import Group, Matcher, swaps
from fastconv.convert.program import plain_class, subclass
from fastconv.convert.report import Layer, after, before
from fastconv.convert.restore import unchain, unwrite
from fastconv.convert.rewrite import Modes, Reads, Rewriting, Rewritten, Written, calls_view, write
from fastconv.convert.trace import Traced, Untraceable, required, trace
from fastconv.convert.trees import copy_modules

_log = logging.getLogger("fastconv")
_FORMATS = (torch.channels_last, torch.contiguous_format)


def convert(
    model: nn.Module,
    *,
    inplace: bool = False,
    memory_format: torch.memory_format | None = torch.channels_last,
    fuse: bool = True,
    fold_batch_norm: bool = True,
    example_inputs: Any = None,
) -> nn.Module:
    """The same model on fastconv's layers: same outputs, gradients, running statistics, names, keys and Parameters.

    A convolution, max-pool, average pool or AdaptiveAvgPool2d(1) of torch.nn becomes fastconv.nn's. With `fuse`, calls that
    follow each other run as one: convolution (→ BatchNorm2d) (→ residual added) → ReLU (→ max-pool), norm → ReLU (→
    max-pool), ReLU → max-pool.

    - In a torch.nn.Sequential the fused module takes the convolution's or the norm's place, and torch.nn.Identity that of
      the ReLU and the pool. The Sequential becomes a fastconv.nn.ConvChain where it gains by it.
    - A module with a forward of its own gets one written anew for it, from what torch.fx sees in training and in evaluation
      mode: its class becomes a subclass of what it was, and its convolutions fastconv.nn.Conv2d. Its other modules stay, and
      so do its other methods. The new forward runs for calls with Tensors for the required arguments alone, while the plain
      attributes that forward reads are what they were; any other call goes to the class's own forward. What it runs
      together is called one by one where a hook was added since.
    - What torch.fx does not see the whole of (control flow by data, attributes that forward changes, random numbers drawn in
      it, contexts, checkpoints) keeps its forward; its layers are swapped one by one.

    Left as they are: subclasses of these layers (their forward is not known), modules with hooks, parametrizations or
    attributes of their own, one module with parameters in several places, weights of a dtype that fastconv does not serve.
    `fastconv.explain` lists what became of each layer and why; a forward that could not be read is logged (level INFO of the
    logger fastconv). Converting twice changes nothing more. `fastconv.restore` is the way back.

    In evaluation mode, where nothing requires a gradient, norms are folded into the convolution's weight at each call, if
    that moves fewer bytes than a pass over the map; parameters are not touched.

    What replaces norms itself comes first: torch.nn.SyncBatchNorm.convert_sync_batchnorm, whose norms are left as they are,
    and the folding of norms into convolutions (torch.nn.utils.fusion.fuse_conv_bn_eval). Both take a fused norm for the
    BatchNorm2d that it is by isinstance, and would drop its ReLU and its pool without a word. Code that runs the members
    of a Sequential one by one, to take features between a convolution and its ReLU, sees the fused result there, and so does
    a hook that is set on the fused module. A forward that is set on a class later is not seen. `type(m) is torch.nn.Conv2d`
    holds no more, isinstance does.

    Args:
        model: any module; layers are looked for in all of its submodules.
        inplace: change `model` itself; else a new tree of modules is made. Parameters and buffers are the same objects
            either way, so an optimizer or an exponential average keeps working.
        memory_format: of 4-d parameters, torch.channels_last (which the kernels read) or torch.contiguous_format; None
            leaves them. The Parameters being shared, those of `model` change with it, in strides, not in values; no other
            thread may run it meanwhile.
        fuse: False swaps layers one by one and fuses nothing.
        fold_batch_norm: False never folds norms.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords. If given, the model runs on them
            before and after, in evaluation mode without gradients, and the results have to agree.

    Returns:
        The converted model, with inplace=True `model` itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: another memory_format; a model that does not run on example_inputs.
        RuntimeError: results on example_inputs differ. The model is then what it was, as after any other exception.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> [type(layer).__name__ for layer in convert(net)]
        ['ConvReLUMaxPool2d', 'Identity', 'Identity']
    """
    return convert_with_report(
        model,
        inplace=inplace,
        memory_format=memory_format,
        fuse=fuse,
        fold_batch_norm=fold_batch_norm,
        example_inputs=example_inputs,
    )[0]


def convert_with_report(
    model: nn.Module,
    *,
    inplace: bool = False,
    memory_format: torch.memory_format | None = torch.channels_last,
    fuse: bool = True,
    fold_batch_norm: bool = True,
    example_inputs: Any = None,
) -> tuple[nn.Module, list[Layer]]:
    """`convert`, and what became of each layer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if memory_format is not None and memory_format not in _FORMATS:
        allowed = ", ".join(map(str, _FORMATS))
        raise ValueError(f"convert: memory_format must be one of {allowed} or None, got {memory_format!r}")
    expected = None if example_inputs is None else _run(model, example_inputs)
    if not inplace:
        model = copy_modules(model)
    with _all_or_nothing(model):
        conversion = Conversion(model, fuse, fold_batch_norm, memory_format is torch.channels_last)
        conversion.run()
        if memory_format is not None:
            lay_out(model, memory_format)
        if example_inputs is not None:
            _compare(_run(model, example_inputs), expected)
        report = conversion.report()
        if all(layer.done == "left" for layer in report):
            why = "; ".join(sorted({f"{layer.kind}: {layer.detail}" for layer in report})) or "no convolution, norm or pool"
            warnings.warn(f"convert: nothing to swap in this model ({why})", stacklevel=3)  # which may raise
    return model, report


class Conversion:
    """One run of convert over a tree of modules, which it changes.

    Attributes:
        reasons: by path, why a module was not fused or not rewritten.
    """

    def __init__(self, model: nn.Module, fuse: bool, fold: bool, channels_last: bool = True) -> None:
        for module in model.modules():
            unwrite(module)
        self.model, self.fuse, self.fold, self.channels_last = model, fuse, fold, channels_last
        uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self.shared = {identity for identity, count in uses.items() if count > 1}
        self.sketch = copy_modules(model)  # to be traced, which may change it
        unchain(self.sketch)
        self.reasons: dict[str, str] = {}
        self._found = before(model, self.shared)
        self._claimed: set[int] = set()  # Sequentials whose members a forward above them calls

    def run(self) -> None:
        for path, module in list(self.model.named_modules()):
            if id(module) in self.shared:
                continue
            claimed = id(module) in self._claimed
            rewritten = self.fuse and not claimed and self._rewrite(path, module)
            if self.fuse and not claimed and not rewritten and runs_in_order(module):
                fuse_chains(cast(nn.Sequential, module), self.shared)
            for child in module.children():
                swap(child, self.shared)
            if self.fuse and not claimed and not rewritten:
                make_chain(module, self.fold)
        swap(self.model)

    def report(self) -> list[Layer]:
        return list(after(self.model, self._found, self.reasons))

    def _rewrite(self, path: str, module: nn.Module) -> bool:
        """Give `module` a forward with fused calls, if its own has any to fuse; whether that is so."""
        if not _has_own_forward(module):
            return False
        if parametrize.is_parametrized(module):  # whose end gives it the first of its class's bases
            self._report(path, "it is parametrized")
            return False
        modes: Modes = (None, None)
        reads = Reads(set(), set(), set())
        try:
            modes, reads = self._analyse(path, module)
        except Untraceable as error:
            if not runs_in_order(module):
                self._report(path, str(error))
        if modes == (None, None) and not (self.channels_last and calls_view(type(module))):
            return False
        try:
            module.__class__ = subclass(Rewritten, type(module))
        except Exception as error:  # of __init_subclass__ and metaclasses too, whatever these raise
            self._report(path, f"its class cannot be subclassed: {error}")
            return False
        arguments = () if modes == (None, None) else required(plain_class(module).forward)
        cast(Rewritten, module).rewriting = Rewriting.of(module, modes, arguments, reads)
        return True

    def _analyse(self, path: str, module: nn.Module) -> tuple[Modes, Reads]:
        """The forwards for training and evaluation, None where there is nothing to fuse, and what they read.

        Raises:
            Untraceable: there is a graph for neither.
        """
        modules = dict(module.named_modules(remove_duplicate=False))
        sketch = self.sketch.get_submodule(path)
        nested = {at for at, inner in modules.items() if at and self._may_inline(inner)}
        claimed: set[str] = set()
        if nested:
            for traced in self._trace(path, sketch, nested):
                for group in [] if traced is None else self._matcher(traced, modules).groups():
                    claimed |= _crossed(group, nested)
        if runs_in_order(module) and not claimed:
            return (None, None), Reads(set(), set(), set())
        modes: list[Written | None] = []
        reads = Reads(set(), set(), claimed)
        for traced in self._trace(path, sketch, frozenset(claimed)):
            modes.append(None)
            if traced is None:
                continue
            matcher = self._matcher(traced, modules)
            groups = list(matcher.groups())
            self.reasons |= {_join(path, at): reason for at, reason in matcher.reasons.items()}
            called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
            claimed |= {
                at for at in nested if any(inner.startswith(at + ".") for inner in called)
            }  # its members, one by one
            if groups or any(swaps(traced.graph)):
                modes[-1] = write(traced.graph, groups, self.fold)
                reads.names.update(traced.names)
                reads.globals.update(traced.globals)
        self._claimed |= {id(modules[at]) for at in claimed}
        return (modes[0], modes[1]), reads

    def _trace(self, path: str, sketch: nn.Module, inlined: Collection[str]) -> list[Traced | None]:
        """For training and for evaluation."""
        found: list[Traced | None] = []
        for training in (True, False):
            try:
                found.append(trace(sketch, training, [sketch.get_submodule(at) for at in inlined]))
            except Untraceable as error:
                if training is False and found == [None]:
                    raise
                self._report(path, f"in {'training' if training else 'evaluation'} mode {error}")
                found.append(None)
        return found

    def _matcher(self, traced: Traced, modules: dict[str, nn.Module]) -> Matcher:
        return Matcher(traced.graph, modules, lambda module: why_not(module, self.shared) is None, self.fold)

    def _may_inline(self, module: nn.Module) -> bool:
        attached = any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
        return runs_in_order(module) and id(module) not in self.shared and not attached

    def _report(self, path: str, reason: str) -> None:
        if path not in self.reasons:
            self.reasons[path] = reason
            _log.info("convert: %s runs layer by layer: %s", path or "the model", reason)


def _crossed(group: Group, nested: Collection[str]) -> set[str]:
    """The Sequentials among whose members some of the group's calls are, and not all."""
    around = [
        {at for at in nested if node.op == "call_module" and f"{node.target}".startswith(at + ".")} for node in group.nodes
    ]
    return set() if set.intersection(*around) else set.union(*around)


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path else inner


def _has_own_forward(module: nn.Module) -> bool:
    """Whether its forward may call layers that could be fused: torch's and fastconv's modules are leaves."""
    kind = type(module)
    return runs_in_order(module) or not kind.__module__.startswith(("torch.", "fastconv."))


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put the tree of modules back as it was if the block raises."""
    kept = [
        (module, type(module), dict(vars(module)), [(held, dict(held)) for held in _held(module)])
        for module in model.modules()
    ]
    laid = [(parameter, parameter.data) for parameter in _maps(model)]
    try:
        yield
    except BaseException:
        for module, kind, state, contents in kept:
            module.__class__ = kind
            for held, content in ((vars(module), state), *contents):
                held.clear()
                held.update(content)
        for parameter, data in laid:
            parameter.data = data
        raise


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _maps(model: nn.Module) -> Iterator[nn.Parameter]:
    yield from (parameter for parameter in model.parameters() if not is_lazy(parameter) and parameter.dim() == 4)


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Give 4-d parameters a memory format; they stay the same objects."""
    for parameter in _maps(model):
        parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _run(model: nn.Module, example_inputs: Any) -> list[Any]:
    """What a copy of the model gives in evaluation mode."""
    args, kwargs = (), {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else value for value in tree_leaves((args, kwargs))]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return tree_leaves(copy_modules(model, with_buffers=False).eval()(*args, **kwargs))
        except Exception as error:
            raise ValueError(f"convert: the model does not run on example_inputs={shapes}: {error}") from error


def _compare(actual: list[Any], expected: list[Any] | None) -> None:
    for ours, theirs in zip(actual, expected or [], strict=True):
        if isinstance(theirs, Tensor) and theirs.is_floating_point():
            bound = torch.finfo(theirs.dtype).eps ** 0.5
            wide = theirs.double()
            same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
            error = torch.inf
            if same:
                alike = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities have no difference
                rest = torch.where(alike, 0, ours.double() - wide)
                error = rest.norm() / torch.where(wide.isfinite(), wide, 0).norm().clamp_min(1e-30)
            if not error <= bound:
                raise RuntimeError(
                    f"convert: on example_inputs the converted model gives {tuple(ours.shape)} {ours.dtype}, relative error "
                    f"{float(error):.1e} (allowed: {bound:.1e}); the model is left as it was"
                )
