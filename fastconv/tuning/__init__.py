"""Which backend is the fastest for a shape: tables and `pick`."""

from __future__ import annotations

from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy


def pick(
    op: str,
    direction: str,
    geometry: ConvGeometry | PoolGeometry,
    policy: Policy,
    chip: str,
    channels_last: bool,
) -> tuple[str, ...]:
    """Backends in the order in which to try them.

    Args:
        op: the operator's name, as in torch.ops.fastconv.
        direction: 'forward', 'input_grad', 'weight_grad', 'bias_grad' or 'backward'.
        geometry: the call's sizes.
        policy: the call's arithmetic.
        chip: 'cpu', or a GPU's name and compute capability.
        channels_last: whether the operands lie as the kernels want them.

    A heuristic, not yet a table: fused kernels read and write NHWC, so that an NCHW call pays one more pass over its
    input and one over its output, as much as fusing bias, ReLU or pool saves; such calls stay with torch's own, and so do
    grouped convolutions on a GPU, for which the Triton kernels are not yet made.
    """
    grouped = isinstance(geometry, ConvGeometry) and geometry.groups > 1
    if not channels_last or (grouped and chip != "cpu"):
        return ("aten",)
    if chip == "cpu":
        return ("native", "aten")
    return ("triton", "native", "aten")
