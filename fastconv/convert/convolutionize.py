"""Classifiers that run densely: Flatten and Linear become convolutions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastconv import nn as fast
from fastconv.convert import forwards
from fastconv.convert.dense import layers
from fastconv.convert.dense.edits import Convolve, Edit, Normalise2d, Spread
from fastconv.convert.dense.heads import Heads
from fastconv.convert.trees import copy_modules

_MODES = (True, False)  # training, evaluation


def convolutionize(
    model: nn.Module,
    input_size: int | Sequence[int],
    *,
    dense_max_pool: bool = False,
    average: bool = False,
) -> nn.Module:
    """The same classifier as a fully convolutional net, which scores every window of a larger image in one pass.

    The Linear behind a flatten becomes a convolution as large as the map that it reads, those behind it 1×1 convolutions
    (Sermanet et al., OverFeat, 2013, arXiv:1312.6229; Long et al., Fully convolutional networks, 2014, arXiv:1411.4038).
    At `input_size` the scores are the model's, as (N, classes, 1, 1). On larger images each output position is what the
    model's layers, applied densely, compute there. Without padding that is the model's score of one window of
    `input_size`, the next window being as many pixels on as the strides multiply to. With padding windows read their
    neighbours where the model reads zeros.

    Looked for in every forward, of Sequentials and of a net's own, in training and in evaluation: nn.Flatten, flatten, view,
    reshape or mean over (2, 3); behind it Linears, BatchNorm1d, softmax over classes, and functions element by element, as
    modules or not. All else stays, on the same Parameters and buffers, under the same names:

    - An adaptive pool on the one path to the flatten gets the fixed window that it has at `input_size`, and nothing is left
      of it where that is one element (AlexNet's and VGG's at 224). A global pool's window moves by 1. Adaptive pools aside
      of that path, as of squeeze-and-excitation, go on reading the whole map.
    - A forward that has to change, because it flattens by a function or calls one pool in several places, is generated for
      training and for evaluation; the module takes on a subclass of its class. Arguments that have defaults keep these.
    - A convolution's weight is a Parameter of its own, a view (O, C, H, W) of the Linear's, so that in-place changes of
      either show in both until one is moved or its strides change (a copy where the Linear's is not contiguous). An
      optimizer made for `model` does not see its gradient. All other Parameters are the model's own.
    - The keys of the state_dict are the model's, and its state_dict loads: load_state_dict of the result shapes the Linears'
      weights. The other way: `{key: value.reshape(own[key].shape) for key, value in dense.state_dict().items()}` with
      `own = model.state_dict()`.

    `fastconv.convert` of the result puts it on fastconv's layers.

    Args:
        model: any module that torch.fx can trace, with one image batch as its only required argument. It stays as it is.
        input_size: of the images that `model` classifies: an int for square ones, (H, W), or (C, H, W) where its first
            Conv2d does not tell the channels.
        dense_max_pool: the last max-pool before the head with a stride s above 1 gets stride 1, and all behind it dilation
            and padding s times theirs, so that scores lie s times as dense; every s-th, from the first, is the one without
            this option. At `input_size` there may be several positions, where that pool left rows or columns out.
        average: return the scores' mean over all positions, (N, classes).

    Shapes:
        input [N, C, H, W], both sizes at least `input_size`'s; output [N, classes, H', W'], or [N, classes] averaged, in
        each place of the model's output, which may be a tuple (auxiliary heads).

    Equal to:
        F.conv2d(map, linear.weight.view(O, C, H, W), linear.bias) for linear(torch.flatten(map, 1)) on (N, C, H, W) maps

    Raises:
        TypeError: `model` is not a torch.nn.Module, or input_size not of ints.
        ValueError: input_size is not positive, or the model does not run on it; the model cannot be traced; there is no
            Linear behind a flatten; a Linear reads something else, is called or read elsewhere, or has hooks or
            parametrizations; a layer has no dense form.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 10))
        >>> fastconv.convolutionize(net, 8)(torch.randn(1, 3, 20, 12)).shape
        torch.Size([1, 10, 13, 5])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convolutionize: model must be a torch.nn.Module, got {type(model).__name__}")
    size = _size(model, input_size)
    traced, example = _runnable(model, size)
    found = [_heads(traced.train(mode), example, dense_max_pool) for mode in _MODES]
    if not any(heads.first for heads, _ in found):
        raise ValueError(
            "convolutionize: nothing to make dense: no Linear comes behind a flatten of a (N, C, H, W) map, in training or "
            "evaluation"
        )
    edits, sites = _places(found)
    _check(model, found, edits)
    graphs = _forwards(traced, sites)
    if average:
        if not all(heads.scores.issuperset(_outputs(heads.graph)) for heads, _ in found):
            raise ValueError("convolutionize: average=True, but the model's output is more than scores")
        # A Sequential gets a last member instead, and stays one.
        if "" not in graphs and (type(model) not in (nn.Sequential, fast.ConvChain) or "average" in model._modules):
            graphs[""] = _own_graphs(traced, "")
        if "" in graphs:
            _average([heads for heads, _ in found], graphs[""])
    made = _build(model, edits, graphs, average)
    _check_runs(made, example)
    return made


