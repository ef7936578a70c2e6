"""fastconv.nn against torch.nn: values, gradients, state_dict, and everything a module must survive."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from fastconv import nn as fast

# Settings of a convolution, and the padding modes and strings that torch.nn.Conv2d takes.
CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
]
POOLS = [
    (fast.MaxPool2d, nn.MaxPool2d, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    (fast.AvgPool2d, nn.AvgPool2d, {"kernel_size": 2, "stride": 1, "count_include_pad": False, "divisor_override": 3}),
    (fast.GlobalAvgPool2d, nn.AdaptiveAvgPool2d, {"output_size": 1}),
]


def _same_as_torch(module: nn.Module, expected: nn.Module, x: Tensor, reduction: int) -> None:
    """Output, input gradient and parameter gradients of `module` against those of `expected` in float64."""
    expected = copy.deepcopy(expected).double()
    module.zero_grad()
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    output, wanted = module(a), expected(b)
    assert_close(output, wanted, torch.float32, reduction, "output")
    grad = torch.randn_like(output)
    output.backward(grad)
    wanted.backward(grad.double())
    assert_close(a.grad, b.grad, torch.float32, 9 * grad.shape[-3], "input gradient")
    for (name, p), q in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert_close(p.grad, q.grad, torch.float32, grad.numel() // grad.shape[-3], name)


@pytest.mark.parametrize("settings", CONVS, ids=str)
@pytest.mark.parametrize(
    ("make", "tail"),
    [
        (fast.Conv2d, ()),
        (fast.ConvReLU2d, (nn.ReLU(),)),
        (fast.ConvReLUMaxPool2d, (nn.ReLU(), nn.MaxPool2d(2))),
    ],
    ids=["conv", "relu", "pool"],
)
def test_convolutions_equal_torch(make: Callable[..., nn.Module], tail: tuple[nn.Module, ...], settings: dict) -> None:
    plain = nn.Conv2d(4, 6, **settings)
    module = make(4, 6, **settings)
    assert isinstance(module, nn.Conv2d)
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    _same_as_torch(module, nn.Sequential(plain, *tail), torch.randn(2, 4, 9, 10), plain.weight[0].numel())
    _same_as_torch(module, nn.Sequential(plain, *tail), torch.randn(4, 9, 10), plain.weight[0].numel())


@pytest.mark.parametrize(("make", "torch_make", "settings"), POOLS, ids=["max", "average", "global"])
def test_pools_equal_torch(make: Callable[..., nn.Module], torch_make: Callable[..., nn.Module], settings: dict) -> None:
    module, plain = make(**settings), torch_make(**settings)
    assert isinstance(module, torch_make)
    assert module.extra_repr() == plain.extra_repr()
    _same_as_torch(module, plain, torch.randn(2, 3, 7, 8), 56)


def test_pool_settings_reach_the_pool() -> None:
    pool = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}
    module = fast.ConvReLUMaxPool2d(3, 5, 3, **{f"pool_{name}": value for name, value in pool.items()})
    plain = nn.Conv2d(3, 5, 3)
    module.load_state_dict(plain.state_dict())
    _same_as_torch(module, nn.Sequential(plain, nn.ReLU(), nn.MaxPool2d(**pool)), torch.randn(2, 3, 10, 9), 27)
    assert "pool_kernel_size=3, pool_stride=2" in repr(module)


def test_residual() -> None:
    module = fast.ConvReLU2d(3, 5, 3, padding=1)
    x, residual = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 6, 6)
    expected = torch.relu(nn.functional.conv2d(x, module.weight, module.bias, padding=1).double() + residual.double())
    assert_close(module(x, residual), expected, torch.float32, 27, "with residual")
    with pytest.raises(RuntimeError, match="residual"):
        module(x, residual[:1])


def test_max_pool_indices() -> None:
    x = torch.randn(2, 3, 8, 8)
    output, indices = fast.MaxPool2d(2, return_indices=True)(x)
    expected, expected_indices = nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(output, expected)
    assert torch.equal(indices, expected_indices)


def test_global_average_pool_has_one_size() -> None:
    assert fast.GlobalAvgPool2d()(torch.randn(2, 3, 4, 5)).shape == (2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"output_size=7"):
        fast.GlobalAvgPool2d(7)


@pytest.mark.parametrize(
    "module",
    [
        fast.Conv2d(3, 4, 3, padding_mode="reflect", padding=1),
        fast.ConvReLU2d(3, 4, 3, bias=False),
        fast.ConvReLUMaxPool2d(3, 4, 3, pool_kernel_size=3, pool_stride=1),
        fast.MaxPool2d(2),
        fast.AvgPool2d(2),
        fast.GlobalAvgPool2d(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_copies(module: nn.Module) -> None:
    x = torch.randn(1, 3, 8, 8)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert repr(copied) == repr(module)
        assert torch.equal(copied(x), module(x))
        assert all(p is not q for p, q in zip(copied.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("make", [fast.Conv2d, fast.ConvReLU2d, fast.ConvReLUMaxPool2d])
def test_meta_device(make: type[fast.Conv2d]) -> None:
    module = make(3, 4, 3, padding=1, device="meta")
    output = module(torch.empty(2, 3, 8, 8, device="meta"))
    assert output.is_meta
    assert output.shape == ((2, 4, 4, 4) if make is fast.ConvReLUMaxPool2d else (2, 4, 8, 8))
    module = module.to_empty(device="cpu")
    module.load_state_dict(nn.Conv2d(3, 4, 3).state_dict())
    assert module(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("settings", CONVS, ids=str)
def test_from_torch_shares_parameters(settings: dict) -> None:
    plain = nn.Conv2d(4, 6, **settings).eval()
    plain.weight.requires_grad_(False)
    seeded = torch.get_rng_state()
    module = fast.ConvReLUMaxPool2d.from_torch(plain, pool_kernel_size=3)
    assert torch.equal(seeded, torch.get_rng_state()), "a conversion draws no random numbers"
    assert module.weight is plain.weight
    assert module.bias is plain.bias
    assert not module.training
    assert module.pool_stride == 3
    assert super(fast.ConvReLUMaxPool2d, module).extra_repr() == plain.extra_repr()
