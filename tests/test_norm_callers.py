"""Batch norms under those who call, copy or look for them: checkpoints, vmap, torch.fx, SyncBatchNorm, conv-norm folding."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import fastconv.functional as FC
from fastconv import convert
from fastconv import nn as fast


def _net() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1), nn.ReLU())
    for tensor in (net[1].running_mean, net[1].running_var, *net[1].parameters()):
        tensor.data.uniform_(0.5, 1.5)
    return net


def test_synchronised_norms_before_convert() -> None:
    """SyncBatchNorm stays, and evaluates as before; what surrounds it is converted."""
    plain = _net()
    model = convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    kinds = (fast.Conv2d, nn.SyncBatchNorm, nn.ReLU, fast.MaxPool2d, fast.ConvReLU2d, nn.Identity)
    assert tuple(map(type, model)) == kinds
    x = torch.randn(2, 3, 8, 8)
    assert_close(model.eval()(x), plain.double().eval()(x.double()), torch.float32, 27, scale=4)


def test_folding_before_convert() -> None:
    plain = _net().eval()
    folded = convert(nn.Sequential(fuse_conv_bn_eval(plain[0], plain[1]), *plain[2:]))
    assert type(folded[0]) is fast.ConvReLUMaxPool2d
    x = torch.randn(2, 3, 8, 8)
    assert_close(folded(x), plain.double()(x.double()), torch.float32, 27, scale=4)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("make", [fast.BatchNormReLU2d, fast.BatchNormReLUMaxPool2d])
@pytest.mark.parametrize("last", [True, False], ids=["stopped", "run_again"])
def test_checkpoint_keeps_count_and_statistics_together(
    last: bool, make: Callable[..., nn.Module], momentum: float | None
) -> None:
    """A recomputation stops at the last saved tensor: whether the batch counts again or not, statistics agree."""
    module = make(4, momentum=momentum)
    module.num_batches_tracked.fill_(3)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    tail = nn.Identity() if last else nn.Conv2d(4, 4, 1)
    checkpoint(lambda x: tail(module(x)), x, use_reentrant=False).sum().backward()
    times = int(module.num_batches_tracked) - 3
    assert times == (1 if last else 2)
    share = times / (3 + times) if momentum is None else 1 - (1 - momentum) ** times
    var, mean = torch.var_mean(x.detach().double(), (0, 2, 3))
    assert_close(module.running_mean, share * mean, torch.float32, 72)
    assert_close(module.running_var, 1 - share + share * var, torch.float32, 72)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_refused_call_is_not_counted(momentum: float | None) -> None:
    module = fast.BatchNormReLUMaxPool2d(4, momentum=momentum, pool_kernel_size=9)
    for bad in (torch.randn(2, 5, 9, 9), torch.randn(2, 4, 5, 5), torch.randn(1, 4, 1, 1)):
        with pytest.raises((RuntimeError, ValueError)):
            module(bad)
    assert module.num_batches_tracked == 0
    assert not module.running_mean.any()


class _Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, fast.BatchNormReLU2d) or super().is_leaf_module(m, module_qualified_name)


def test_symbolic_trace_with_leaves() -> None:
    model = convert(_net())
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    traced = torch.fx.GraphModule(model, _Leaves().trace(model))
    x = torch.randn(2, 3, 8, 8)
    for training in (False, True):
        assert torch.equal(traced.train(training)(x), copy.deepcopy(model).train(training)(x))


def _norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, mean, var: function(x, mean, var, training=True, momentum=0.3)


def _torch_norm(*args: Any, **settings: Any) -> Tensor:
    return F.batch_norm(*args, **settings).relu()


TRANSFORMS: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    "vmap": lambda f: vmap(f),
    "per_sample_statistics_of_one_batch": lambda f: lambda x, m, v: vmap(f, (None, 0, 0))(x[0], m, v),
    "vmap_grad": lambda f: vmap(grad(lambda x, m, v: f(x, m, v).square().sum())),
    "grad_vmap": lambda f: lambda x, m, v: grad(lambda x: vmap(f)(x, m, v).square().sum())(x),
    "grad": lambda f: lambda x, m, v: grad(lambda x: f(x, m[0], v[0]).square().sum())(x[0]),
    "vmap_vmap": lambda f: lambda x, m, v: vmap(vmap(f))(x[None], m[None], v[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_running_statistics_under_torch_func(name: str) -> None:
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    mean, var = torch.rand(2, 3, 4, dtype=torch.float64).unbind()
    results = []
    for function in (FC.batch_norm_relu, _torch_norm):
        statistics = (mean.clone(), var.clone())
        results.append((TRANSFORMS[name](_norm(function))(x, *statistics), *statistics))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.equal(results[0][1], mean)


def test_statistics_batched_in_another_dimension() -> None:
    """torch's own updates a copy of them."""
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    mean, var = torch.rand(2, 4, 3, dtype=torch.float64).unbind()
    want = 0.7 * mean + 0.3 * x.mean((1, 3, 4)).t()
    vmap(_norm(FC.batch_norm_relu), (0, 1, 1))(x, mean, var)
    torch.testing.assert_close(mean, want)


