"""Which layers a model is built of."""

from __future__ import annotations

from torch import nn

from fastconv.convert import convert

LAYERS = ("fastconv", "torch")


def with_layers(model: nn.Module, layers: str, builder: str) -> nn.Module:
    """`model`, written in plain torch.nn, on the layers asked for.

    Raises:
        ValueError: `layers` is neither 'fastconv' nor 'torch'.
    """
    if layers not in LAYERS:
        raise ValueError(f"{builder}: layers must be one of {', '.join(map(repr, LAYERS))}, got layers={layers!r}")
    return convert(model, inplace=True) if layers == "fastconv" else model
