"""A snapshot of a model for inference, with weights prepared."""

from __future__ import annotations

import copy

from torch import nn

from fastconv import nn as fast


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference on a CPU, in which what can be computed of weights beforehand is.

    Of each 3×3 convolution of fastconv.nn (stride 1, no dilation, one group) of up to 16,384 pairs of channels the copy
    holds the weight's transform for Winograd's algorithm, in float32 four times as many elements as the weight has, which
    spares each call that transform. (Larger ones are faster transformed again than read.)
    All else is a deep copy in evaluation mode, whose parameters require no gradient. Later changes of `model` do not show
    in it; weights of the copy that are written to do not either, until it is moved, cast or loaded.

    Args:
        model: on fastconv's layers, as from fastconv.convert or fastconv.models; those of torch.nn stay what they are.

    Returns:
        A new module with the same keys in its state_dict. Its frozen layers raise RuntimeError where a gradient is wanted.

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    Example:
        >>> net = fastconv.convert(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU()))
        >>> [type(layer).__name__ for layer in fastconv.freeze(net)]
        ['FrozenConv2d', 'Identity']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    frozen: dict[int, nn.Module] = {}  # a module in two places stays one
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and _is_frozen_by_itself(child):
                module.add_module(name, frozen.setdefault(id(child), fast.FrozenConv2d(child)))  # type: ignore[arg-type]
    return fast.FrozenConv2d(model) if _is_frozen_by_itself(model) else model  # type: ignore[arg-type]


def _is_frozen_by_itself(module: nn.Module) -> bool:
    """Nothing is attached to it, such as hooks or parametrizations, which would be lost."""
    state = vars(module)
    attached = any(hooks for name, hooks in state.items() if name.endswith("_hooks")) or "forward" in state
    return fast.FrozenConv2d.serves(module) and not attached and not module._modules
