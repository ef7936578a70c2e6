"""Runs of convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastconv import functional
from fastconv.nn.conv import Conv2d, ConvReLU2d, ConvReLUMaxPool2d
from fastconv.nn.fused import folded_conv, folded_parameters, relu_and_pool
from fastconv.nn.norm import BatchNormReLU2d, BatchNormReLUMaxPool2d
from fastconv.nn.plain import is_nothing_but


class ConvChain(torch.nn.Sequential):
    """`torch.nn.Sequential` whose neighbouring ConvReLU2d and ConvReLUMaxPool2d run as one `functional.conv_chain`.

    A Conv2d and the batch normalisation behind it, with or without ReLU and pool, run as one convolution in evaluation mode
    where nothing requires a gradient, the norm folded into its weight at each call; `fold_batch_norm = False` keeps them
    apart.

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

    fold_batch_norm = True

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or _has_any_global_hook():
            return cast(Tensor, super().forward(input))
        for part in self.parts(self):
            if len(part) == 1:
                input = part[0](input)
            elif isinstance(part[1], torch.nn.BatchNorm2d):
                input = self._normalised(input, part[0], part[1])
            else:
                input = functional.conv_chain(input, [cast(_Chainable, layer).layer() for layer in part])
        return input

    def _normalised(self, input: Tensor, conv: torch.nn.Module, norm: torch.nn.BatchNorm2d) -> Tensor:
        folded = folded_parameters(input, conv, norm) if self.fold_batch_norm else None
        if folded is None:
            return cast(Tensor, norm(conv(input)))
        return folded_conv(input, cast(Conv2d, conv), *folded, *relu_and_pool(norm))

    @staticmethod
    def parts(modules: Iterable[torch.nn.Module]) -> Iterator[list[torch.nn.Module]]:
        """`modules` as a ConvChain runs them: the layers of a chain, a convolution and its norm, or one module by itself."""
        layers: list[torch.nn.Module] = []  # of a chain, or a Conv2d that waits for its norm
        for module in modules:
            if isinstance(module, torch.nn.Identity) and is_nothing_but(module, torch.nn.Identity):
                continue
            waiting = bool(layers) and type(layers[-1]) is Conv2d
            if waiting and is_nothing_but(module, *_NORMS):
                yield [*layers, module]
                layers = []
                continue
            chainable = _is_chainable(module)
            if layers and (waiting or not chainable):
                yield layers
                layers = []
            if chainable or is_nothing_but(module, Conv2d):
                layers.append(module)
            else:
                yield [module]
        if layers:
            yield layers


_Chainable = ConvReLU2d | ConvReLUMaxPool2d
_NORMS = (torch.nn.BatchNorm2d, BatchNormReLU2d, BatchNormReLUMaxPool2d)


def _is_chainable(module: torch.nn.Module) -> bool:
    return is_nothing_but(module, ConvReLU2d, ConvReLUMaxPool2d) and module.padding_mode == "zeros"
