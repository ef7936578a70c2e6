"""Batch normalisation with residual, ReLU and max-pool: functionals, gradients, running statistics.

Its modules and their conversion are in test_norm_modules.py, its kernels in test_norm_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, ids
from tolerances import assert_close
from torch import Tensor
from torch.func import grad, jacrev, vmap

import fastconv
import fastconv.functional as FC
from fastconv import reference
from fastconv.backends import aten
from fastconv.geometry import PoolGeometry

POOLS: dict[str, dict[str, Any]] = {
    "2x2": {"kernel_size": 2},
    "2x2_ceil": {"kernel_size": 2, "ceil_mode": True},
    "3x3_s2_p1": {"kernel_size": 3, "stride": 2, "padding": 1},
}


@dataclass(frozen=True)
class NormCase:
    name: str
    input: tuple[int, int, int, int]
    pool: str = ""

    @property
    def count(self) -> int:
        """Values of a channel."""
        return self.input[0] * self.input[2] * self.input[3]


CASES = [
    NormCase("c8", (3, 8, 6, 6)),
    NormCase("c1_odd", (2, 1, 5, 3)),
    NormCase("c64", (2, 64, 4, 4)),
    NormCase("two_values", (1, 3, 2, 1)),
    NormCase("batch_only", (9, 8, 1, 1)),
    NormCase("c8_pool", (2, 8, 6, 4), "2x2"),
    NormCase("c5_pool_odd", (1, 5, 7, 5), "2x2"),
    NormCase("c40_pool_ceil", (1, 40, 5, 4), "2x2_ceil"),
    NormCase("c3_pool_3x3", (2, 3, 7, 6), "3x3_s2_p1"),
]
# training, affine, residual
SETTINGS = {"train": (True, True, True), "train_bare": (True, False, False), "eval": (False, True, False)}
MOMENTUM, EPS = 0.3, 1e-3


def runs() -> Iterator[Any]:
    """float16 differs from bfloat16 in the kernels' own conversions only.

    In the interpreter, whose kernels are tested in every dtype elsewhere, two cases stand for float16 and for NCHW.
    """
    for case in CASES:
        for backend in ("triton", "native", "aten"):
            for dtype in DTYPES if backend == "triton" else DTYPES[:2]:
                for layout in LAYOUTS if dtype == torch.float32 and backend != "native" else LAYOUTS[:1]:
                    usual = dtype != torch.float16 and layout is LAYOUTS[0]
                    slow = backend == "triton" and not usual and case.name not in ("c8", "c8_pool")
                    name = f"{case.name}-{ids(dtype)}-{backend}-{layout.id}"
                    yield pytest.param(case, dtype, backend, *layout.values, id=name, marks=[pytest.mark.slow] * slow)
        yield pytest.param(case, torch.float64, "auto", torch.channels_last, id=f"{case.name}-float64-auto")


def call(module: Any, pool: str, *args: Any, **settings: Any) -> Tensor:
    if not pool:
        return module.batch_norm_relu(*args, **settings)
    prefixed = {f"pool_{name}": value for name, value in POOLS[pool].items()}
    return module.batch_norm_relu_max_pool2d(*args, **settings, **prefixed)


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


def held(case: NormCase, output: Tensor, normalised: Tensor) -> Tensor:
    """The oracle's output with the winners and the signs of `output`, which rounding may have decided otherwise."""
    if not case.pool:
        return normalised * (output.detach() > 0)
    (code,) = (t for t in output.grad_fn.saved_tensors if t is not None and not t.is_floating_point())
    window = {"stride": 2, "padding": 0, "ceil_mode": False, **POOLS[case.pool]}
    sides = ((window[name], window[name]) for name in ("kernel_size", "stride", "padding"))
    pool = PoolGeometry.of("pool", case.input, *sides, (1, 1), window["ceil_mode"])
    winners = normalised.flatten(2).gather(2, aten.code_to_indices(code, pool).flatten(2))
    return winners.view(output.shape) * (code != 0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("case", "dtype", "backend", "layout"), list(runs()))
