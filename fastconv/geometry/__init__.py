"""Sizes and their rules: every output size, every check of an argument, FLOPs and bytes moved.

The only arithmetic on sizes in the project. A geometry is frozen, hashable and cached, so that operators can carry
plain integers and rebuild it in forward, fake and backward alike. Every error names the operator, the argument, what
was given and what is allowed, has the type that torch raises, and comes before anything is launched.
"""

from fastconv.geometry.arguments import (
    DTYPES,
    check_bool,
    check_divisor,
    check_floating,
    check_input,
    check_operand,
    check_residual,
    check_tensor,
    integer,
    memory_format,
    number,
    pair,
)
from fastconv.geometry.conv import ConvGeometry, conv_output_shape, conv_padding
from fastconv.geometry.norm import CHANNEL_OPERANDS, check_batch_norm, check_batch_norm_update, statistics_dtype
from fastconv.geometry.pool import PoolGeometry, global_pool, single_elements

__all__ = [
    "CHANNEL_OPERANDS",
    "DTYPES",
    "ConvGeometry",
    "PoolGeometry",
    "check_batch_norm",
    "check_batch_norm_update",
    "check_bool",
    "check_divisor",
    "check_floating",
    "check_input",
    "check_operand",
    "check_residual",
    "check_tensor",
    "conv_output_shape",
    "conv_padding",
    "global_pool",
    "integer",
    "memory_format",
    "number",
    "pair",
    "single_elements",
    "statistics_dtype",
]
