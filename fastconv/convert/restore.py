"""The way back from fastconv's layers to torch's."""

from __future__ import annotations

from torch import nn

from fastconv.convert.rewrite import Rewritten, plain_class


def unwrite(module: nn.Module) -> None:
    """Give a module whose forward was written anew its class back, and nothing else; others stay."""
    if isinstance(module, Rewritten):
        module.__class__ = plain_class(module)  # type: ignore[assignment]
        del module.rewriting
