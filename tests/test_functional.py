"""Every functional, forward and backward, on every backend, against the float64 oracle.

Gradients are compared with the masks and winners that the forward really chose: a value that rounds to the other side of
zero sends its gradient elsewhere, which says nothing about the backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, DTYPES, GPU_CONVS, LAYOUTS, POOLS, TRITON_CONVS, ConvCase, PoolCase, backends_for, ids, make
from tolerances import assert_close, bounds
from torch import Tensor

import fastconv
import fastconv.functional as FC
from fastconv import geometry, reference
from fastconv.bench.gate import may_transform

WINDOWS = {
    "2x2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "2x2_ceil": ((2, 2), (2, 2), (0, 0), (1, 1), True),
    "3x3_s2_p1": ((3, 3), (2, 2), (1, 1), (1, 1), False),
}


def conv_runs() -> Iterator[Any]:
    for case in CONVS:
        for dtype in (torch.float64, *DTYPES):
            for backend in backends_for(dtype):
                yield pytest.param(case, dtype, backend, id=f"{case.name}-{ids(dtype)}-{backend}")
    for case in TRITON_CONVS:
        for dtype in DTYPES[:2]:
            yield pytest.param(case, dtype, "triton", id=f"{case.name}-{ids(dtype)}-triton")


def laid_out(runs: Iterator[Any], rules: dict[str, Any] | None = None) -> Iterator[Any]:
    """The runs, each with every one of `rules`, in both layouts.

    Triton's interpreter takes float32 in channels_last and bfloat16 in the other layout, and windows of 256 positions, which
    are seconds each, once. The rest of its runs are slow tests: tests/test_triton_kernels.py has the kernels in every dtype.
    """
    for run, (name, rule), layout in itertools.product(runs, (rules or {"": None}).items(), LAYOUTS):
        case, dtype, backend = run.values
        (memory_format,) = layout.values
        wanted = (memory_format == torch.channels_last) == (dtype == torch.float32)
        if case.name == "window_of_256":
            wanted = wanted and dtype == torch.float32 and name in ("plain", "with_pad")
        marks = [pytest.mark.slow] if backend == "triton" and not wanted else []
        values = (case, dtype, backend, *(() if rules is None else (rule,)), memory_format)
        yield pytest.param(*values, id="-".join(filter(None, (run.id, name, layout.id))), marks=marks)


def gpu_conv_runs() -> Iterator[Any]:
    """What only a GPU is asked: every case on Triton, and real layers, which take several tiles of every kind."""
    cases = [case for case in CONVS if case not in TRITON_CONVS] + GPU_CONVS
    for case in cases:
        for dtype in DTYPES:
            yield pytest.param(case, dtype, "triton", id=f"{case.name}-{ids(dtype)}-triton")


def pool_runs() -> Iterator[Any]:
    for case in POOLS:
        for dtype in (torch.float64, *DTYPES):
            for backend in (*backends_for(dtype), *(("triton",) if dtype in DTYPES[:2] else ())):
                yield pytest.param(case, dtype, backend, id=f"{case.name}-{ids(dtype)}-{backend}")


class Conv:
    """One convolution's operands, in the tested dtype and in float64."""

    def __init__(self, case: ConvCase, dtype: torch.dtype, device: str, layout: torch.memory_format, backend: str) -> None:
        self.case, self.dtype, self.layout = case, dtype, layout
        stride = case.args[0] if isinstance(case.args[0], tuple) else (case.args[0],) * 2
        self.transformed = backend != "aten" and may_transform(device, case.kernel, stride)
        self.operands = [
            make(case.input, dtype, device, layout),
            make(case.weight, dtype, device, layout),
            make((case.out_channels,), dtype, device, torch.contiguous_format),
        ]
        self.exact = [t.detach().double().requires_grad_() for t in self.operands]
        self.pre = reference.conv2d(*self.exact, *case.args)
        self.out_pixels = self.pre.numel() // self.pre.shape[1]
        self.taps = case.kernel[0] * case.kernel[1]
        self.products = self.taps * case.input[1] // case.groups

    def check_grads(
        self,
        output: Tensor,
        grad: Tensor,
        exact_grad: Tensor,
        more: list[Tensor],
        tf32: bool,
        bias_grad: Tensor | None = None,
    ) -> None:
        """`exact_grad` is the float64 gradient of the convolution's output, masked as the forward chose."""
        expected = list(torch.autograd.grad(self.pre, self.exact, exact_grad, retain_graph=True))
        if bias_grad is not None:
            expected[2] = bias_grad
        back = self.taps * self.case.out_channels // self.case.groups
        rows = zip(
            ("input", "weight", "bias"), self.operands, expected, (back, self.out_pixels, self.out_pixels), strict=True
        )
        wanted = [row for row in rows if row[1].requires_grad]
        grads = torch.autograd.grad(output, [*(operand for _, operand, _, _ in wanted), *more], grad)
        for (name, _, want, products), got in zip(wanted, grads, strict=False):
            is_bias = name == "bias"
            transformed = self.transformed and not is_bias
            assert_close(got, want, self.dtype, products, f"grad of {name}", tf32 and not is_bias, transformed=transformed)
        for got in grads[len(wanted) :]:
            assert_close(got, exact_grad, self.dtype, 1, "grad of residual")


