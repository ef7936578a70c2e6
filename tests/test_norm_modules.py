"""BatchNormReLU2d, BatchNormReLUMaxPool2d, their conversion, tracing and errors, against torch.nn.BatchNorm2d."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor, nn

import fastconv
import fastconv.functional as FC
from fastconv import convert
from fastconv import nn as fast

SETTINGS = [
    {},
    {"momentum": None},
    {"momentum": 1.0, "eps": 1e-2},
    {"momentum": 0.0},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def shaken(module: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With parameters and buffers that no default would give."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name) is not None:
                getattr(module, name).uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("backend", ["auto", "triton", "aten"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["relu", "pool"])
def test_modules_train_and_evaluate_as_torch(pool: bool, settings: dict[str, Any], backend: str) -> None:
    """Three batches of training and one of evaluation: outputs, gradients, and every buffer after each."""
    plain = shaken(nn.BatchNorm2d(6, **settings))
    module = (fast.BatchNormReLUMaxPool2d if pool else fast.BatchNormReLU2d)(6, **settings)
    assert isinstance(module, nn.BatchNorm2d)
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(plain.state_dict())
    tail = nn.Sequential(nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []))
    plain = plain.double()
    with fastconv.use_backend(backend):
        for step in range(4):
            if step == 3:
                module.eval(), plain.eval()
            a = (torch.randn(3, 6, 5, 4) * 2 + step).requires_grad_()
            b = a.detach().double().requires_grad_()
            module.zero_grad(), plain.zero_grad()
            output, expected = module(a), tail(plain(b))
            assert_close(output, expected, torch.float32, 60, f"output {step}", scale=1)
            grad = torch.randn_like(output)
            output.backward(grad), expected.backward(grad.double())
            assert_close(a.grad, b.grad, torch.float32, 60, "input gradient", scale=1)
            for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
                assert_close(p.grad, q.grad, torch.float32, 120, name, scale=8)
            for (name, p), q in zip(module.named_buffers(), plain.named_buffers(), strict=True):
                assert name == q[0]
                if name == "num_batches_tracked":
                    assert p == q[1] == min(step + 1, 3)
                else:
                    assert_close(p, q[1], torch.float32, 60, name)
    plain.load_state_dict(module.state_dict())


def test_half_precision_buffers_and_parameters() -> None:
    """A module cast as a whole, as torch permits it: running statistics are rounded to its dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        module, plain = fast.BatchNormReLU2d(4).to(dtype), nn.BatchNorm2d(4).to(dtype)
        x = torch.randn(8, 4, 5, 5).to(dtype)
        for backend in ("triton", "native", "aten"):
            plain.reset_running_stats(), module.reset_running_stats()
            wide = copy.deepcopy(plain).double()
            with fastconv.use_backend(backend):
                output = module(x)
            assert_close(output, wide(x.double()).relu(), dtype, 200, scale=1)
            for name in ("running_mean", "running_var"):
                assert_close(getattr(module, name), getattr(wide, name), dtype, 200, name, scale=1)


class Block(nn.Module):
    """A residual block: conv, norm, relu, conv, norm, add, relu."""

    def __init__(self, conv: Callable[..., nn.Module], norm: Callable[..., nn.Module], channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = conv(channels, channels, 3, padding=1, bias=False), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


class PlainBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_residual_block(backend: str) -> None:
    block, plain = Block(fast.Conv2d, fast.BatchNormReLU2d), PlainBlock(nn.Conv2d, nn.BatchNorm2d)
    block.load_state_dict(plain.state_dict())
    plain = plain.double()
    a = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    b = a.detach().double().requires_grad_()
    with fastconv.use_backend(backend):
        output, expected = block(a), plain(b)
        grad = torch.randn_like(output)
        output.backward(grad), expected.backward(grad.double())
    assert_close(output, expected, torch.float32, 144, "output")
    assert_close(a.grad, b.grad, torch.float32, 144, "input gradient", scale=2)
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, torch.float32, 144, name, scale=8)
    for (name, p), q in zip(block.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(p, q) if p.dtype == torch.int64 else assert_close(p, q, torch.float32, 144, name) is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, training: bool) -> None:
    """The mutation of running statistics included."""
    net = nn.Sequential(
        fast.Conv2d(3, 8, 3, padding=1), fast.BatchNormReLUMaxPool2d(8), Block(fast.Conv2d, fast.BatchNormReLU2d)
    )
    net = shaken_all(net).train(training)
    eager = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        a = torch.randn(batch, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        b = a.detach().clone().requires_grad_()
        grads = []
        for run, x in ((compiled, a), (eager, b)):
            output = run(x)
            module = net if run is compiled else eager
            grads.append([output, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])])
        assert all(map(torch.equal, *grads))
        before = [t.clone() for t in net.buffers()]
        assert all(map(torch.equal, before, eager.buffers()))
    assert (net[1].num_batches_tracked == 2) == training


