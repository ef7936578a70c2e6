"""fastconv: fused convolution + bias + ReLU (+ max-pool) for PyTorch, forward and backward.

Triton kernels on a GPU, C++ on a CPU, plain torch wherever that is faster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastconv import functional, models, nn
from fastconv.backends import use_backend
from fastconv.convert import convert, convolutionize, freeze, restore
from fastconv.precision import get_precision, set_precision

if TYPE_CHECKING:
    from fastconv import train
    from fastconv.bench.explain import explain

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "convert",
    "convolutionize",
    "explain",
    "freeze",
    "functional",
    "get_precision",
    "models",
    "nn",
    "restore",
    "set_precision",
    "train",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`explain` and `train` load with their first use: nothing that measures or draws is there in a step of one's own."""
    if name == "explain":
        from fastconv.bench.explain import explain

        return explain
    if name == "train":
        return importlib.import_module("fastconv.train")
    raise AttributeError(f"module 'fastconv' has no attribute {name!r}")
