"""A snapshot of a model for inference, with weights prepared."""

from __future__ import annotations

import copy

from torch import nn

from fastconv import nn as fast


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference on a CPU, in which what can be computed of weights beforehand is.

    Of each 3×3 convolution of fastconv.nn (stride 1, no dilation, one group) of up to 16,384 pairs of channels the copy
    holds the weight's transform for Winograd's algorithm, in float32 four times as many elements as the weight has, which
    spares each call that transform. (Larger ones are read about as slowly as they are transformed again.) All else is a
    deep copy in evaluation mode, whose parameters require no gradient. Later changes of `model` do not show in it. Do not
    write to weights of the copy: which calls read them, and which their transform, is not promised, until it is moved,
    cast or loaded.

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
            if child is not None:
                if id(child) not in frozen:
                    frozen[id(child)] = _frozen(child)
                module.add_module(name, frozen[id(child)])
    return _frozen(model)


def _frozen(module: nn.Module) -> nn.Module:
    """The module itself where nothing of it can be prepared, or where hooks or parametrizations on it would be lost."""
    state = vars(module)
    attached = any(hooks for name, hooks in state.items() if name.endswith("_hooks")) or "forward" in state
    if attached or module._modules or not fast.FrozenConv2d.serves(module):
        return module
    made = fast.FrozenConv2d(module)  # type: ignore[arg-type]
    return module if made.prepared is None else made
