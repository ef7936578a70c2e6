"""Single layers: which are nothing but what their class says, and what stands for them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.utils import parametrize

from fastconv import nn as fast
from fastconv.geometry import DTYPES


def why_not(module: nn.Module, shared: Collection[int] = ()) -> str | None:
    """Why `module` cannot be replaced or run by the formula of its class; None where it can.

    Args:
        shared: identities of modules that sit in several places.
    """
    kind = type(module)
    if kind not in _ATTRIBUTES:
        if parametrize.is_parametrized(module):
            return "parametrized"
        known = next((base.__name__ for base in kind.__mro__ if base in _ATTRIBUTES), None)
        return "fastconv has none of its class" if known is None else f"a subclass of {known}, whose forward is not known"
    state = vars(module)
    if any(hooks for name, hooks in state.items() if name.endswith("_hooks")):
        return "it has hooks"
    if "forward" in state:
        return "a forward was set on the instance"
    if extra := set(state) - _ATTRIBUTES[kind]:
        return f"it has an attribute of its own, {min(extra)}"
    if module._modules or set(module._buffers) - _BUFFERS.get(kind, frozenset()):
        return "it holds modules or buffers of its own"
    if set(module._parameters) - {"weight", "bias"}:
        return "its weight is computed"
    unserved = [p.dtype for p in module._parameters.values() if p is not None and p.dtype not in DTYPES]
    if unserved:
        return f"fastconv does not serve {unserved[0]}"
    return "it sits in several places" if module._parameters and id(module) in shared else None


def swap(module: nn.Module, shared: Collection[int] = ()) -> None:
    """Make a single layer of torch.nn fastconv.nn's: the object stays, which others may hold, and takes on the class."""
    ours = SWAPS.get(type(module))
    if ours is None or why_not(module, shared) is not None:
        return
    if not isinstance(module, nn.AdaptiveAvgPool2d) or module.output_size in (1, (1, 1)):
        module.__class__ = ours


def runs_in_order(module: nn.Module) -> bool:
    """Whether its forward runs its members one behind the other; it may be a subclass's own, or set on the instance."""
    if not isinstance(module, nn.Sequential) or type(module).__iter__ is not nn.Sequential.__iter__:
        return False
    return getattr(module.forward, "__func__", None) in (nn.Sequential.forward, fast.ConvChain.forward)


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
_BUFFERS: dict[type[nn.Module], frozenset[str]] = {nn.BatchNorm2d: frozenset(nn.BatchNorm2d(1, device="meta")._buffers)}
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: fast.Conv2d,
    nn.MaxPool2d: fast.MaxPool2d,
    nn.AvgPool2d: fast.AvgPool2d,
    nn.AdaptiveAvgPool2d: fast.GlobalAvgPool2d,
}
