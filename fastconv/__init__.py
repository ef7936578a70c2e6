"""fastconv: fused convolution + bias + ReLU (+ max-pool) for PyTorch, forward and backward.

Triton kernels on a GPU, C++ on a CPU, plain torch wherever that is faster.
"""

from fastconv import functional, models, nn
from fastconv.backends import use_backend
from fastconv.bench.explain import explain
from fastconv.convert import convert, convolutionize, freeze, restore
from fastconv.precision import get_precision, set_precision

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
    "use_backend",
]