def test_values_and_gradients(
    case: NormCase, dtype: torch.dtype, backend: str, layout: torch.memory_format, setting: str, device: str
) -> None:
    training, affine, with_residual = SETTINGS[setting]
    channels = case.input[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(case.input, device=device) * 2 + 0.5).to(dtype).to(memory_format=layout).requires_grad_()
    residual = torch.randn(case.input, device=device).to(dtype).requires_grad_() if with_residual else None
    w, b, mean, var = (torch.randn(channels, device=device, dtype=wide) for _ in range(4))
    var = var.abs() + 0.5
    w, b = (w.requires_grad_(), b.requires_grad_()) if affine else (None, None)
    exact = [None if t is None else double(t).requires_grad_() for t in (x, w, b, residual)]
    exact_mean, exact_var = double(mean).clone(), double(var).clone()
    with fastconv.use_backend(backend):
        output = call(FC, case.pool, x, mean, var, w, b, training, MOMENTUM, EPS, residual=residual)
    plain = F.batch_norm(exact[0], exact_mean, exact_var, *exact[1:3], training, MOMENTUM, EPS)
    plain = plain if residual is None else plain + exact[3]
    expected = call(reference, case.pool, exact[0], None, None, *exact[1:3], True, 0, EPS, residual=exact[3])
    if not training:
        expected = call(reference, case.pool, exact[0], exact_mean, exact_var, *exact[1:3], residual=exact[3], eps=EPS)
    if training:
        batch_var, batch_mean = torch.var_mean(double(x), (0, 2, 3), correction=0)
    else:
        batch_var, batch_mean = exact_var, exact_mean
    # What rounding of the mean is to the deviation, and of terms of unit size to their sum.
    deviation = (batch_var + EPS).sqrt()
    digits = (1 + batch_mean.abs() / deviation).max().item()
    assert_close(output, expected, dtype, case.count, "output", scale=2 * digits)
    assert_close(mean, exact_mean, wide, case.count, "running_mean", scale=1)
    assert_close(var, exact_var, wide, case.count, "running_var", scale=1)
    assert output.is_contiguous(memory_format=layout)

    gradient = torch.randn_like(output)
    needed = [t for t in (x, w, b, residual) if t is not None]
    names = [
        name for name, t in zip(("input", "weight", "bias", "residual"), (x, w, b, residual), strict=True) if t is not None
    ]
    got = torch.autograd.grad(output, needed, gradient, retain_graph=True)  # for what it saved
    want = torch.autograd.grad(held(case, output, plain), [t for t in exact if t is not None], gradient.double())
    slope = ((1 if w is None else double(w).abs()) / deviation).max().item()
    scales = {"input": slope * digits, "weight": digits * case.count**0.5, "bias": case.count**0.5, "residual": 1}
    for name, actual, oracle, operand in zip(names, got, want, needed, strict=True):
        assert actual.dtype == operand.dtype
        # A gradient that overlapping windows share is rounded before it is summed.
        rounded = dtype if case.pool.startswith("3x3") else operand.dtype
        assert_close(actual.to(rounded), oracle, rounded, 2 * case.count, f"grad of {name}", scale=scales[name])
    assert got[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "native", "aten"])
