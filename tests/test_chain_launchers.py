"""What the backward of a chain calls: input gradients that a ReLU below closes, launcher by launcher against float64."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, DTYPES, TRITON_CONVS, ConvCase, ids
from tolerances import assert_close

from fastconv import backends
from fastconv.backends import aten
from fastconv.bench.gate import may_transform
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *((backend, case) for backend in ("native", "aten") for case in CONVS if case.padding not in ("same", "valid")),
        *(("triton", case) for case in TRITON_CONVS if case.name in ("3x3", "3x3_s2_odd", "odd_channels")),
    ],
    ids=lambda value: value if isinstance(value, str) else ids(value),
)
def test_masked_input_gradients(backend: str, case: ConvCase, dtype: torch.dtype) -> None:
    stride, padding, dilation = ((v, v) if isinstance(v, int) else v for v in case.args[:3])
    g = ConvGeometry.of("conv", case.input, case.weight, None, stride, padding, dilation, case.groups)
    x, weight, grad = (
        torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
        for shape in (case.input, case.weight, g.output_shape)
    )
    x = x.relu()
    wide, policy = Policy(torch.float64), Policy(dtype)
    launchers = backends.load(backend)
    exact = aten.conv2d_input_grad(grad.double(), weight.double(), g, wide).masked_fill(x <= 0, 0)
    terms = g.taps * g.group_out_channels
    transformed = backend == "native" and may_transform("cpu", weight.shape[2:], stride)
    for masked, bias in (
        launchers.conv2d_input_grad_relu(grad, weight, x, g, policy, with_bias=True),
        launchers.conv2d_backward_relu(grad, x, weight, g, policy, with_bias=True)[::2],
        launchers.conv2d_input_grad_relu(grad, weight, x, g, policy, with_bias=False),
        launchers.conv2d_backward_relu(grad, x, weight, g, policy, with_bias=False)[::2],
    ):
        assert_close(masked, exact, dtype, terms, "masked", transformed=transformed)
        if bias is not None:
            # Terms are rounded before they are summed, and the sum once more; of one channel there is but one sum.
            scale = 2 * exact.square().sum((0, 2, 3)).mean().sqrt().item()
            assert_close(bias, exact.sum((0, 2, 3)), dtype, terms * g.batch * g.height * g.width, "bias", scale=scale)
    grad_weight = launchers.conv2d_backward_relu(grad, x, weight, g, policy, with_bias=True)[1]
    exact_weight = aten.conv2d_weight_grad(grad.double(), x.double(), g, wide)
    assert_close(grad_weight, exact_weight, dtype, g.out_pixels, "weight", transformed=transformed)
    assert bias is None