def _size(model: nn.Module, input_size: int | Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W)."""
    values = list(input_size) if isinstance(input_size, Sequence) else [input_size, input_size]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"convolutionize: input_size must be an int, (H, W) or (C, H, W), got input_size={input_size!r}")
    if len(values) not in (2, 3) or min(values) < 1:
        raise ValueError(
            f"convolutionize: input_size must be a positive int, (H, W) or (C, H, W), got input_size={input_size!r}"
        )
    if len(values) == 2:
        convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        first = next(convs, None)
        if first is None:
            raise ValueError("convolutionize: the model has no Conv2d to tell the channels: give input_size as (C, H, W)")
        values.insert(0, first.in_channels)
    return (values[0], values[1], values[2])


def _runnable(model: nn.Module, size: tuple[int, int, int]) -> tuple[nn.Module, Tensor]:
    """A copy to trace and an input that it runs on: on the meta device, else with the model's data on its own."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if "forward" in vars(model):
        raise ValueError("convolutionize: the model's forward is patched onto the instance, and cannot be traced")
    for device in ("meta", None):
        try:
            traced = forwards.traceable_copy(model, device)
            # Two images: batch norms in training want more than one value of each channel.
            example = torch.zeros(2, *size, dtype=weight.dtype, device=device or weight.device)
            with torch.no_grad():
                traced.eval()(example)
        except Exception as error:
            failure = error
        else:
            return traced, example
    raise ValueError(
        f"convolutionize: the model does not run on images of size {size} (channels, height, width): {failure}"
    ) from failure


def _heads(traced: nn.Module, example: Tensor, dense_max_pool: bool) -> tuple[Heads, Counter[str]]:
    mode = "training" if traced.training else "evaluation"
    try:
        # On the meta device nothing is drawn; else dropouts must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            graph, calls = forwards.whole_graph(traced, example)
    except Exception as error:
        raise ValueError(f"convolutionize: torch.fx cannot trace the model in {mode}: {error}") from error
    return Heads(graph, traced, dense_max_pool), calls


# Where edits are made: in a module, for all of its calls, or at one call in a forward.

_Site = tuple[str, Any, int]  # op, target as its owner names it, the how-manieth such call


def _places(found: list[tuple[Heads, Counter[str]]]) -> tuple[dict[str, Edit], dict[str, list[dict[_Site, Edit]]]]:
    """Edits of modules by path, and edits of calls, for each mode, by the path of the module that makes them."""
    uses: dict[str, set[Edit | None]] = defaultdict(set)
    for heads, _ in found:
        for node in heads.graph.nodes:
            if node.op == "call_module":
                uses[str(node.target)].add(heads.edits.get(node))
    modules = {path: edit for path, (edit, *others) in ((p, tuple(e)) for p, e in uses.items()) if edit and not others}
    sites: dict[str, list[dict[_Site, Edit]]] = defaultdict(lambda: [{}, {}])
    for mode, (heads, calls) in enumerate(found):
        for node, at in _numbered(heads.graph.nodes):
            edit, owner = heads.edits.get(node), node.meta.get("owner", "")
            if edit is None or (node.op == "call_module" and str(node.target) in modules):
                continue
            if isinstance(edit, (Convolve, Normalise2d, Spread)):
                raise ValueError(
                    f"convolutionize: {heads.say(node)} is called in several places, which need different layers"
                )
            op, target, number = at
            if op == "call_module":
                _refuse_attached(heads.modules[target], target)
            if op == "call_module" and owner:
                if not str(target).startswith(f"{owner}."):
                    raise ValueError(f"convolutionize: {heads.say(node)} is called by {owner!r}, which it is no part of")
                target = str(target)[len(owner) + 1 :]
            if calls[owner] > 1:
                raise ValueError(f"convolutionize: {owner!r}, which calls {heads.say(node)}, is called in several places")
            sites[owner][mode][op, target, number] = edit
    return modules, dict(sites)


def _numbered(nodes: Any) -> Iterator[tuple[fx.Node, _Site]]:
    """Each node with its number among those that make the same call from the same forward."""
    seen: Counter[tuple[str, str, Any]] = Counter()
    for node in nodes:
        key = (node.meta.get("owner", ""), node.op, node.target)
        yield node, (node.op, node.target, seen[key])
        seen[key] += 1


