"""Chains of convolutions as one Function: gradients, what is saved and computed, and all that autograd promises."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, ids
from tolerances import assert_close
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastconv
import fastconv.functional as FC
from fastconv import reference
from fastconv.bench.gate import may_transform
from fastconv.functional import ConvLayer
from fastconv.geometry import ConvGeometry

ops = torch.ops.fastconv
CHANNELS_LAST = torch.channels_last
# Each layer: channels out, whether it has a bias, and its settings. All read (2, 4, 12, 10).
POOL = {"pool_kernel_size": 2}
CHAINS: dict[str, list[tuple[int, bool, dict[str, Any]]]] = {
    "unpooled": [(8, True, {"padding": 1}), (8, True, {"padding": 1}), (6, True, {"padding": 1})],
    "pools": [(8, True, {"padding": 1, **POOL}), (6, False, {"padding": 1, **POOL})],
    "mixed": [
        (8, True, {"padding": 1}),
        (8, False, {"padding": 1, **POOL}),
        (6, True, {"padding": 1}),
        (8, True, {"padding": 1, "pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}),
    ],
    "settings": [
        (8, False, {"stride": (2, 1), "padding": 1}),
        (8, True, {"padding": "same", "dilation": 2, "groups": 4}),
        (6, True, {"padding": "valid", "pool_kernel_size": (2, 3), "pool_ceil_mode": True}),
    ],
    "same_even_kernel": [(8, True, {"padding": 1}), (6, True, {"padding": "same", "kernel": (2, 4)}), (4, True, {})],
}
INPUT = (2, 4, 12, 10)


def operands(name: str, dtype: torch.dtype = torch.float32, layout: Any = CHANNELS_LAST) -> tuple[Tensor, list[ConvLayer]]:
    """Leaves that need gradients; every map is of unit scale."""
    x = torch.randn(INPUT).to(dtype).to(memory_format=layout).requires_grad_()
    layers, channels = [], INPUT[1]
    for out_channels, with_bias, settings in CHAINS[name]:
        settings = dict(settings)
        shape = (out_channels, channels // settings.get("groups", 1), *settings.pop("kernel", (3, 3)))
        weight = torch.randn(shape) / (shape[1] * shape[2] * shape[3] / 2) ** 0.5
        weight = weight.to(dtype).to(memory_format=layout).requires_grad_()
        bias = torch.randn(out_channels).to(dtype).requires_grad_() if with_bias else None
        layers.append(ConvLayer(weight, bias, **settings))
        channels = out_channels
    return x, layers


def leaves(x: Tensor, layers: Sequence[ConvLayer]) -> list[Tensor]:
    return [x, *(t for layer in layers for t in layer[:2] if t is not None)]


def one_by_one(x: Tensor, layers: Sequence[ConvLayer]) -> Tensor:
    for layer in layers:
        if layer.pool_kernel_size is None:
            x = FC.conv2d_relu(x, *layer[:6])
        else:
            x = FC.conv2d_relu_max_pool2d(x, *layer[:6], **{name: getattr(layer, name) for name in layer._fields[6:]})
    return x


def node(y: Tensor) -> str:
    return type(y.grad_fn).__name__


def check_layer(x: Tensor, layer: ConvLayer, output: Tensor, gradient: Tensor, got: Sequence[Tensor]) -> None:
    """A layer's output and gradients against float64, on the very map and gradient that it read in its own dtype.

    ReLU and pool decide in float64 as they did there. Errors are those of sums before the ReLU, so that is their scale.
    Where windows of the pool overlap, gradients add up in a map of that dtype.
    """
    exact = [t.detach().double().requires_grad_() for t in leaves(x, [layer])]
    before = F.conv2d(exact[0], exact[1], exact[2] if len(exact) == 3 else None, *layer[2:6])
    want = before
    if layer.pool_kernel_size is not None:
        function = one_by_one(x.detach(), [layer]).grad_fn
        indices = ops.max_pool2d_indices(function.saved_tensors[2], function.unpooled_shape, *function.pool)
        want = before.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
    want = want * (output > 0)
    scale = before.square().mean().sqrt().item()
    stride = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * 2
    transformed = may_transform(x.device.type, layer.weight.shape[2:], stride)
    assert_close(output, want, x.dtype, layer.weight[0].numel(), "output", scale=scale, transformed=transformed)
    (undone,) = torch.autograd.grad(want, before, gradient.double(), retain_graph=True)
    expected = torch.autograd.grad(before, exact, undone.to(x.dtype).double())
    pixels, cancelling = undone.numel() // undone.shape[1], undone.square().sum((0, 2, 3)).mean().sqrt().item()
    sums = (("input", layer.weight[:, 0].numel(), 0.0), ("weight", pixels, 0.0), ("bias", pixels, cancelling))
    for (part, terms, scale), a, b in zip(sums, got, expected, strict=False):
        is_bias = part == "bias"
        assert_close(a, b, x.dtype, terms, f"gradient of {part}", scale=scale, transformed=transformed and not is_bias)


@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients(name: str, backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, layers = operands(name, dtype, layout)
    _check_gradients(x, layers, backend)


@pytest.mark.parametrize(
    ("name", "dtype"), [("mixed", torch.bfloat16), ("settings", torch.float32)], ids=["mixed", "settings"]
)
def test_gradients_in_the_interpreter(name: str, dtype: torch.dtype) -> None:
    _check_gradients(*operands(name, dtype), "triton")


def _check_gradients(x: Tensor, layers: list[ConvLayer], backend: str) -> None:
    """Every layer by itself: what a chain's maps and gradients are rounded to, a float64 chain would not be."""
    with fastconv.use_backend(backend):
        maps = [x, *(FC.conv_chain(x, layers[: i + 1]).detach().requires_grad_() for i in range(len(layers)))]
        y = FC.conv_chain(x, layers)
        assert torch.equal(y, maps[-1])
        gradients = [torch.randn_like(y)]  # of the maps, from the last one down
        for i in reversed(range(len(layers))):
            end = FC.conv_chain(maps[i], layers[i:])
            gradients.insert(0, torch.autograd.grad(end, maps[i], gradients[-1])[0])
        got = torch.autograd.grad(y, leaves(x, layers), gradients[-1])
        assert torch.equal(got[0], gradients[0])
        parameters = list(got[1:])
        for i, layer in enumerate(layers):
            count = len(leaves(x, [layer])) - 1
            grads, parameters = parameters[:count], parameters[count:]
            check_layer(maps[i], layer, maps[i + 1], gradients[i + 1], [gradients[i], *grads])
            assert grads[0].stride() == layer.weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("backend", ["native", "aten", "triton"])
