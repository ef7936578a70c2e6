"""torch.nn.functional's convolution and pooling, and the fused ones: same argument names, order and defaults.

Common to all: `input` is (N, C, H, W) or, unbatched, (C, H, W); N may be 0; strides are free. dtypes are float64, float32,
bfloat16 and float16, the same for all operands unless autocast is on, which casts as it does for torch's own. The output
has the input's dtype, and lies channels_last if input or weight does, else contiguous. NaN and infinities propagate as in
torch. First and second derivatives work, and torch.func's transforms but those of forward mode (jvp, jacfwd, hessian), which
raise.

All raise TypeError for an argument of the wrong type and RuntimeError for a value that torch refuses too, for a dtype
that is not served, and where the backend named by `fastconv.use_backend` cannot serve the call.
"""

from fastconv.functional.conv import (
    ConvLayer,
    conv2d,
    conv2d_prepared,
    conv2d_relu,
    conv2d_relu_max_pool2d,
    conv_chain,
    prepare_conv2d,
)
from fastconv.functional.norm import batch_norm_relu, batch_norm_relu_max_pool2d
from fastconv.functional.pool import avg_pool2d, global_avg_pool2d, max_pool2d, relu_max_pool2d

__all__ = [
    "ConvLayer",
    "avg_pool2d",
    "batch_norm_relu",
    "batch_norm_relu_max_pool2d",
    "conv2d",
    "conv2d_prepared",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "conv_chain",
    "global_avg_pool2d",
    "max_pool2d",
    "prepare_conv2d",
    "relu_max_pool2d",
]