def _check(model: nn.Module, found: list[tuple[Heads, Counter[str]]], edits: dict[str, Edit]) -> None:
    """Refuse what would be lost with a module that is replaced."""
    own = dict(model.named_modules(remove_duplicate=False))
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for heads, _ in found:
        read = {str(node.target) for node in heads.graph.nodes if node.op == "get_attr"}
        for path, edit in edits.items():
            module = own[path]
            if isinstance(edit, Convolve):
                shared = [name for name, p in module._parameters.items() if p is not None and holders[id(p)] > 1]
                shared += [name for name in module._parameters if f"{path}.{name}" in read]
                if shared:
                    raise ValueError(f"convolutionize: the {shared[0]} of Linear {path!r} is used elsewhere too")
            if not isinstance(edit, Spread):
                _refuse_attached(module, path)


def _refuse_attached(module: nn.Module, path: str) -> None:
    hooks = [name for name, value in vars(module).items() if name.endswith("_hooks") and value]
    if hooks or "forward" in vars(module):
        raise ValueError(f"convolutionize: {type(module).__name__} {path!r} has hooks or a forward patched onto it")


def _own_graphs(traced: nn.Module, path: str) -> list[fx.Graph]:
    """The graphs of one module's forward, for training and evaluation."""
    graphs = []
    for mode in _MODES:
        owner = traced.train(mode).get_submodule(path)
        known = set(dict(owner.named_parameters())) | set(dict(owner.named_buffers()))
        try:
            graph = forwards.own_graph(owner)
        except Exception as error:
            raise ValueError(
                f"convolutionize: torch.fx cannot trace the forward of {path or 'the model'!r}: {error}"
            ) from error
        if made := [node.target for node in graph.nodes if node.op == "get_attr" and node.target not in known]:
            raise ValueError(
                f"convolutionize: the forward of {path or 'the model'!r}, which has to change, makes a tensor of its own or "
                f"reads one that is no buffer ({made[0]})"
            )
        graphs.append(graph)
    return graphs


def _forwards(traced: nn.Module, sites: dict[str, list[dict[_Site, Edit]]]) -> dict[str, list[fx.Graph]]:
    """The edited graphs, for training and evaluation, of each module whose forward has to change."""
    made = {}
    for path, edits in sites.items():
        made[path] = _own_graphs(traced, path)
        for graph, wanted in zip(made[path], edits, strict=True):
            at = {site: node for node, site in _numbered(graph.nodes)}
            for site, edit in wanted.items():
                layers.rewrite_call(graph, at[site], edit, traced.get_submodule(path))
    return made


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return next(node for node in graph.nodes if node.op == "output").all_input_nodes


def _average(heads: list[Heads], graphs: list[fx.Graph]) -> None:
    """Let the model's own forward, in both modes, return means over H and W."""
    for mode, graph in zip(heads, graphs, strict=True):
        if len(_outputs(mode.graph)) != len(_outputs(graph)):
            raise ValueError("convolutionize: average=True, but the model's forward hands on a tuple that it does not make")
        layers.average_outputs(graph)


def _build(model: nn.Module, edits: dict[str, Edit], graphs: dict[str, list[fx.Graph]], average: bool) -> nn.Module:
    made = copy_modules(model)
    old = {path: made.get_submodule(path) for path in edits}
    new = {id(old[path]): layers.layer(old[path], edit) for path, edit in edits.items()}
    for module in list(made.modules()):
        for name, child in module._modules.items():
            module._modules[name] = new.get(id(child), child)
    for path, (training, evaluation) in graphs.items():
        forwards.set_forward(made.get_submodule(path), training, evaluation)
    if average and "" not in graphs:
        made.add_module("average", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).train(made.training))
    convolutions = {id(new[id(old[path])]) for path, edit in edits.items() if isinstance(edit, Convolve)}
    shapes = {
        f"{name}.weight": module.weight.shape
        for name, module in made.named_modules(remove_duplicate=False)
        if id(module) in convolutions
    }
    made.register_load_state_dict_pre_hook(layers.LoadLinear(shapes))
    return made


def _check_runs(made: nn.Module, example: Tensor) -> None:
    """Find code that takes what was flat for flat, such as hooks."""
    for mode in _MODES:
        try:
            copy = forwards.traceable_copy(made, "meta" if example.is_meta else None).train(mode)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                copy(example)
        except Exception as error:
            raise ValueError(f"convolutionize: the model has no dense form: made dense, it fails by {error}") from error