def shaken_all(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            shaken(module)
    return net


def test_export_in_evaluation() -> None:
    net = shaken_all(nn.Sequential(fast.BatchNormReLU2d(4), fast.BatchNormReLUMaxPool2d(4))).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (torch.randn(2, 4, 6, 6),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 4, 6, 6)
    assert torch.equal(program.module()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_it_alone_as_torch_does(dtype: torch.dtype) -> None:
    module, plain = fast.BatchNormReLU2d(4), nn.BatchNorm2d(4)
    for x in (torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5).to(dtype)):
        with torch.autocast("cpu", dtype):
            output, expected = module(x, residual=torch.ones(2, 4, 5, 5)), plain(x)
        assert output.dtype == expected.dtype == x.dtype
        assert_close(output, (expected.double() + 1).relu(), x.dtype, 50)
        output.sum().backward()
        assert module.weight.grad.dtype == module.running_mean.dtype == torch.float32


def test_a_backward_after_the_statistics_moved_raises() -> None:
    """Evaluation keeps the running statistics for backward: a training step between them would spoil its gradient.

    torch's own notices nothing, and gives the gradient of the statistics as they have become.
    """
    for backend in ("triton", "native", "aten", "torch"):
        module = nn.BatchNorm2d(4) if backend == "torch" else fast.BatchNormReLU2d(4)
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        with fastconv.use_backend("auto" if backend == "torch" else backend):
            output = module.eval()(x)
            want = (module.running_var + module.eps).rsqrt()
            module.train()(x)
        if backend == "torch":
            output.sum().backward()
            assert (x.grad[0, :, 0, 0] - want).abs().min() > 1e-4
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_inference_mode() -> None:
    module = fast.BatchNormReLU2d(4)
    with torch.inference_mode():
        assert not module(torch.randn(2, 4, 5, 5)).requires_grad
        made_here = fast.BatchNormReLU2d(4)
        made_here(torch.randn(2, 4, 5, 5))
    assert module.num_batches_tracked == made_here.num_batches_tracked == 1
    assert module.running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    "make", [fast.BatchNormReLU2d, lambda c, **k: fast.BatchNormReLUMaxPool2d(c, pool_kernel_size=3, **k)]
)
def test_copies_and_meta(make: Callable[..., nn.Module]) -> None:
    module = shaken(make(3)).eval()
    x = torch.randn(1, 3, 8, 8)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert repr(copied) == repr(module)
        assert torch.equal(copied(x), module(x))
    on_meta = make(3, device="meta")
    assert on_meta(torch.empty(2, 3, 9, 9, device="meta")).shape[1] == 3
    on_meta.to_empty(device="cpu").load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert on_meta(torch.randn(2, 3, 9, 9)).isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_from_torch_shares_everything(settings: dict[str, Any]) -> None:
    plain = shaken(nn.BatchNorm2d(4, **settings)).eval()
    if plain.weight is not None:
        plain.weight.requires_grad_(False)
    module = fast.BatchNormReLUMaxPool2d.from_torch(plain, pool_kernel_size=3)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(module, name) is getattr(plain, name)
    assert not module.training
    assert module.pool_stride == 3
    assert super(fast.BatchNormReLUMaxPool2d, module).extra_repr() == plain.extra_repr()
    assert list(module.state_dict()) == list(plain.state_dict())


class Subclass(nn.BatchNorm2d):
    pass


def _kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.children()]


