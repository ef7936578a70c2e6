"""What autograd promises beyond a gradient: second derivatives, torch.func, checkpointing, autocast, frugality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import make
from tolerances import assert_close
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastconv
import fastconv.functional as FC
from fastconv import reference
from fastconv.geometry import ConvGeometry

X, W, B = (2, 4, 7, 6), (6, 2, 3, 3), (6,)


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "conv2d": (lambda x, w, b: FC.conv2d(x, w, b, (2, 1), (1, 0), groups=2), (X, W, B)),
    "conv2d_relu": (
        lambda x, w, b, r: FC.conv2d_relu(x, w, b, 1, 1, 1, 2, residual=r),
        (X, W, B, (2, 6, 7, 6)),
    ),
    "conv2d_relu_max_pool2d": (lambda x, w, b: FC.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2), (X, W, B)),
    "conv2d_relu_max_pool2d_3x3": (
        lambda x, w, b: FC.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, pool_kernel_size=3, pool_stride=2, pool_padding=1),
        (X, W, B),
    ),
    "max_pool2d": (lambda x: FC.max_pool2d(x, 3, 2, 1), (X,)),
    "relu_max_pool2d": (lambda x: FC.relu_max_pool2d(x, 2, ceil_mode=True), (X,)),
    "avg_pool2d": (lambda x: FC.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (X,)),
    "global_avg_pool2d": (FC.global_avg_pool2d, (X,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    args = doubles(*shapes)
    assert torch.autograd.gradcheck(function, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)
    # gradgradcheck holds the second derivative against the first: that one has to be right while it is recorded, too.
    output = function(*args)
    weights = torch.randn_like(output)
    plain = torch.autograd.grad(output, args, weights, retain_graph=True)
    recorded = torch.autograd.grad(output, args, weights, create_graph=True)
    for name, got, want in zip(("input", "weight", "bias", "residual"), recorded, plain, strict=False):
        assert_close(got, want, torch.float64, 9 * 8 * 9 * 8, f"grad of {name}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    args = doubles(*shapes)
    output = function(*args)
    several = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(output, args, several, retain_graph=True, is_grads_batched=True)
    for i, gradient in enumerate(several):
        for got, want in zip(batched, torch.autograd.grad(output, args, gradient, retain_graph=True), strict=True):
            assert_close(got[i], want, torch.float64, 2 * 7 * 6 * 9)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_double_backward_on_every_backend(backend: str) -> None:
    """A gradient penalty: float32, channels_last, through fused kernels forward and differentiable torch ops back."""
    x, w = (make(s, torch.float32, "cpu", torch.channels_last) for s in ((2, 8, 8, 8), (8, 8, 3, 3)))

    def penalty(F: Any, x: Tensor, w: Tensor) -> Tensor:
        y = F.conv2d_relu_max_pool2d(x, w, None, 1, 1)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)[0]

    with fastconv.use_backend(backend):
        got = penalty(FC, x, w)
    want = penalty(reference, *(t.detach().double().requires_grad_() for t in (x, w)))
    assert_close(got, want, torch.float32, 9 * 8 * 9 * 8)


def test_torch_func() -> None:
    x, w, b = (t.detach() for t in doubles(X, W, B))

    def loss(F: Any) -> Callable[..., Tensor]:
        return lambda w, b, x: F.global_avg_pool2d(F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2)).square().sum()

    for transform in (
        lambda f: grad(f, (0, 1))(w, b, x),
        lambda f: vmap(grad(f, (0, 1)), (None, None, 0))(w, b, x),
        lambda f: jacrev(f)(w, b, x),
        lambda f: grad(lambda w: grad(f)(w, b, x).square().sum())(w),
    ):
        for got, want in zip(transform(loss(FC)), transform(loss(reference)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"])
def test_compiled_torch_func(name: str) -> None:
    """Dynamo inlines a Function where it sees nothing that requires grad: the operator must keep the gradient itself."""
    x, w = torch.randn(X), torch.randn(6, 4, 3, 3)

    def gradient(F: Any) -> Callable[[Tensor], Tensor]:
        return lambda w: grad(lambda w: getattr(F, name)(x, w).square().sum())(w)

    want = gradient(reference)(w)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(gradient(FC), backend=backend, fullgraph=True)(w), want)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_an_exported_program_trains(layout: torch.memory_format) -> None:
    net = fastconv.models.recipe_net(8, width=8, max_width=8).to(memory_format=layout)
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    program = torch.export.export(net, (x,)).module()
    wanted = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    got = torch.autograd.grad(program(x).square().sum(), list(program.parameters()))
    for traced, eager in zip(got, wanted, strict=True):  # a chain and its layers one by one sum biases in different order
        assert_close(traced, eager.double(), torch.float32, x.numel())


def test_a_direct_call_of_an_operator_is_differentiable() -> None:
    x, w, _ = (make(s, torch.float32, "cpu", torch.channels_last) for s in (X, (6, 4, 3, 3), (1, 1, 1, 1)))
    output = torch.ops.fastconv.conv2d_relu(x, w, None, None, [1, 1], [1, 1], [1, 1], 1, "native")
    got = torch.autograd.grad(output.square().sum(), (x, w))
    wanted = torch.autograd.grad(FC.conv2d_relu(x, w, None, 1, 1).square().sum(), (x, w))
    assert all(map(torch.equal, got, wanted))


def test_forward_mode_raises_and_drops_nothing() -> None:
    x, w = torch.randn(X), torch.randn(6, 4, 3, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode), pytest.raises(NotImplementedError):
                FC.conv2d(dual, w)
        with pytest.raises(NotImplementedError):
            torch.ops.fastconv.conv2d(dual, w, None, [1, 1], [1, 1], [1, 1], 1, "auto")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("weight_layout", [torch.channels_last, torch.contiguous_format])
def test_weight_gradients_lie_as_weights_do(kernel: int, weight_layout: torch.memory_format) -> None:
    """Buckets of DistributedDataParallel and fused optimizers compare strides."""
    module = fastconv.nn.Conv2d(8, 16, kernel).to(memory_format=weight_layout)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(module(x).sum(), module.weight)
    assert gradient.stride() == module.weight.stride()


def test_functional_call_of_a_module() -> None:
    module = fastconv.nn.ConvReLU2d(4, 6, 3, padding=1).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    (x,) = doubles(X)
    per_sample = vmap(grad(lambda p, x: functional_call(module, p, x[None]).square().sum()), (None, 0))(params, x.detach())
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    args = [make(s, torch.float32, "cpu", torch.contiguous_format) for s in (X, W, B)]

    def f(*a: Tensor) -> Tensor:
        return FC.conv2d_relu_max_pool2d(*a, 1, 1, 1, 2).square().sum()

    want = torch.autograd.grad(f(*args), args)
    checkpoint(f, *args, use_reentrant=reentrant).backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(args, want, strict=True))


@pytest.mark.parametrize(
    ("needs", "saved", "convolutions"),
    [
        ((False, True, True), (True, False), 1),
        ((True, False, False), (False, True), 1),
        ((False, False, True), (False, False), 0),
    ],
    ids=["first_layer", "frozen", "bias_only"],
)
@pytest.mark.parametrize("name", ["conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"])
def test_only_needed_gradients(name: str, needs: tuple[bool, ...], saved: tuple[bool, bool], convolutions: int) -> None:
    args = [
        make(s, torch.float32, "cpu", torch.channels_last if len(s) == 4 else torch.contiguous_format) for s in (X, W, B)
    ]
    for t, need in zip(args, needs, strict=True):
        t.requires_grad_(need)
    output = getattr(FC, name)(*args, 1, 1, 1, 2)
    assert tuple(t is not None for t in output.grad_fn.saved_tensors[:2]) == saved
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    one = ConvGeometry.of(name, X, W, B, (1, 1), (1, 1), (1, 1), 2).flops()
    assert counter.get_total_flops() == convolutions * one
    assert all((t.grad is not None) == need for t, need in zip(args, needs, strict=True))


def test_pool_saves_one_byte_an_element() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    output = FC.max_pool2d(x, 2)
    assert [(t.dtype, t.shape) for t in output.grad_fn.saved_tensors] == [(torch.uint8, output.shape)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch(dtype: torch.dtype) -> None:
    x, w, b = (
        make(s, torch.float32, "cpu", torch.channels_last if len(s) == 4 else torch.contiguous_format) for s in (X, W, B)
    )
    residual = torch.randn(2, 6, 7, 6)
    with torch.autocast("cpu", dtype):
        output = FC.conv2d_relu(x, w, b, 1, 1, 1, 2, residual=residual)
        plain = torch.nn.functional.conv2d(x, w, b, 1, 1, 1, 2)
        pooled, plain_pooled = FC.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2)
        double = FC.conv2d(*(t.double() for t in (x, w, b)), 1, 1, 1, 2)
    assert output.dtype == plain.dtype == dtype
    assert pooled.dtype == plain_pooled.dtype
    assert double.dtype == torch.float64
    rounded = [t.detach().to(dtype).double() for t in (x, w, b)]
    want = reference.conv2d_relu(*rounded, 1, 1, 1, 2, residual=residual.to(dtype).double())
    assert_close(output, want, dtype, 18)
    output.sum().backward()
    assert [t.grad.dtype for t in (x, w, b)] == [torch.float32] * 3
    with torch.autocast("cpu", dtype):  # an operator called directly is not cast, nor is anything within it
        for backend in ("aten", "native"):
            direct = torch.ops.fastconv.conv2d(x, w, b, [1, 1], [1, 1], [1, 1], 2, backend)
            assert direct.dtype == torch.float32


def test_nan_and_infinity_propagate_as_in_torch() -> None:
    x = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 4, 4] = float("nan"), float("inf")
    w = torch.randn(8, 8, 1, 1)
    for backend in ("native", "aten", "triton"):
        with fastconv.use_backend(backend):
            for name in ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"):
                got, want = getattr(FC, name)(x, w), getattr(reference, name)(x.double(), w.double())
                assert torch.equal(got.isnan(), want.isnan()), (backend, name)
                assert torch.equal(got.isinf(), want.isinf()), (backend, name)


def test_backend_of_the_forward_serves_the_backward() -> None:
    x, w = (make(s, torch.float32, "cpu", torch.channels_last) for s in (X, W))
    with fastconv.use_backend("aten"):
        output = FC.conv2d_relu(x, w, None, 1, 1, 1, 2)
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith("fastconv"):
                calls.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Watch():
        output.sum().backward()
    assert calls == ["aten"] * 2


@pytest.mark.parametrize("backend", ["auto", "aten", "native", "triton"])
def test_strides_empty_batches_and_unbatched(backend: str) -> None:
    base = torch.randn(4, 10, 9, 4)
    views = [
        base.permute(0, 3, 1, 2),
        base.permute(0, 3, 2, 1),
        base.permute(0, 3, 1, 2)[::2],
        base.permute(0, 3, 1, 2)[..., ::2, 1:],
        base[:, :1, :1].permute(0, 3, 1, 2).expand(4, 4, 8, 8),
    ]
    w, b = torch.randn(6, 2, 3, 3), torch.randn(6)
    with fastconv.use_backend(backend):
        for x in views:
            for name in ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"):
                got = getattr(FC, name)(x, w, b, 1, 1, 1, 2)
                want = getattr(reference, name)(x.double(), w.double(), b.double(), 1, 1, 1, 2)
                assert_close(got, want, torch.float32, 18, name)
            assert torch.equal(FC.max_pool2d(x, 2), reference.max_pool2d(x, 2))
        empty = torch.randn(0, 4, 8, 8, requires_grad=True)
        weight = w.clone().requires_grad_()
        for name, shape in (("conv2d_relu", (0, 6, 8, 8)), ("conv2d_relu_max_pool2d", (0, 6, 4, 4))):
            output = getattr(FC, name)(empty, weight, b, 1, 1, 1, 2)
            assert output.shape == shape
            gx, gw = torch.autograd.grad(output.sum(), (empty, weight))
            assert gx.shape == empty.shape
            assert torch.equal(gw, torch.zeros_like(weight))
        for function in (lambda x: FC.max_pool2d(x, 2), lambda x: FC.avg_pool2d(x, 2), FC.global_avg_pool2d):
            torch.autograd.grad(function(empty).sum(), empty)
        x3, residual = torch.randn(4, 8, 8), torch.randn(6, 8, 8)
        output = FC.conv2d_relu(x3, w, b, 1, 1, 1, 2, residual=residual)
        want = reference.conv2d_relu(*(t.double() for t in (x3, w, b)), 1, 1, 1, 2, residual=residual.double())
        assert_close(output, want, torch.float32, 18)
        pooled, indices = FC.max_pool2d(x3, 2, return_indices=True)
        assert all(map(torch.equal, (pooled, indices), reference.max_pool2d(x3, 2, return_indices=True)))
        assert FC.global_avg_pool2d(x3).shape == (4, 1, 1)


LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_vmap_over_weights(kernel: int, layout: str) -> None:
    """An ensemble on one batch, whose weights have the batch's dimension first, last or in the middle."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    w = torch.randn(5, 4, 3, kernel, kernel, dtype=torch.float64)
    for dim in (0, 2, 4):
        stacked = w.movedim(0, dim)
        for ours, theirs in ((FC.conv2d, F.conv2d), (FC.conv2d_relu, lambda x, w: F.conv2d(x, w).relu())):
            for transform in (
                lambda f, d=dim: vmap(f, (None, d)),
                lambda f, d=dim: vmap(grad(lambda x, w: f(x, w).square().sum(), (0, 1)), (None, d)),
            ):
                torch.testing.assert_close(transform(ours)(x, stacked), transform(theirs)(x, stacked))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_over_pools(layout: str) -> None:
    x = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64)
    x = x.flatten(0, 1).to(memory_format=LAYOUTS[layout]).unflatten(0, (3, 2))
    for ours, theirs in (
        (lambda x: FC.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
        (FC.global_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, 1)),
        (lambda x: FC.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
    ):
        for transform in (vmap, lambda f: vmap(grad(lambda x: f(x).square().sum()))):
            torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))
