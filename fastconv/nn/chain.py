"""Runs of convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastconv import functional
from fastconv.nn.conv import ConvReLU2d, ConvReLUMaxPool2d


class ConvChain(torch.nn.Sequential):
    """`torch.nn.Sequential` whose neighbouring ConvReLU2d and ConvReLUMaxPool2d run as one `functional.conv_chain`.

    Same constructor, keys, slices and results. Identities between two layers do not part them. A member is run by itself,
    with everything that its call implies, where it is of another class (a subclass or parametrized layer included), has
    hooks, a forward patched onto it or its class, or a padding_mode other than 'zeros'; and all members are while global
    hooks are registered and while torch.compile traces.

    Backward is one node of the graph: the gradients of all layers of a run arrive together (hooks of DDP's buckets too),
    and that of the output is held until then. Maps between two layers are nowhere to be seen, so none retains a gradient.
    Hooks that move saved tensors away (torch.autograd.graph.save_on_cpu) get each map by itself, but backward brings all
    those of a run back at once.

    Equal to:
        for module in self:
            input = module(input)
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or _has_any_global_hook():
            return cast(Tensor, super().forward(input))
        for part in self.parts(self):
            if len(part) == 1:
                input = part[0](input)
            else:
                input = functional.conv_chain(input, [cast(_Chainable, layer).layer() for layer in part])
        return input

    @staticmethod
    def parts(modules: Iterable[torch.nn.Module]) -> Iterator[list[torch.nn.Module]]:
        """`modules` as a ConvChain runs them: lists of the layers of a chain, and of one module that runs by itself."""
        layers: list[torch.nn.Module] = []
        for module in modules:
            if isinstance(module, torch.nn.Identity) and _is_nothing_but(module, torch.nn.Identity):
                continue
            if _is_chainable(module):
                layers.append(module)
                continue
            if layers:
                yield layers
            yield [module]
            layers = []
        if layers:
            yield layers


_Chainable = ConvReLU2d | ConvReLUMaxPool2d
# As the classes define them: a forward that is patched onto a class is found by the difference.
_FORWARDS: dict[type[torch.nn.Module], object] = {
    kind: kind.forward for kind in (torch.nn.Identity, ConvReLU2d, ConvReLUMaxPool2d)
}


def _is_chainable(module: torch.nn.Module) -> bool:
    return _is_nothing_but(module, ConvReLU2d, ConvReLUMaxPool2d) and module.padding_mode == "zeros"


def _is_nothing_but(module: torch.nn.Module, *kinds: type[torch.nn.Module]) -> bool:
    """Whether calling `module`, of exactly one of `kinds`, runs the forward of its class and nothing else."""
    kind = type(module)
    return kind in kinds and not (
        kind.forward is not _FORWARDS[kind]
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