def test_convert_fuses_norms() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
        *(nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)),
    )
    model = shaken_all(model)
    names = list(model.state_dict())
    converted = convert(model)
    assert _kinds(converted) == [
        *(fast.Conv2d, fast.BatchNormReLUMaxPool2d, nn.Identity, nn.Identity),
        *(fast.BatchNormReLU2d, nn.Identity, fast.Conv2d),
        *(fast.BatchNormReLU2d, nn.Identity, fast.MaxPool2d),
    ]
    assert list(converted.state_dict()) == names
    assert all(p is q for p, q in zip(converted.parameters(), model.parameters(), strict=True))
    assert all(p is q for p, q in zip(converted.buffers(), model.buffers(), strict=True))
    assert converted[4].momentum is None
    expected_model, x = copy.deepcopy(model).double(), torch.randn(2, 3, 16, 16)
    for training in (True, False):
        for got, want in zip(converted.train(training)(x), expected_model.train(training)(x.double()), strict=True):
            if got.dtype == torch.float32:
                assert_close(got, want, torch.float32, 3 * 512, "converted")
    for got, want in zip(converted.buffers(), expected_model.buffers(), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype))
    assert _kinds(convert(converted)) == _kinds(converted)


@pytest.mark.parametrize(
    "make", [lambda: nn.SyncBatchNorm(4), lambda: Subclass(4), lambda: nn.LazyBatchNorm2d(), lambda: hooked()]
)
def test_norms_left_alone(make: Callable[[], nn.Module]) -> None:
    norm = make()
    assert _kinds(convert(nn.Sequential(norm, nn.ReLU(), nn.MaxPool2d(2)))) == [type(norm), nn.ReLU, fast.MaxPool2d]


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, args, output: None)
    return norm


X, C = torch.randn(2, 4, 6, 6), torch.ones(4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": X[0]}, ValueError, "expected 4D input (got 3D input)"),
    ({"input": X[0, 0]}, ValueError, "expected 4D input (got 2D input)"),
    ({"input": 3}, TypeError, "input must be a Tensor, got int"),
    ({"input": X.long()}, RuntimeError, "input has dtype torch.int64"),
    ({"input": X[:1, :, :1, :1], "training": True}, ValueError, "Expected more than 1 value per channel when training"),
    ({"weight": torch.ones(3)}, RuntimeError, "weight should contain 4 elements not 3"),
    ({"weight": torch.ones(4, 1)}, RuntimeError, "weight of size [4, 1]"),
    ({"weight": 1.0}, TypeError, "weight must be a Tensor, got float"),
    ({"bias": torch.ones(5)}, RuntimeError, "bias should contain 4 elements not 5"),
    ({"bias": C.double()}, RuntimeError, "bias has dtype torch.float64"),
    ({"bias": C.to("meta")}, RuntimeError, "input is on cpu but bias is on meta"),
    ({"running_mean": torch.ones(2)}, RuntimeError, "running_mean should contain 4 elements not 2"),
    ({"running_var": torch.ones(2)}, RuntimeError, "running_var should contain 4 elements not 2"),
    ({"running_mean": None}, ValueError, "running_mean and running_var must either both be None"),
    ({"running_mean": None, "running_var": None}, RuntimeError, "must be defined in evaluation mode"),
    ({"training": 1}, TypeError, "training must be bool, got training=1"),
    ({"momentum": "x"}, TypeError, "momentum must be float, got momentum='x'"),
    ({"eps": -1.0}, ValueError, "eps must be non-negative, but got eps=-1.0"),
    ({"eps": 0.0, "training": True}, ValueError, "eps must be positive during training"),
    ({"residual": X[:1]}, RuntimeError, "residual must have exactly the output's shape [2, 4, 6, 6]"),
    ({"residual": X.long()}, RuntimeError, "residual must have a floating-point dtype"),
    ({"residual": 1}, TypeError, "residual must be a Tensor, got int"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    args = {"input": X, "running_mean": C.clone(), "running_var": C.clone(), **change}
    for op in ("batch_norm_relu", "batch_norm_relu_max_pool2d"):
        with pytest.raises(kind) as caught:
            getattr(FC, op)(**args)
        assert f"{op}: " in str(caught.value)
        assert words in str(caught.value)
    assert all(t is None or t.shape != (4,) or (t == 1).all() for t in (args["running_mean"], args["running_var"]))


def test_errors_of_pools_and_modules_are_torchs() -> None:
    with pytest.raises(RuntimeError, match="pool_kernel_size"):
        FC.batch_norm_relu_max_pool2d(X, C, C, pool_kernel_size=(1, 2, 3))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        FC.batch_norm_relu_max_pool2d(X, C, C, pool_kernel_size=7)
    for args in ((X[0],), (X[0, 0],), (X[:1, :, :1, :1],)):
        for module in (nn.BatchNorm2d(4), fast.BatchNormReLU2d(4)):
            with pytest.raises(ValueError, match=r"expected 4D input|Expected more than 1 value per channel when training"):
                module(*args)
