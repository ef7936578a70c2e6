"""3×3 convolutions by Winograd's F(4×4, 3×3) in float32, whatever the dtype in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.backends.native_conv3x3 import Conv3x3
from fastconv.backends.native_library import dense, kernel, library

KERNELS = Conv3x3("winograd")


def filters(weight: Tensor) -> Tensor | None:
    """A weight [K, C, 3, 3] transformed for the forwards, laid out for this process's instruction set.

    None for large weights: to read their transform from memory would take longer than to transform them again.
    """
    size = library().winograd_filters_size(weight.shape[1], weight.shape[0])
    if size == 0:
        return None
    transformed = weight.new_empty(size, dtype=torch.float32)
    kernel("winograd_filters")(dense(weight), transformed)
    return transformed
