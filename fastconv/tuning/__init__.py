"""Which backend and kernel is the fastest for a shape: `pick`, and what it picks from."""

from __future__ import annotations

from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning.candidates import Candidate, capability, triton_candidates

__all__ = ["Candidate", "capability", "pick"]

_ATEN, _NATIVE, _TRITON = Candidate("aten"), Candidate("native"), Candidate("triton")


def pick(
    op: str,
    direction: str,
    geometry: ConvGeometry | PoolGeometry,
    policy: Policy,
    chip: str,
    channels_last: bool,
) -> tuple[Candidate, ...]:
    """Ways to run a call, in the order in which to try them.

    Args:
        op: the operator's name, as in torch.ops.fastconv.
        direction: 'forward', 'input_grad', 'weight_grad', 'bias_grad' or 'backward'.
        geometry: the call's sizes.
        policy: the call's arithmetic.
        chip: 'cpu', 'interpreter', or a GPU's name and compute capability ('NVIDIA H100 80GB HBM3 sm_90').
        channels_last: whether the operands lie as the kernels want them.

    A heuristic, not yet a table: fused kernels read and write NHWC, so that an NCHW call pays one more pass over its
    input and one over its output, as much as fusing bias, ReLU or pool saves; such calls stay with torch's own.
    """
    if chip == "cpu":
        return (_NATIVE, _ATEN) if channels_last else (_ATEN,)
    ours: tuple[Candidate, ...] = (_TRITON,)
    if isinstance(geometry, ConvGeometry) and direction in ("forward", "input_grad", "weight_grad"):
        ours = triton_candidates(op, direction, geometry, policy, chip)
    if not channels_last:
        return (_ATEN, *ours)
    return (*ours, _NATIVE, _ATEN)
