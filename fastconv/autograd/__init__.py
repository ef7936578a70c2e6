"""Thin autograd Functions over the operators.

Every backward computes the needed gradients only, on the backend requested in forward, and reads only what forward saved:
a layer's input and weight, its output where ReLU masks, or the one-byte code where a pool follows. While a graph of the
backward is being built (create_graph=True, torch.func), the same gradients are expressed in differentiable torch ops.
"""

from fastconv.autograd import conv, norm, pool  # noqa: F401  (define the Functions and register them)
from fastconv.autograd.chain import ChainLayer, call_chain
from fastconv.autograd.conv import conv2d_prepared
from fastconv.autograd.core import ConvArgs, PoolArgs, call
from fastconv.autograd.norm import batch_norm_update

__all__ = ["ChainLayer", "ConvArgs", "PoolArgs", "batch_norm_update", "call", "call_chain", "conv2d_prepared"]