@pytest.mark.parametrize("name", ["mixed", "same_even_kernel"])
def test_equal_to_its_layers_one_by_one(name: str, backend: str, dtype: torch.dtype) -> None:
    x, layers = operands(name, dtype)
    with fastconv.use_backend(backend):
        chained, single = FC.conv_chain(x, layers), one_by_one(x, layers)
    assert node(chained) == "ConvChainBackward"
    assert torch.equal(chained, single)
    gradient = torch.randn_like(chained)
    got, want = (torch.autograd.grad(y, leaves(x, layers), gradient) for y in (chained, single))
    if dtype == torch.float32 or backend != "triton":
        assert all(map(torch.equal, got, want))


def _only(layers: list[ConvLayer], needed: set[tuple[int, str]]) -> None:
    for i, layer in enumerate(layers):
        layer.weight.requires_grad_((i, "weight") in needed)
        if layer.bias is not None:
            layer.bias.requires_grad_((i, "bias") in needed)


ALL = {(i, part) for i in range(4) for part in ("weight", "bias")}


@pytest.mark.parametrize("with_input", [False, True], ids=["first_layer", "with_input"])
@pytest.mark.parametrize(
    "needed",
    [
        *({(i, "weight")} for i in range(4)),
        *({(i, "bias")} for i in (0, 2, 3)),
        *(ALL - {(i, "weight"), (i, "bias")} for i in range(4)),
        {(0, "bias"), (2, "weight")},
        ALL,
        set(),
    ],
    ids=lambda needed: "-".join(f"{part[0]}{i}" for i, part in sorted(needed)) or "nothing",
)
def test_frozen_parameters_cost_nothing(needed: set[tuple[int, str]], with_input: bool) -> None:
    x, layers = operands("mixed")
    everything = torch.autograd.grad(FC.conv_chain(x, layers).square().sum(), leaves(x, layers))
    wanted = {id(t): g for t, g in zip(leaves(x, layers), everything, strict=True)}
    x.requires_grad_(with_input)
    _only(layers, needed)
    y = FC.conv_chain(x, layers)
    assert y.requires_grad == bool(needed or with_input)
    if not y.requires_grad:
        return
    with FlopCounterMode(display=False) as counter:
        y.square().sum().backward()
    for t in leaves(x, layers):
        assert (t.grad is not None) == t.requires_grad
        assert t.grad is None or torch.equal(t.grad, wanted[id(t)])

    flops, below, shape = 0, with_input, INPUT
    for i, layer in enumerate(layers):
        g = ConvGeometry.of("conv", shape, layer.weight.shape, None, (1, 1), (1, 1), (1, 1), 1)
        flops += g.flops() * (below + ((i, "weight") in needed))
        below = below or bool({(i, "weight"), (i, "bias")} & needed)
        shape = (*g.output_shape[:2], *(n if layer.pool_kernel_size is None else n // 2 for n in g.output_shape[2:]))
    assert counter.get_total_flops() == flops


@pytest.mark.parametrize("name", ["mixed", "settings"])
def test_second_derivatives(name: str) -> None:
    x, layers = operands(name, torch.float64)
    args = leaves(x, layers)

    def chain(*args: Tensor) -> Tensor:
        rest = iter(args)
        x = next(rest)
        return FC.conv_chain(x, [layer._replace(weight=next(rest), bias=layer.bias and next(rest)) for layer in given])

    given = [layer._replace(bias=None if layer.bias is None else True) for layer in layers]
    assert torch.autograd.gradcheck(chain, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(chain, args, fast_mode=True)
    output = chain(*args)
    gradient = torch.randn_like(output)
    plain = torch.autograd.grad(output, args, gradient, retain_graph=True)
    recorded = torch.autograd.grad(output, args, gradient, create_graph=True)
    for got, want in zip(recorded, plain, strict=True):
        assert_close(got, want, torch.float64, 4 * 2 * 12 * 10 * 9)


@pytest.mark.parametrize("backend", ["native", "aten"])
def test_a_gradient_penalty(backend: str) -> None:
    """The second backward runs the fused operators with gradients arriving between the layers too."""
    x, layers = operands("mixed")
    args = leaves(x, layers)

    def penalty(run: Any) -> tuple[Tensor, ...]:
        # Weight gradients read the maps, so that their own gradients reach every map.
        grads = torch.autograd.grad(run(x, layers).square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), args)

    with fastconv.use_backend(backend):
        for got, want in zip(penalty(FC.conv_chain), penalty(one_by_one), strict=True):
            assert_close(got, want, torch.float32, 4 * 2 * 12 * 10 * 9)


def test_torch_func() -> None:
    x, layers = operands("mixed", torch.float64)
    x, weight = x.detach(), layers[1].weight.detach()

    def loss(run: Any) -> Any:
        return lambda w, x: run(x, [layers[0], layers[1]._replace(weight=w), *layers[2:]]).square().sum()

    for transform in (
        lambda f: grad(f)(weight, x),
        lambda f: vmap(grad(f), (None, 0))(weight, x[:, None]),
        lambda f: grad(lambda w: grad(f)(w, x).square().sum())(weight),
    ):
        torch.testing.assert_close(transform(loss(FC.conv_chain)), transform(loss(reference.conv_chain)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FC.conv_chain, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(2):
        x, layers = operands("mixed")
        layers = layers[:2]
        eager, traced = FC.conv_chain(x, layers), compiled(x, layers)
        assert torch.equal(traced, eager)
        gradient = torch.randn_like(eager)
        got, want = (torch.autograd.grad(y, leaves(x, layers), gradient) for y in (traced, eager))
        assert all(map(torch.equal, got, want))


def test_forward_mode_raises() -> None:
    x, layers = operands("unpooled")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(NotImplementedError):
            FC.conv_chain(dual, layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    x, layers = operands("mixed")
    want = torch.autograd.grad(FC.conv_chain(x, layers).square().sum(), leaves(x, layers))
    checkpoint(lambda x: FC.conv_chain(x, layers).square().sum(), x, use_reentrant=reentrant).backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves(x, layers), want, strict=True))


def test_autocast_casts_as_the_layers_do() -> None:
    x, layers = operands("mixed")
    with torch.autocast("cpu", torch.bfloat16):
        chained, single = FC.conv_chain(x, layers), one_by_one(x, layers)
    assert node(chained) == "ConvChainBackward"
    assert chained.dtype == torch.bfloat16
    assert torch.equal(chained, single)
    got, want = (torch.autograd.grad(y.float().square().sum(), leaves(x, layers)) for y in (chained, single))
    assert all(g.dtype == torch.float32 for g in got)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", ["native", "aten", "triton"])
def test_unbatched_and_empty(backend: str) -> None:
    x, layers = operands("mixed")
    with fastconv.use_backend(backend):
        assert torch.equal(FC.conv_chain(x[0], layers), FC.conv_chain(x[:1], layers)[0])
        empty = FC.conv_chain(x[:0], layers)
        assert empty.shape == (0, *FC.conv_chain(x, layers).shape[1:])
        gradients = torch.autograd.grad(empty.sum(), leaves(x, layers))
    assert not any(g.any() for g in gradients)
    assert FC.conv_chain(x, []) is x


def test_non_finite_numbers_go_where_they_go_one_by_one() -> None:
    x, layers = operands("unpooled")
    with torch.no_grad():
        x[0, 0, 0, 0], x[1, 1, 4, 4] = float("nan"), float("inf")
    for backend in ("native", "aten", "triton"):
        with fastconv.use_backend(backend):
            chained, single = FC.conv_chain(x, layers), one_by_one(x, layers)
        gradient = torch.randn_like(chained)
        got, want = (torch.autograd.grad(y, leaves(x, layers), gradient) for y in (chained, single))
        for a, b in zip((chained, *got), (single, *want), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class _Watch(TorchDispatchMode):
    """The names of fastconv's operators in the order in which they run, and the maps that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.backends: set[str] = set()
        self.alive: list[int] = []  # how many of the inputs read so far still exist, at each operator
        self._inputs: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("fastconv"):
            self.names.append(str(func).split(".")[1])
            self.backends.add(args[-1])
            self.alive.append(sum(ref() is not None for ref in self._inputs))
            if self.names[-1].startswith("conv2d_backward"):
                self._inputs.append(weakref.ref(args[1]))
        return func(*args, **(kwargs or {}))


def test_backward_is_one_operator_a_layer_where_no_pool_is_below() -> None:
    x, layers = operands("unpooled")
    with fastconv.use_backend("aten"):
        y = FC.conv_chain(x, layers)
    with _Watch() as watch:
        y.sum().backward()
    assert watch.names == ["relu_backward", "conv2d_backward_relu", "conv2d_backward_relu", "conv2d_backward"]
    assert watch.backends == {"aten"}, "the backend of the forward serves the backward"
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_maps_are_given_up_on_the_way_down() -> None:
    x, layers = operands("unpooled")
    y = FC.conv_chain(x, layers)
    with _Watch() as watch:
        y.sum().backward()
    assert watch.alive == [0, 0, 0, 0]
