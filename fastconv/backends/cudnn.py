"""cuDNN's convolution with bias and ReLU in one kernel: which calls it may run, and whether it keeps NaN."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import backends, tuning
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy, torchs_convolution
from fastconv.tuning import fused

# What may change cuDNN's engine: device, arithmetic, torch.backends.cudnn.benchmark, window. Each is tried once.
_answers: dict[tuple[int | None, Policy, bool, fused.Window], bool] = {}
_LARGEST_SIDE = 512  # of the map on which a window is tried
_MORE_OUTPUTS = 8  # than those that read a given pixel, a side of that map

_log = logging.getLogger("fastconv")
_noted: set[str] = set()  # what is in the log


def conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry) -> Tensor:
    """relu(conv2d(x, weight, bias) + residual) in one kernel."""
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
    return torch.ops.aten.cudnn_convolution_add_relu(
        x, weight, residual, 1.0, bias, g.stride, g.padding, g.dilation, g.groups
    )


def fuses(device: torch.device, g: ConvGeometry, policy: Policy) -> bool:
    """Whether `conv2d_relu` may run a channels_last call on `device`; tuning is told what was found.

    The first call of a kind tries it, but not while a stream is captured: the result is read back.
    """
    if device.type != "cuda" or torch.version.hip is not None or not fused.suits(g, policy):
        return False
    switches = torch.backends.cudnn
    if not switches.enabled or torch.are_deterministic_algorithms_enabled() or switches.deterministic:
        found = False  # the fused operators take no such wish
    else:
        key = (device.index, policy, switches.benchmark, fused.window(g))
        known = _answers.get(key)
        if known is None and torch.cuda.is_current_stream_capturing():
            if "capture" not in _noted:
                _noted.add("capture")
                _log.info("cuDNN's convolution with ReLU is not used in a capture for windows never run before it")
            return False
        if known is None:
            outside = (torch.no_grad(), torch.autocast("cuda", enabled=False), torch.cuda.device(device))
            with outside[0], outside[1], outside[2], torchs_convolution(policy, "cuda"):
                known = _answers[key] = keeps_nan(conv2d_relu, device, policy.dtype, g)
        found = known
    tuning.note_fused(backends.chip("cuda", device.index), g, policy, found)
    return found


def keeps_nan(conv2d_relu: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, like: ConvGeometry) -> bool:
    """Whether conv2d_relu(x, weight, bias, residual, geometry) gives NaN where torch's ReLU does, and only there.

    It is tried with the window of `like` on a small map of 32 channels. cuDNN's ReLU is told nothing of NaN, and without a
    residual its kernel reads the uninitialised output, times zero: memory full of NaN is freed before the call, for the
    allocator to hand out again.
    """
    kernel, stride, padding, dilation = fused.window(like)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sides = [2 * span + _MORE_OUTPUTS * s for span, s in zip(spans, stride, strict=True)]
    if max(sides) > _LARGEST_SIDE:
        return False
    g = ConvGeometry.of("conv2d_relu", (2, 32, *sides), (32, 32, *kernel), None, stride, padding, dilation, 1)
    # The pixel under the middle tap of the middle window.
    row = g.out_height // 2 * g.stride_h - g.pad_h + (g.kernel_height - 1) // 2 * g.dilation_h
    column = g.out_width // 2 * g.stride_w - g.pad_w + (g.kernel_width - 1) // 2 * g.dilation_w
    x = torch.ones(g.input_shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    x[0, :, row, column] = float("nan")
    weight = torch.full(g.weight_shape, 0.5, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    weight[::2] = -0.5
    bias = torch.full((32,), 0.25, dtype=dtype, device=device)
    for residual in (None, torch.ones(g.output_shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)):
        expected = F.conv2d(x, weight, bias, stride, padding, dilation)
        expected = (expected if residual is None else expected + residual).relu_()
        garbage = torch.full_like(expected, float("nan"))
        del garbage
        try:
            output = conv2d_relu(x, weight, bias, residual, g)
        except RuntimeError as error:
            _log.info("cuDNN's convolution with ReLU is not used for %s on %s: %s", dtype, device, error)
            return False
        if not torch.allclose(output, expected, rtol=0.02, atol=0.02, equal_nan=True):
            _log.info("cuDNN's convolution with ReLU is not used for %s on %s: it does not keep NaN", dtype, device)
            return False
    return True
