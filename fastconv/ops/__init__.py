"""The operators torch.ops.fastconv.*: importing this package defines them.

Operators carry plain integers and a backend request; `ConvGeometry.of` and `PoolGeometry.of` rebuild (and check) the
geometry from them in the implementation and in the fake alike. Nothing here is differentiable: see fastconv.autograd.
"""

from fastconv.ops import conv, flops, norm, pool

__all__ = ["conv", "flops", "norm", "pool"]
