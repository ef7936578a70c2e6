"""What all builders share: which layers a model is built of, checks of sizes, He's initialisation."""

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


def require_positive(builder: str, **sizes: int) -> None:
    """Refuse sizes that make no layer.

    Raises:
        ValueError: one of `sizes` is below 1.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{builder}: {name} must be at least 1, got {name}={value}")


def initialise_he(model: nn.Module) -> None:
    """He initialisation (He et al., 2015, arXiv:1502.01852): each layer keeps the variance of its input."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
