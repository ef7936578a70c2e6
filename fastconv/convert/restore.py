"""The way back from fastconv's layers to torch's."""

from __future__ import annotations

from torch import nn

from fastconv import nn as fast
from fastconv.convert.layers import SWAPS, runs_in_order
from fastconv.convert.program import plain_class
from fastconv.convert.rewrite import Rewritten
from fastconv.convert.trees import copy_modules

_POOLING = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "pool_ceil_mode")
_PLAIN = {ours: plain for plain, ours in SWAPS.items()}
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    fast.ConvReLU2d: nn.Conv2d,
    fast.ConvReLUMaxPool2d: nn.Conv2d,
    fast.BatchNormReLU2d: nn.BatchNorm2d,
    fast.BatchNormReLUMaxPool2d: nn.BatchNorm2d,
}


def restore(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model on torch's layers and with its own forwards, as it was before fastconv.convert.

    Modules take their former classes back, with hooks and all else that was attached to them since; ReLUs, pools and norms
    that had been absorbed return to their places. Parameters and buffers are the same tensors; their memory format stays.
    What convert did not make stays: a fused module of fastconv.nn written by hand has no torch layer that does the same, and
    neither has a frozen one.

    Args:
        model: any module; one that was never converted comes back as it is.
        inplace: change `model` itself; else a new tree of modules is made around the same tensors.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = copy_modules(model)
    for module in list(model.modules()):
        unwrite(module)
        if runs_in_order(module):
            _unfuse(module)
        if type(module) in _PLAIN:
            _become(module, _PLAIN[type(module)])
    unchain(model)
    return model


def unchain(model: nn.Module) -> None:
    """Let Sequentials run their members one by one."""
    for module in model.modules():
        if isinstance(module, fast.ConvChain):
            _become(module, nn.Sequential if type(module) is fast.ConvChain else plain_class(module))
            vars(module).pop("fold_batch_norm", None)


def unwrite(module: nn.Module) -> None:
    """Give a module whose forward was written anew its class back, and nothing else; others stay."""
    if isinstance(module, Rewritten):
        _become(module, plain_class(module))
        del vars(module)["rewriting"]


def _unfuse(sequence: nn.Module) -> None:
    """Take the fused modules of a Sequential apart."""
    fused: nn.Module | None = None
    for name, member in list(sequence._modules.items()):
        if member is not None and "absorbed" in vars(member):
            (absorbed,) = vars(member)["absorbed"]
            sequence.add_module(name, absorbed.train(member.training))
            if fused is not None and type(fused) in _FUSED:
                _become(fused, _FUSED[type(fused)])
                for setting in _POOLING:
                    vars(fused).pop(setting, None)
        else:
            fused = member


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