def test_shared_statistics_are_refused_under_vmap() -> None:
    x, mean, var = torch.randn(3, 2, 4, 5, 5), torch.zeros(4), torch.ones(4)
    for function in (FC.batch_norm_relu, F.batch_norm):
        with pytest.raises(RuntimeError, match=r"batched"):
            vmap(lambda x, f=function: f(x, mean, var, training=True))(x)
    assert not mean.any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_require_a_gradient_are_refused(name: str, training: bool) -> None:
    x, statistics = torch.randn(2, 4, 5, 5), {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    statistics[name].requires_grad_()
    with pytest.raises(RuntimeError):
        F.batch_norm(x, **statistics, training=training)
    with pytest.raises(RuntimeError, match=f"batch_norm_relu: {name} must not require a gradient"):
        FC.batch_norm_relu(x, **statistics, training=training)
    with torch.no_grad():
        FC.batch_norm_relu(x, **statistics, training=training)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.to("meta")], ids=["cpu", "meta"])
def test_the_update_checks_before_it_writes(make: Callable[[Tensor], Tensor]) -> None:
    update = torch.ops.fastconv.batch_norm_update.default
    for wrong in range(4):
        operands = [make(torch.zeros(3 if i == wrong else 4)) for i in range(4)]
        with pytest.raises(RuntimeError, match="must have one value a channel"):
            update(*operands, 8, 0.5, "auto")
    with pytest.raises(RuntimeError, match=r"mean of size \[4, 1\]"):
        update(*(make(torch.zeros(4, 1)) for _ in range(4)), 8, 0.5, "auto")
    operands = [make(torch.full((4,), float(i))) for i in range(4)]
    for count in (1, 0):
        with pytest.raises(ValueError, match=f"got count={count}; allowed: 2 and more"):
            update(*operands, count, 0.5, "auto")
    assert operands[0].is_meta or not operands[0].any()


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="torch's has no such setting")
def test_without_a_bias() -> None:
    plain = nn.BatchNorm2d(4, bias=False)
    with torch.no_grad():
        plain.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 6, 6)
    for make, tail in ((fast.BatchNormReLU2d, nn.Identity()), (fast.BatchNormReLUMaxPool2d, nn.MaxPool2d(2))):
        made, shared = make(4, bias=False), make.from_torch(plain)
        made.load_state_dict(plain.state_dict())
        for module in (made, shared):
            assert module.bias is None
            assert list(module.state_dict()) == list(plain.state_dict())
            assert repr(module).count("bias=False") == 1
            assert_close(module.eval()(x), tail(plain.eval()(x).relu()).double(), torch.float32, 72)
    with pytest.raises(TypeError):
        fast.BatchNormReLUMaxPool2d(4, no_such_setting=1)
