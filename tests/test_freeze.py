"""fastconv.freeze: what a snapshot computes, when its weights are prepared anew, what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from guards import transforming
from torch import nn

import fastconv
from fastconv import functional
from fastconv import nn as fast
from fastconv.backends import native, native_winograd
from fastconv.tuning import cpu

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(24, 40, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(40, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 24, 3, padding=0),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 8, 1),
        nn.AdaptiveAvgPool2d(1),
    )
    return fastconv.convert(layers.to(dtype)).to(memory_format=torch.channels_last)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 24, 30, 26).to(dtype).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def same(a: nn.Module, b: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    x = images(dtype)
    return torch.equal(a(x), b(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_snapshot_computes_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)  # which would leave bfloat16 nothing to prepare
    model = net(dtype)
    frozen = fastconv.freeze(model)
    assert [type(layer).__name__ for layer in frozen if type(layer) is not nn.Identity] == [
        "FrozenConv2d",
        "FrozenConv2d",
        "ConvReLUMaxPool2d",  # its pool is another
        "Conv2d",
        "GlobalAvgPool2d",
    ]
    with transforming():
        assert same(frozen, model, dtype)
    filters: list[bool] = []
    forward = native_winograd.KERNELS._forward
    monkeypatch.setattr(native_winograd.KERNELS, "_forward", lambda *a: (filters.append(a[-1] is not None), forward(*a)))
    with transforming(), torch.inference_mode():
        frozen(images(dtype))
    assert filters == [True, True, False]


@pytest.mark.parametrize("shape", [(1, 64, 9, 9), (2, 264, 20, 20), (40, 16, 24, 24)])
def test_both_ways_of_cutting_a_call_take_prepared_weights(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(48, shape[1], 3, 3).contiguous(memory_format=torch.channels_last)
    prepared = functional.prepare_conv2d(weight)
    assert prepared is not None
    wanted = functional.conv2d_relu(x, weight, None, 1, 1)
    assert torch.equal(functional.conv2d_prepared(x, weight, prepared, None, 1, 1, relu=True), wanted)
    x[0, 0, 2, 2] = float("inf")
    wanted = functional.conv2d(x, weight, None, 1, 1)
    got = functional.conv2d_prepared(x, weight, prepared, None, 1, 1)
    assert torch.equal(got.isfinite(), wanted.isfinite()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_it_is_a_snapshot() -> None:
    model = net()
    frozen = fastconv.freeze(model)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert same(frozen, before) and not same(frozen, model)
    assert frozen.state_dict().keys() == model.state_dict().keys()
    assert not any(p.requires_grad for p in frozen.parameters()) and not any(m.training for m in frozen.modules())


def test_weights_are_prepared_anew() -> None:
    model, other = net(), net()
    frozen = fastconv.freeze(model)
    assert same(copy.deepcopy(frozen), model)
    stream = io.BytesIO()
    torch.save(frozen, stream)
    stream.seek(0)
    assert same(torch.load(stream, weights_only=False), model)
    assert same(copy.deepcopy(frozen).to(torch.bfloat16), copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16)
    frozen.load_state_dict(other.state_dict())
    assert same(frozen, other) and not same(frozen, model)


def test_ieee_sums_directly() -> None:
    model = net()
    frozen = fastconv.freeze(model)
    with fastconv.set_precision("ieee"):
        assert same(frozen, model)


def test_autocast_rounds_weights_as_it_does_unfrozen_ones() -> None:
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        assert same(fastconv.freeze(model), model)


@pytest.mark.parametrize("backend", ["aten", "native", "triton"])
def test_backends(backend: str) -> None:
    conv = fast.ConvReLU2d(16, 16, 3, padding=1)
    frozen = fastconv.freeze(conv)
    x = torch.randn(1, 16, 6, 6)
    with fastconv.use_backend(backend), torch.no_grad():
        torch.testing.assert_close(frozen(x), conv(x))


def test_what_is_attached_to_a_layer_stays() -> None:
    model = net()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    frozen = fastconv.freeze(model)
    assert type(frozen[0]) is fast.ConvReLU2d and type(frozen[2]) is fast.FrozenConv2d
    assert same(frozen, model) and len(calls) == 2


@pytest.mark.parametrize("shape", [(129, 128, 3, 3), (64, 3, 3, 3), (24, 24, 5, 5)], ids=["large", "first", "5x5"])
def test_layers_of_which_nothing_can_be_prepared_stay(shape: tuple[int, ...]) -> None:
    conv = fast.ConvReLU2d(shape[1], shape[0], shape[2], padding=1)
    frozen = fastconv.freeze(nn.Sequential(conv))[0]
    assert type(frozen) is fast.ConvReLU2d and frozen is not conv and not frozen.training
    assert not fastconv.freeze(conv).training and not fastconv.freeze(fast.Conv2d(16, 16, 3)).training


def test_layers_that_are_no_longer_prepared_check_alike() -> None:
    pooled = fastconv.freeze(fast.ConvReLUMaxPool2d(16, 16, 3, padding=1, pool_kernel_size=2))
    plain = fastconv.freeze(fast.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(2, 16, 8, 8)
    for frozen, other in ((pooled, copy.deepcopy(pooled).double()), (plain, copy.deepcopy(plain).double())):
        assert frozen.prepared is not None and other.prepared is None
        torch.testing.assert_close(other(x.double()).float(), frozen(x))
        for layer, dtype in ((frozen, x.dtype), (other, torch.float64)):
            with pytest.raises(RuntimeError, match="residual"):
                layer(x.to(dtype), frozen(x).to(dtype))
            with pytest.raises(RuntimeError, match="no derivative"):
                layer(x.to(dtype, copy=True).requires_grad_())


def test_a_layer_in_two_places_stays_one() -> None:
    conv = fast.Conv2d(16, 16, 3, padding=1)
    frozen = fastconv.freeze(nn.Sequential(conv, conv))
    assert frozen[0] is frozen[1] and type(frozen[0]) is fast.FrozenConv2d


def test_residual_and_unbatched() -> None:
    conv = fast.ConvReLU2d(16, 16, 3, padding="same")
    frozen = fastconv.freeze(conv)
    x, residual = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(frozen(x, residual), conv(x, residual))
        assert torch.equal(frozen(x[0]), conv(x[0]))


def test_compiled() -> None:
    model = net()
    frozen = fastconv.freeze(model)
    x = images()
    with torch.no_grad():
        compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), frozen(x))


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"freeze: model must be a torch.nn.Module, got int"):
        fastconv.freeze(3)  # type: ignore[arg-type]
    frozen = fastconv.freeze(net())
    with pytest.raises(RuntimeError, match="no derivative"):
        frozen(images().requires_grad_())
    x, weight = torch.randn(1, 16, 6, 6), torch.randn(16, 16, 3, 3)
    prepared = functional.prepare_conv2d(weight)
    assert prepared is not None
    with pytest.raises(RuntimeError, match="relu must be True"):
        functional.conv2d_prepared(x, weight, prepared, padding=1, max_pool=True)
    with pytest.raises(RuntimeError, match="residual is not served"):
        functional.conv2d_prepared(x, weight, prepared, padding=1, relu=True, residual=x, max_pool=True)
    with pytest.raises(RuntimeError, match="must come from winograd_filters"), fastconv.use_backend("native"):
        functional.conv2d_prepared(torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3), prepared, padding=1)
    for other in (torch.randn(16, 16, 5, 5), torch.randn(4, 4, 3, 3, dtype=torch.float64)):
        assert functional.prepare_conv2d(other) is None
    assert functional.prepare_conv2d(torch.randn(129, 128, 3, 3)) is None
    assert functional.prepare_conv2d(weight, stride=2) is None and functional.prepare_conv2d(weight, dilation=2) is None