def check_layout(output: Tensor, *operands: Tensor) -> None:
    assert output.is_contiguous(memory_format=geometry.memory_format(*operands))


LAID_OUT = {
    "contiguous": torch.empty(2, 3, 4, 5),
    "channels_last": torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one_channel": torch.empty(2, 1, 4, 5),
    "one_channel_last": torch.empty(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "one_pixel": torch.empty(2, 3, 1, 1),
    "one_pixel_last": torch.empty(2, 3, 1, 1).to(memory_format=torch.channels_last),
    "one_value_each": torch.empty(4, 1, 1, 1),
    "expanded_channels": torch.empty(2, 1, 4, 5).expand(2, 3, 4, 5),
    "expanded_last": torch.empty(2, 1, 4, 5).to(memory_format=torch.channels_last).expand(2, 3, 4, 5),
    "expanded_batch_last": torch.empty(1, 3, 4, 5).to(memory_format=torch.channels_last).expand(2, 3, 4, 5),
    "expanded_map": torch.empty(2, 3, 1, 1).expand(2, 3, 4, 5),
    "one_number": torch.empty(1, 1, 1, 1).expand(2, 3, 4, 5),
    "sliced_last": torch.empty(2, 6, 4, 5).to(memory_format=torch.channels_last)[:, ::2],
    "transposed": torch.empty(2, 3, 5, 4).transpose(2, 3),
    "swapped": torch.empty(3, 2, 4, 5).transpose(0, 1),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_memory_format_is_the_one_torch_takes(name: str) -> None:
    """Average pooling of one element keeps what torch holds to be the input's memory format."""
    x = LAID_OUT[name]
    wanted = F.avg_pool2d(x, 1)
    assert FC.avg_pool2d(x, 1).stride() == wanted.stride()
    assert torch.empty(x.shape, memory_format=geometry.memory_format(x)).stride() == wanted.stride()
    weight = torch.empty(2, x.shape[1], 1, 1)
    assert FC.conv2d(x, weight).stride() == F.conv2d(x, weight).stride()


def tf32(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" and dtype == torch.float32


@pytest.mark.parametrize(("case", "dtype", "backend", "layout"), list(laid_out(conv_runs())))
def test_conv2d(case: ConvCase, dtype: torch.dtype, backend: str, layout: torch.memory_format, device: str) -> None:
    conv = Conv(case, dtype, device, layout, backend)
    with fastconv.use_backend(backend):
        output = FC.conv2d(*conv.operands, *case.args)
    assert_close(output, conv.pre, dtype, conv.products, "output", tf32(device, dtype), transformed=conv.transformed)
    check_layout(output, *conv.operands[:2])
    grad = torch.randn_like(output)
    conv.check_grads(output, grad, grad.double(), [], tf32(device, dtype))
    for alone in conv.operands[:2]:  # a backend may compute both gradients at once otherwise than one
        for operand in conv.operands:
            operand.requires_grad_(operand is alone)
        with fastconv.use_backend(backend):
            output = FC.conv2d(*conv.operands, *case.args)
        conv.check_grads(output, grad, grad.double(), [], tf32(device, dtype))


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "with_residual", "layout"), list(laid_out(conv_runs(), {"plain": False, "residual": True}))
)
def test_conv2d_relu(
    case: ConvCase, dtype: torch.dtype, backend: str, with_residual: bool, layout: torch.memory_format, device: str
) -> None:
    conv = Conv(case, dtype, device, layout, backend)
    residual = make(tuple(conv.pre.shape), dtype, device, layout) if with_residual else None
    with fastconv.use_backend(backend):
        output = FC.conv2d_relu(*conv.operands, *case.args, residual=residual)
    exact = conv.pre if residual is None else conv.pre + residual.double()
    assert_close(output, F.relu(exact), dtype, conv.products, "output", tf32(device, dtype), transformed=conv.transformed)
    check_layout(output, *conv.operands[:2])
    grad = torch.randn_like(output)
    masked = grad.double() * (output > 0)
    conv.check_grads(output, grad, masked, [] if residual is None else [residual], tf32(device, dtype))


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "pool", "layout"), list(laid_out(conv_runs(), {name: name for name in WINDOWS}))
)
def test_conv2d_relu_max_pool2d(
    case: ConvCase, dtype: torch.dtype, backend: str, pool: str, layout: torch.memory_format, device: str
) -> None:
    conv = Conv(case, dtype, device, layout, backend)
    window = WINDOWS[pool]
    names = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "pool_ceil_mode")
    with fastconv.use_backend(backend):
        output = FC.conv2d_relu_max_pool2d(*conv.operands, *case.args, **dict(zip(names, window, strict=True)))
    exact = F.max_pool2d(F.relu(conv.pre), *window)
    assert_close(output, exact, dtype, conv.products, "output", tf32(device, dtype), transformed=conv.transformed)
    check_layout(output, *conv.operands[:2])

    code = saved_code(output)
    indices = torch.ops.fastconv.max_pool2d_indices(code, conv.pre.shape, *window).flatten(2)
    open_ = code != 0
    assert torch.equal(open_, output > 0), "the code says closed exactly where the output is zero"
    winners = conv.pre.flatten(2).gather(2, indices).view_as(exact)
    allowed = bounds(dtype, conv.products, tf32(device, dtype), conv.transformed)
    assert_winner_is_maximum(winners[open_], exact[open_], allowed)

    grad = torch.randn_like(output)
    spread = torch.zeros_like(conv.pre).flatten(2)
    spread.scatter_add_(2, indices, (grad.double() * open_).flatten(2))
    # Overlapping windows' shares are summed and stored in the tensor's dtype; the bias gradient sums them as they came.
    stored = spread.view_as(conv.pre).to(dtype).double()
    conv.check_grads(output, grad, stored, [], tf32(device, dtype), bias_grad=spread.sum((0, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype", "backend"), list(gpu_conv_runs()))
def test_on_a_gpu(case: ConvCase, dtype: torch.dtype, backend: str) -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        test_conv2d(case, dtype, backend, layout, "cuda")
        test_conv2d_relu(case, dtype, backend, True, layout, "cuda")
        test_conv2d_relu_max_pool2d(case, dtype, backend, "2x2", layout, "cuda")


def saved_code(output: Tensor) -> Tensor:
    """The code that autograd keeps for backward: the only integer tensor it saved."""
    node = output.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    (code,) = (t for t in node.saved_tensors if t is not None and not t.is_floating_point())
    return code


def assert_winner_is_maximum(winner: Tensor, maximum: Tensor, allowed: tuple[float, float, float]) -> None:
    """A winner may differ from the oracle's only among values that rounding cannot tell apart."""
    if winner.numel() == 0:
        return
    relative, absolute, _ = allowed
    scale = maximum.square().mean().sqrt()
    assert (maximum - winner <= 2 * (relative * maximum.abs() + absolute * scale)).all()


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "relu", "layout"), list(laid_out(pool_runs(), {"plain": False, "relu": True}))
)
def test_max_pool2d(
    case: PoolCase, dtype: torch.dtype, backend: str, relu: bool, layout: torch.memory_format, device: str
) -> None:
    """Values, indices and gradients to the bit, with ties, NaN and infinities among the values."""
    x = torch.randint(-4, 5, case.input, device=device).to(dtype)  # small integers: many ties
    for value in (float("nan"), float("inf"), float("-inf")):
        x[torch.rand(case.input, device=device) < 0.05] = value
    x[0, 0] = float("-inf")
    x = x.to(memory_format=layout).requires_grad_()
    # Contiguous: of channels_last windows with nothing above -inf torch's CUDA kernel tells an index that is not theirs.
    exact = x.detach().double().contiguous().requires_grad_()
    expected, indices = F.max_pool2d(F.relu(exact) if relu else exact, *case.args, return_indices=True)
    with fastconv.use_backend(backend):
        if relu:
            output = FC.relu_max_pool2d(x, *case.args)
        else:
            output, got_indices = FC.max_pool2d(x, *case.args, return_indices=True)
            assert torch.equal(got_indices, indices)
    assert_close(output, expected, dtype, 1, "output")
    check_layout(output, x)
    assert saved_code(output).dtype == (torch.int32 if case.name == "window_of_256" else torch.uint8)
    grad = torch.randint(-8, 9, output.shape, device=device).to(dtype)  # sums of small integers are exact in any order
    (got,) = torch.autograd.grad(output, x, grad)
    (want,) = torch.autograd.grad(expected, exact, grad.double())
    assert torch.equal(got.double(), want)
    check_layout(got, output)


@pytest.mark.parametrize(("dtype", "large"), [(torch.bfloat16, 256), (torch.float16, 2048)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["aten", "native", "triton"])
def test_shares_of_overlapping_windows_are_rounded_once(backend: str, dtype: torch.dtype, large: int, device: str) -> None:
    """Nine windows with one winner: in the tensor's own dtype, `large` + 1 would stay `large` eight times."""
    x = torch.zeros(1, 8, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    x[:, :, 1, 1] = 1
    grad = torch.ones_like(x)
    grad[:, :, 0, 0] = large
    with fastconv.use_backend(backend):
        output = FC.max_pool2d(x.requires_grad_(), 3, 1, 1)
    (got,) = torch.autograd.grad(output, x, grad)
    assert (got[:, :, 1, 1] == large + 8).all()


@pytest.mark.parametrize("backend", ["aten", "native", "triton"])
def test_a_window_without_a_pixel_has_no_winner(backend: str, device: str) -> None:
    """Dilation steps over the whole map; torch returns an index that lies outside it."""
    x = torch.randn(1, 2, 4, 4, device=device).to(memory_format=torch.channels_last).requires_grad_()
    with fastconv.use_backend(backend):
        output, indices = FC.max_pool2d(x, 2, 1, 1, 5, return_indices=True)
    assert torch.equal(output, torch.full_like(output, float("-inf")))
    assert (saved_code(output) == 0).all()
    assert ((indices >= 0) & (indices < 16)).all()
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.zeros_like(x))


RULES = {"with_pad": (True, None), "without_pad": (False, None), "divisor": (True, 3)}


def averaged_runs() -> Iterator[Any]:
    """Average pooling has no dilation."""
    return (run for run in pool_runs() if run.values[0].dilation == 1)


@pytest.mark.parametrize(("case", "dtype", "backend", "rule", "layout"), list(laid_out(averaged_runs(), RULES)))
def test_avg_pool2d(
    case: PoolCase,
    dtype: torch.dtype,
    backend: str,
    rule: tuple[bool, int | None],
    layout: torch.memory_format,
    device: str,
) -> None:
    x = make(case.input, dtype, device, layout)
    exact = x.detach().double().requires_grad_()
    args = (case.kernel_size, case.stride, case.padding, case.ceil_mode, *rule)
    expected = reference.avg_pool2d(exact, *args)
    with fastconv.use_backend(backend):
        output = FC.avg_pool2d(x, *args)
    positions = 49 if case.name == "whole_map" else 256
    assert_close(output, expected, dtype, positions, "output")
    check_layout(output, x)
    grad = torch.randn_like(output)
    (got,) = torch.autograd.grad(output, x, grad)
    (want,) = torch.autograd.grad(expected, exact, grad.double())
    assert_close(got, want, dtype, positions, "grad of input")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "native", "aten", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=ids)
@pytest.mark.parametrize("shape", [(2, 5, 7, 7), (3, 64, 4, 4), (1, 33, 1, 1), (2, 8, 30, 21)], ids=str)
def test_global_avg_pool2d(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str, layout: torch.memory_format, device: str
) -> None:
    if dtype == torch.float64 and backend in ("triton", "native"):
        pytest.skip("float64 is served by aten")
    x = make(shape, dtype, device, layout)
    exact = x.detach().double().requires_grad_()
    expected = reference.global_avg_pool2d(exact)
    with fastconv.use_backend(backend):
        output = FC.global_avg_pool2d(x)
    assert_close(output, expected, dtype, shape[2] * shape[3], "output")
    grad = torch.randn_like(output)
    (got,) = torch.autograd.grad(output, x, grad)
    (want,) = torch.autograd.grad(expected, exact, grad.double())
    assert_close(got, want, dtype, 1, "grad of input")
