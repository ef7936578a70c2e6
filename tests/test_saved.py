"""What chains hold in memory: the bytes that autograd saves, counted to the last, and the peak of a training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastconv
import fastconv.functional as FC
from fastconv.bench.saved import peak_bytes, saved_bytes
from fastconv.functional import ConvLayer
from fastconv.models import recipe_net, vgg

# Each layer: channels out and its window's size, or None. All read (2, 8, 16, 16).
CHAINS: dict[str, list[tuple[int, int | None]]] = {
    "unpooled": [(8, None), (16, None), (8, None), (8, None)],
    "mixed": [(8, None), (16, 2), (8, None), (24, 2)],
    "pooled_then_not": [(16, 2), (8, None), (8, None)],
}


def make(name: str, dtype: torch.dtype = torch.float32, *, scale: int = 1) -> tuple[Tensor, list[ConvLayer]]:
    x = torch.randn(2, 8, 16 * scale, 16 * scale).to(dtype, memory_format=torch.channels_last)
    layers, channels = [], 8
    for out_channels, window in CHAINS[name]:
        weight = nn.Parameter(torch.randn(out_channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last))
        bias = nn.Parameter(torch.randn(out_channels).to(dtype))
        layers.append(ConvLayer(weight, bias, padding=1, pool_kernel_size=window))
        channels = out_channels
    return x, layers


def one_by_one(x: Tensor, layers: list[ConvLayer]) -> Tensor:
    for layer in layers:
        x = FC.conv2d_relu(x, *layer[:6]) if layer[6] is None else FC.conv2d_relu_max_pool2d(x, *layer[:6])
    return x


def test_a_storage_counts_once_and_parameters_not() -> None:
    x, weight = torch.randn(4, 8), nn.Parameter(torch.randn(8, 8))

    def step() -> Tensor:
        y = x @ weight.t()  # saves x and a view of the parameter
        z = y.exp()  # saves z
        return z[:, :4].square() + y[:, 4:].square()  # save views of z and of y

    assert saved_bytes(step) == 3 * 4 * 8 * 4
    with torch.no_grad():
        assert saved_bytes(step) == 0
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(lambda: x @ weight) == (x.numel() + weight.numel()) * 2, "cast copies are not the parameters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_saves_its_inputs_and_codes(name: str, dtype: torch.dtype) -> None:
    x, layers = make(name, dtype)
    expected, last = 0, x
    for layer in layers:
        output = one_by_one(last.detach(), [layer])
        code = 0 if layer.pool_kernel_size is None else output.numel()
        expected, last = expected + last.nbytes + code, output
    if layers[-1].pool_kernel_size is None:
        expected += last.nbytes
    assert saved_bytes(lambda: FC.conv_chain(x, layers)) == expected
    assert saved_bytes(lambda: one_by_one(x, layers)) == expected


def test_what_no_gradient_reads_is_not_saved() -> None:
    """A frozen weight's input, unless a ReLU below is undone by it."""
    x, layers = make("mixed")
    maps = [x, *(one_by_one(x, layers[: i + 1]).detach() for i in range(4))]
    layers[0].weight.requires_grad_(False)
    layers[2].weight.requires_grad_(False)  # above a pool, whose code suffices
    codes = (maps[2].numel(), maps[4].numel())
    assert saved_bytes(lambda: FC.conv_chain(x, layers)) == maps[1].nbytes + maps[3].nbytes + sum(codes)
    layers[1].weight.requires_grad_(False)  # above a ReLU that needs its output
    assert saved_bytes(lambda: FC.conv_chain(x, layers)) == maps[1].nbytes + maps[3].nbytes + sum(codes)


@pytest.mark.parametrize(
    ("build", "shape", "most"),
    [
        (lambda layers: vgg(16, layers=layers), (2, 3, 224, 224), 0.47),
        (lambda layers: recipe_net(224, layers=layers), (2, 3, 224, 224), 0.32),
        (lambda layers: recipe_net(32, layers=layers), (2, 3, 32, 32), 0.46),
    ],
    ids=["vgg16", "recipe_224", "recipe_32"],
)
def test_nets_save_less_than_half_of_what_torch_saves(
    build: Callable[[str], nn.Module], shape: tuple[int, ...], most: float
) -> None:
    """In bfloat16. torch's nets have in-place ReLUs, as torchvision's; without, they save no byte more or less."""
    with torch.device("meta"):
        x = torch.empty(shape, dtype=torch.bfloat16)
        fused, plain = (build(layers).bfloat16() for layers in ("fastconv", "torch"))
        eager = saved_bytes(lambda: plain(x))
        for module in plain.modules():
            if isinstance(module, nn.ReLU):
                assert module.inplace
                module.inplace = False
        assert saved_bytes(lambda: plain(x)) == eager
        assert saved_bytes(lambda: fused(x)) <= most * eager


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_peak_of_a_step_is_not_above_that_of_its_layers(name: str, backend: str) -> None:
    """But for the gradient of the chain's output, which autograd holds until the node has run."""
    x, layers = make(name, scale=2)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling allocates

    def peak(run: Callable[..., Tensor]) -> int:
        for layer in layers:
            layer.weight.grad = layer.bias.grad = None
        return peak_bytes(lambda: run(x, layers).square().sum().backward())

    with fastconv.use_backend(backend):
        peak(FC.conv_chain)  # what is allocated once
        assert peak(FC.conv_chain) <= peak(one_by_one) + FC.conv_chain(x, layers).nbytes


def test_peak_counts_what_is_alive_at_a_time() -> None:
    def step() -> None:
        for _ in range(3):
            torch.ones(1000)
        held = torch.ones(500)
        torch.ones(250)
        del held
        torch.ones(250)

    assert peak_bytes(step) == 1000 * 4
