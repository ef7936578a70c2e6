"""Fuse the chains of nn.Sequential containers, swap single layers elsewhere.

The fused module takes the convolution's place and torch.nn.Identity that of the ReLU and the pool, so every key of the
state_dict stays what it was. A layer is replaced only where nothing is attached to it and nobody else uses it: see
`_plain`. What cannot be seen from here is code that runs the members of a Sequential one by one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from torch import Tensor, nn

from fastconv import nn as fast
from fastconv.geometry import DTYPES

_M = TypeVar("_M", bound=nn.Module)


def convert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The same model on fastconv's layers: same outputs, names and Parameters.

    Inside a torch.nn.Sequential, Conv2d → ReLU (→ MaxPool2d) and BatchNorm2d → ReLU (→ MaxPool2d) become one fused
    module each, and where two convolutions of these follow each other the Sequential becomes a fastconv.nn.ConvChain;
    elsewhere a single Conv2d, MaxPool2d, AvgPool2d or AdaptiveAvgPool2d(1) becomes fastconv.nn's. Left as they are:
    subclasses of these (their forward is not known), modules with hooks, parametrizations or attributes of their own,
    one module used in several places, and weights of a dtype that fastconv does not serve. Converting twice changes
    nothing more.

    What replaces norms itself comes first: torch.nn.SyncBatchNorm.convert_sync_batchnorm, whose norms are left as they are,
    and the folding of norms into convolutions (torch.nn.utils.fusion.fuse_conv_bn_eval). Both take a fused norm for the
    BatchNorm2d that it is by isinstance, and would drop its ReLU and its pool without a word.

    Code that runs the members of a Sequential one by one, to take features between a convolution and its ReLU, sees
    the fused result there.

    Args:
        model: any module; layers are looked for in all of its submodules.
        inplace: replace layers in `model` itself; else a new tree of modules is made. Parameters and buffers are the
            same objects either way, so an optimizer or an exponential average keeps working.

    Returns:
        The converted model (`model` itself with inplace=True, unless `model` is one such layer).

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> [type(layer).__name__ for layer in convert(net)]
        ['ConvReLUMaxPool2d', 'Identity', 'Identity']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = _copy_modules(model)
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    shared = {identity for identity, count in uses.items() if count > 1}
    for module in list(model.modules()):
        if id(module) in shared:
            continue
        # `forward` may be a subclass's own, or patched onto the instance.
        if isinstance(module, nn.Sequential) and getattr(module.forward, "__func__", None) in _IN_ORDER:
            _fuse_chains(module, shared)
        for name, child in list(module.named_children()):
            module.add_module(name, _swapped(child, shared))
        _make_chain(module)
    return _swapped(model, shared)


def _fuse_chains(sequence: nn.Sequential, shared: Collection[int]) -> None:
    """Replace Conv2d or BatchNorm2d → ReLU (→ MaxPool2d) by a fused module followed by Identity, in `sequence` itself."""
    # Not named_children: it names a module that is used twice once, and others would seem to be neighbours.
    layers = [(name, layer) for name, layer in sequence._modules.items() if layer is not None]
    following = [*layers[2:], ("", nn.Identity())]
    for (first_at, first), (relu_at, second), (pool_at, third) in zip(layers, layers[1:], following, strict=False):
        fusable = _plain(first, nn.Conv2d, shared) or _plain(first, nn.BatchNorm2d, shared)
        relu = _plain(second, nn.ReLU, shared)
        if fusable is None or relu is None:
            continue
        pool = _plain(third, nn.MaxPool2d, shared)
        if pool is not None and pool.return_indices:
            pool = None
        sequence.add_module(first_at, _fused(fusable, pool))
        sequence.add_module(relu_at, nn.Identity().train(relu.training))
        if pool is not None:
            sequence.add_module(pool_at, nn.Identity().train(pool.training))


def _fused(first: nn.Conv2d | nn.BatchNorm2d, pool: nn.MaxPool2d | None) -> nn.Module:
    if pool is None:
        plain = fast.ConvReLU2d if isinstance(first, nn.Conv2d) else fast.BatchNormReLU2d
        return plain.from_torch(first)  # type: ignore[arg-type]
    pooling = fast.ConvReLUMaxPool2d if isinstance(first, nn.Conv2d) else fast.BatchNormReLUMaxPool2d
    return pooling.from_torch(
        first,  # type: ignore[arg-type]
        pool_kernel_size=pool.kernel_size,
        pool_stride=pool.stride,
        pool_padding=pool.padding,
        pool_dilation=pool.dilation,
        pool_ceil_mode=pool.ceil_mode,
    )


def _make_chain(module: nn.Module) -> None:
    """Make a plain Sequential in which fused layers follow each other a ConvChain.

    The object stays and takes on the class: its place in the model, keys, hooks and attributes, the root's identity
    with them, are what they were.
    """
    if type(module) is not nn.Sequential or "forward" in vars(module) or None in module._modules.values():
        return
    if any(len(part) > 1 for part in fast.ConvChain.parts(module)):
        module.__class__ = fast.ConvChain


def _swapped(module: nn.Module, shared: Collection[int]) -> nn.Module:
    """fastconv.nn's module for a single layer of torch.nn, or `module` itself."""
    make = _SWAPS.get(type(module))
    if make is None or _plain(module, type(module), shared) is None:
        return module
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)):
        return module
    return make(module)


def _plain(module: nn.Module, kind: type[_M], shared: Collection[int]) -> _M | None:
    """`module` where it is exactly of that kind, sits in one place, and nothing was attached to it; else None."""
    if not isinstance(module, kind) or type(module) not in _ATTRIBUTES or id(module) in shared:
        return None
    state = vars(module)
    if any(hooks for name, hooks in state.items() if name.endswith("_hooks")):
        return None
    if set(state) - _ATTRIBUTES[type(module)] or module._modules:
        return None
    if set(module._buffers) - _BUFFERS.get(type(module), frozenset()):
        return None
    if set(module._parameters) - {"weight", "bias"}:
        return None
    return module if all(p is None or p.dtype in DTYPES for p in module._parameters.values()) else None


def _copy_modules(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules that holds the very tensors of `model`."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        # Computed weights (the old weight_norm's) are plain attributes, and not leaves: deepcopy refuses those.
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


# What the constructors set on an instance, for each type that is known: other attributes are their owner's, and would
# be lost with the module. (On the meta device a convolution draws no random numbers.)
_ATTRIBUTES: dict[type[nn.Module], frozenset[str]] = {
    type(module): frozenset(vars(module))
    for module in (
        nn.Conv2d(1, 1, 1, device="meta"),
        fast.Conv2d(1, 1, 1, device="meta"),
        nn.BatchNorm2d(1, device="meta"),
        nn.ReLU(),
        nn.MaxPool2d(1),
        fast.MaxPool2d(1),
        nn.AvgPool2d(1),
        nn.AdaptiveAvgPool2d(1),
    )
}
# Forwards that run the members one behind the other.
_IN_ORDER = (nn.Sequential.forward, fast.ConvChain.forward)
_BUFFERS: dict[type[nn.Module], frozenset[str]] = {nn.BatchNorm2d: frozenset(nn.BatchNorm2d(1, device="meta")._buffers)}
_SWAPS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: fast.Conv2d.from_torch,
    nn.MaxPool2d: fast.MaxPool2d.from_torch,
    nn.AvgPool2d: fast.AvgPool2d.from_torch,
    nn.AdaptiveAvgPool2d: fast.GlobalAvgPool2d.from_torch,
}