@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_large_mean_costs_the_variance_no_digits(
    mean: float, backend: str, layout: torch.memory_format, device: str
) -> None:
    """E[x²] − E[x]² in float32 would leave no digit of a variance of 1."""
    x = (torch.randn(4, 8, 40, 41, device=device) + mean).to(memory_format=layout)
    running_mean, running_var = torch.zeros(8, device=device), torch.zeros(8, device=device)
    with fastconv.use_backend(backend):
        output = FC.batch_norm_relu(x, running_mean, running_var, training=True, momentum=1.0)
    assert_close(running_mean, x.double().mean((0, 2, 3)), torch.float32, 1 if backend == "triton" else 6560, "mean")
    assert_close(running_var, x.double().var((0, 2, 3)), torch.float32, 6560, "variance")
    # Against the mean as float32 holds it, half a unit of which is 3e-5 of the deviation; torch on a CPU computes
    # x · scale + shift, of two terms a thousand times the size.
    x, center = x.double(), running_mean.double().view(-1, 1, 1)
    expected = (x - center) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert_close(output, expected.relu(), torch.float32, 6560, "output", scale=1 if backend == "triton" else 1e3)


def exact_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers: many ties, with a channel and a corner that are negative throughout."""
    x = torch.randint(-4, 5, shape).to(dtype)
    x[:, 0] = -x[:, 0].abs() - 1
    x[..., :4, :4] = -2
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("odd", [False, True], ids=["finite", "nan_and_inf"])
@pytest.mark.parametrize("pool", ["", *POOLS])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=ids)
@pytest.mark.parametrize("backend", ["triton", "native", "aten"])
def test_exact_in_evaluation(backend: str, dtype: torch.dtype, pool: str, odd: bool) -> None:
    """Values, winners and gradients to the bit on numbers that need no rounding: ties, NaN and infinities."""
    if dtype == torch.float64 and backend != "aten":
        pytest.skip("float64 is served by aten")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = exact_values((2, 5, 9, 8), dtype), exact_values((2, 5, 9, 8), dtype)
    if odd:
        for operand in (x, residual):
            for value in (float("nan"), float("inf"), float("-inf")):
                operand[torch.rand(x.shape) < 0.04] = value
    mean, var = torch.tensor([0, 1, -1, 0, 2], dtype=wide), torch.tensor([1, 4, 1, 0.25, 1], dtype=wide)
    w, b = torch.tensor([1, -2, 0, 0.5, 1], dtype=wide), torch.tensor([0, 1, 0, -1, 2], dtype=wide)
    operands = [x.requires_grad_(), residual.requires_grad_()]
    exact = [double(t).requires_grad_() for t in operands]
    with fastconv.use_backend(backend):
        output = call(FC, pool, x, mean, var, w, b, eps=0.0, residual=residual)
    expected = call(reference, pool, exact[0], *map(double, (mean, var, w, b)), eps=0.0, residual=exact[1])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0, equal_nan=True)
    gradient = torch.randint(-4, 5, output.shape).to(dtype)
    got, want = torch.autograd.grad(output, operands, gradient), torch.autograd.grad(expected, exact, gradient.double())
    for actual, oracle in zip(got, want, strict=True):
        torch.testing.assert_close(actual.double(), oracle, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pool", ["", "2x2"])
@pytest.mark.parametrize("backend", ["triton", "native", "aten"])
def test_a_channel_with_nan_is_nan_in_training(backend: str, pool: str, value: float) -> None:
    """As torch's: the channel's statistics, outputs and gradients, and nothing of its neighbours'."""
    x = torch.randn(2, 9, 6, 6).to(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = value
    exact = x.double().requires_grad_()
    mean, var, w = torch.zeros(9), torch.ones(9), torch.randn(9)
    with fastconv.use_backend(backend):
        output = call(FC, pool, x.requires_grad_(), mean, var, w, training=True)
    expected = call(reference, pool, exact, None, None, w.double(), training=True)
    assert torch.equal(output.isnan(), expected.isnan())
    assert output[:, 3].isnan().all()
    assert mean[3].isfinite() == var[3].isfinite() == torch.tensor(False)
    assert mean.isfinite().sum() == var.isfinite().sum() == 8
    (got,) = torch.autograd.grad(output.sum(), x)
    (want,) = torch.autograd.grad(expected.sum(), exact)
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("backend", ["triton", "native", "aten"])
def test_any_strides_and_the_same_twice(backend: str) -> None:
    base = torch.randn(3 * 9 * 8 * 6 + 1)
    views = [
        base[1:].view(3, 9, 8, 6).permute(0, 3, 1, 2),  # not aligned to 16 bytes
        base[:-1].view(3, 6, 9, 8)[:, :, ::2, 1:],
        base[:-1].view(3, 9, 8, 6).permute(0, 3, 2, 1)[:, 1:],
        base[:8].view(1, 1, 1, 8).expand(2, 3, 4, 8),
    ]
    with fastconv.use_backend(backend):
        for view in views:
            x = view.detach().requires_grad_()
            w = torch.randn(2 * x.shape[1])[::2].requires_grad_()
            mean, var = torch.zeros(2, x.shape[1])[1], torch.ones(x.shape[1], 2)[:, 0]
            exact, exact_w = double(x).requires_grad_(), double(w).requires_grad_()
            pool = "" if 0 in view.stride() else "2x2"  # equal values may be rounded differently: no ties for the pool
            output = call(FC, pool, x, mean, var, w, training=True, residual=view)
            want = call(reference, pool, exact, None, None, exact_w, training=True, residual=exact.detach())
            assert_close(output, want, torch.float32, 200, scale=2)
            assert_close(var, 0.9 + 0.1 * double(x).var((0, 2, 3)), torch.float32, 200)
            gradient = torch.randn_like(output)
            got, again = (torch.autograd.grad(output, (x, w), gradient, retain_graph=True) for _ in range(2))
            assert all(map(torch.equal, got, again))
            want = torch.autograd.grad(want, (exact, exact_w), gradient.double())
            assert_close(got[0], want[0], torch.float32, 200, scale=1)
            assert_close(got[1], want[1], torch.float32, 200, scale=8)


@pytest.mark.parametrize("backend", ["auto", "triton", "aten"])
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch(training: bool, backend: str) -> None:
    x = torch.randn(0, 4, 6, 6, requires_grad=True)
    w = torch.randn(4, requires_grad=True)
    mean, var = torch.randn(4), torch.rand(4)
    before = mean.clone(), var.clone()
    with fastconv.use_backend(backend):
        output = FC.batch_norm_relu_max_pool2d(x, mean, var, w, training=training)
    assert output.shape == (0, 4, 3, 3)
    grad_x, grad_w = torch.autograd.grad(output.sum(), (x, w))
    assert grad_x.shape == x.shape
    assert torch.equal(grad_w, torch.zeros(4))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_on_a_cpu_native_serves_it() -> None:
    """Contiguous maps stay with torch's own passes, unless a pool follows: aten would have to compute its codes."""
    x = torch.randn(2, 8, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    for pool, operand, served in (("", last, "native"), ("", x, "aten"), ("2x2", last, "native"), ("2x2", x, "native")):
        fastconv.backends.chosen.clear()
        call(FC, pool, operand, None, None, training=True)
        assert fastconv.backends.chosen == {served}
    with fastconv.use_backend("native"), pytest.raises(RuntimeError, match=r"no kernels for torch\.float64"):
        FC.batch_norm_relu(x.double(), None, None, training=True)


NEEDS = {"input": (0,), "weight": (1,), "bias": (2,), "residual": (3,), "affine": (1, 2), "input_and_residual": (0, 3)}


@pytest.mark.parametrize("pool", ["", "2x2", "3x3_s2_p1"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("needs", NEEDS)
def test_only_needed_gradients(needs: str, backend: str, training: bool, pool: str) -> None:
    x, residual = (torch.randn(2, 5, 6, 7).to(memory_format=torch.channels_last) for _ in range(2))
    operands = [x, torch.randn(5), torch.randn(5), residual]
    mean, var = torch.randn(5), torch.rand(5) + 0.5

    def run() -> Tensor:
        with fastconv.use_backend(backend):
            return call(FC, pool, x, mean.clone(), var.clone(), *operands[1:3], training, residual=residual)

    for operand in operands:
        operand.requires_grad_()
    gradient = torch.randn_like(run())
    want = torch.autograd.grad(run(), operands, gradient)
    for index, operand in enumerate(operands):
        operand.requires_grad_(index in NEEDS[needs])
    output = run()
    reads_input = needs in ("weight", "bias", "affine") or (training and needs != "residual")
    assert (output.grad_fn.saved_tensors[0] is not None) == reads_input
    output.backward(gradient)
    for index, operand in enumerate(operands):
        assert (operand.grad is not None) == (index in NEEDS[needs])
        if operand.grad is not None:
            assert_close(operand.grad, want[index].double(), torch.float32, 84, needs, scale=1)


def statistics_like(w: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.arange(w.shape[0], dtype=w.dtype) / 4 - 0.25
    return mean, mean.abs() + 0.75


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "train": lambda F, x, w, b, r: F.batch_norm_relu(x, None, None, w, b, True, residual=r),
    "eval": lambda F, x, w, b, r: F.batch_norm_relu(x, *statistics_like(w), w, b, residual=r),
    "train_2x2": lambda F, x, w, b, r: F.batch_norm_relu_max_pool2d(x, None, None, w, b, True, residual=r),
    "eval_2x2": lambda F, x, w, b, r: F.batch_norm_relu_max_pool2d(x, *statistics_like(w), w, b, residual=r),
    "train_3x3": lambda F, x, w, b, r: F.batch_norm_relu_max_pool2d(
        x, None, None, w, b, True, residual=r, pool_kernel_size=3, pool_stride=2, pool_padding=1
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck(name: str) -> None:
    shapes = ((2, 3, 5, 4), (3,), (3,), (2, 3, 5, 4))
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(*args: Tensor) -> Tensor:
        return FUNCTIONS[name](FC, *args)

    assert torch.autograd.gradcheck(function, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)
    output = function(*args)
    gradient = torch.randn_like(output)
    plain = torch.autograd.grad(output, args, gradient, retain_graph=True)
    recorded = torch.autograd.grad(output, args, gradient, create_graph=True)
    for operand, got, want in zip(("input", "weight", "bias", "residual"), recorded, plain, strict=True):
        assert_close(got, want, torch.float64, 40, f"grad of {operand}", scale=1)


@pytest.mark.parametrize("name", ["train", "eval_2x2"])
def test_double_backward_behind_fused_kernels(name: str) -> None:
    x, w, b, r = torch.randn(2, 4, 6, 6).requires_grad_(), *(torch.randn(4) for _ in range(2)), torch.randn(2, 4, 6, 6)

    def penalty(F: Any, x: Tensor, *others: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(FUNCTIONS[name](F, x, *others).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    with fastconv.use_backend("triton"):
        got = penalty(FC, x, w, b, r)
    want = penalty(reference, x.detach().double().requires_grad_(), *(t.double() for t in (w, b, r)))
    assert_close(got, want, torch.float32, 4 * 72)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func(name: str) -> None:
    x, r = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64).unbind()
    w, b = torch.randn(2, 3, dtype=torch.float64).unbind()

    def loss(F: Any) -> Callable[..., Tensor]:
        return lambda w, b, x, r: FUNCTIONS[name](F, x, w, b, r).square().sum()

    for transform in (
        lambda f: grad(f, (0, 1, 2, 3))(w, b, x, r),
        lambda f: vmap(grad(f, (0, 1, 2)), (None, None, 0, 0))(w, b, x[:, None], r[:, None]),
        lambda f: jacrev(f, (0, 1))(w, b, x, r),
        lambda f: grad(lambda x: grad(f, 2)(w, b, x, r).square().sum())(x),
    ):
        for got, want in zip(transform(loss(FC)), transform(loss(reference)), strict=True):
            torch.testing.assert_close(got, want)
