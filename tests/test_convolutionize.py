"""fastconv.convolutionize: against the original slid window by window, and against the same layers applied densely."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from dense import FLATTENS, AlexNet, LeNet, Tail, assert_slides, doubles, sequential
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fastconv
from fastconv import convert, convolutionize
from fastconv import nn as fast


@pytest.mark.parametrize("flatten", FLATTENS)
def test_sliding(flatten: str) -> None:
    model = LeNet(flatten).double()
    dense = convolutionize(model, (32, 28))
    assert isinstance(dense, LeNet)
    assert (type(model), type(model.fc1), dense.training) == (LeNet, nn.Linear, True)
    assert not [node for node in fx.symbolic_trace(dense).graph.nodes if node.target in ("size", getattr)], (
        "sizes of the flatten"
    )
    assert_slides(dense, model, doubles(2, 2, 41, 39), (32, 28), 4)
    assert_slides(convolutionize(model, (2, 32, 28), dense_max_pool=True), model, doubles(2, 2, 39, 34), (32, 28), 2)


@pytest.mark.parametrize(
    "head",
    [
        lambda: [nn.Flatten(), nn.Linear(125, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.Softmax(dim=-1)],
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 4), nn.LogSoftmax(1)],
        lambda: [nn.AdaptiveMaxPool2d((1, 5)), nn.Flatten(), nn.Linear(25, 4)],
        lambda: [nn.AvgPool2d(5, 1), nn.Conv2d(5, 6, 1), nn.SiLU(), nn.Flatten(), nn.Linear(6, 4)],
        lambda: [fast.GlobalAvgPool2d(), nn.Conv2d(5, 3, 1), nn.Flatten(), nn.Flatten(), nn.Linear(3, 4)],
    ],
    ids=["norm", "global", "adaptive_max", "window", "fastconv"],
)
def test_sliding_sequentials(head: Callable[[], list[nn.Module]]) -> None:
    model = sequential(*head()).double()
    model(doubles(4, 3, 16, 16))  # running statistics that are not the first ones
    for plain in (model, convert(model)):
        dense = convolutionize(plain, 16)
        assert type(dense) is type(plain)
        assert not any(type(layer).__name__.startswith("Adaptive") for layer in dense)
        assert_slides(dense, model, doubles(2, 3, 21, 23), (16, 16), 2)
        assert_slides(convolutionize(plain, 16, dense_max_pool=True), model, doubles(2, 3, 19, 20), (16, 16), 1)
        assert_slides(convert(dense), model, doubles(2, 3, 21, 20), (16, 16), 2)


def test_an_adaptive_pool_of_several_windows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 5)).double()
    dense = convolutionize(model, (10, 11))
    assert (dense[1].kernel_size, dense[1].stride) == ((4, 3), (4, 3))
    x = doubles(2, 3, 18, 17)
    scores = dense(x)
    assert scores.shape == (2, 5, 3, 3)
    torch.testing.assert_close(scores[:, :, 1, 2], model(x[:, :, 4:14, 6:17]))
    with pytest.raises(ValueError, match=r"'1' pools a map of 9×9 to 2×3 by windows of unequal sizes"):
        convolutionize(model, 11)


def test_with_padding_it_is_the_same_layers() -> None:
    model = AlexNet().double()
    dense = convolutionize(model, 63)
    assert type(dense.avgpool) is nn.Identity
    x, larger = doubles(2, 3, 63, 63), doubles(2, 3, 111, 96)
    for mode in (True, False):
        dense.train(mode), model.train(mode)
        results = []
        for run in (lambda x: dense(x).flatten(1), model):  # dropouts draw alike
            torch.manual_seed(3)
            results.append(run(x))
        torch.testing.assert_close(*results)
        gradients = [
            torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in zip(results, (dense, model), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b)
    expected = model.dense(larger)
    assert expected.shape[2:] == (4, 3)
    for run in (dense, convert(dense), convolutionize(convert(model), 63)):
        torch.testing.assert_close(run(larger), expected)
    denser = convolutionize(model, 63, dense_max_pool=True)
    assert denser(x).shape == (2, 5, 1, 1)
    scores = denser(larger)
    assert scores.shape[2:] == (7, 5)
    torch.testing.assert_close(scores[:, :, ::2, ::2], expected)
    # Of every position: the map pooled with stride 1 from one row and column further on has the odd ones.
    maps = model.features[:-1](larger)
    for i, j in ((0, 1), (1, 0), (1, 1)):
        odd = copy.deepcopy(model)
        odd.features = nn.MaxPool2d(3, 2)
        torch.testing.assert_close(scores[:, :, i::2, j::2], odd.dense(maps[:, :, i:, j:]))


@pytest.mark.parametrize("layers", ["torch", "fastconv"])
def test_recipe_net(layers: str) -> None:
    """A padded body of which the last pool is followed by convolutions and a global pool."""
    model = fastconv.models.recipe_net(16, width=4, max_width=6, layers=layers).double()
    x = doubles(2, 3, 25, 24)
    dense = convolutionize(model, 16)
    maps = model.features(x)
    expected = F.avg_pool2d(maps, 4, 1)
    expected = F.conv2d(expected, model.classifier.weight[:, :, None, None], model.classifier.bias)
    assert expected.shape[2:] == (3, 3)
    torch.testing.assert_close(dense(x), expected)
    denser = convolutionize(model, 16, dense_max_pool=True)(x)
    assert denser.shape[2:] == (5, 5)
    torch.testing.assert_close(denser[:, :, ::2, ::2], expected)
    averaged = convolutionize(model, 16, average=True)
    assert all(module.training for module in averaged.modules())
    assert not any(module.training for module in convolutionize(model.eval(), 16, average=True).modules())
    torch.testing.assert_close(averaged(x), expected.mean((2, 3)))
    torch.testing.assert_close(convert(averaged)(x), expected.mean((2, 3)))
    torch.testing.assert_close(averaged(x[..., :16, :16]), model(x[..., :16, :16]))


def test_vgg() -> None:
    with torch.device("meta"):
        for layers, kind in (("torch", nn.Sequential), ("fastconv", fast.ConvChain)):
            model = fastconv.models.vgg(11, num_classes=3, layers=layers)
            dense = convolutionize(model, 224)
            assert type(dense.features) is kind
            assert dense(torch.empty(1, 3, 256, 320)).shape == (1, 3, 2, 4)
            assert convolutionize(model, 224, dense_max_pool=True)(torch.empty(1, 3, 256, 320)).shape == (1, 3, 3, 7)
            assert convolutionize(model, 448).avgpool.kernel_size == (2, 2)


class Residual(nn.Module):
    """What may follow the last strided pool: strides, dilations, additions, concatenations, pools as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.down, self.fc = nn.Conv2d(8, 5, 3, stride=2, padding=1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), kernel_size=3, stride=(2, 3), padding=1)
        x = torch.cat([F.relu(self.a(x) + x), self.norm(self.b(x))], 1)
        x = F.avg_pool2d(F.max_pool2d(x, 2, 1), 2, stride=1)
        return self.fc(self.down(x).mean(dim=(-2, -1)))


def test_layers_behind_the_last_pool() -> None:
    model = Residual().double()
    model(doubles(4, 3, 18, 22))
    model.eval()
    dense, denser = convolutionize(model, (18, 22)), convolutionize(model, (18, 22), dense_max_pool=True)
    for size in ((18, 22), (29, 40), (30, 41)):
        x = doubles(2, 3, *size)
        expected, scores = dense(x), denser(x)
        torch.testing.assert_close(scores[:, :, ::2, ::3], expected)
        assert scores[:, :, 1::2].numel() or size == (18, 22)
    torch.testing.assert_close(dense(x[:, :, :18, :22])[:, :, 0, 0], model(x[:, :, :18, :22]))


class Auxiliary(nn.Module):
    """A second head in training; the heads' forwards flatten by functions, and one has an option."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4 * 4 * 4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor, logits: bool = True) -> Tensor:
            x = self.fc2(F.dropout(F.relu(self.fc1(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))), 0.0, self.training))
            return x if logits else x.softmax(-1)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 5)
        self.head, self.aux = Auxiliary.Head(), Auxiliary.Head()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.conv1(x).relu_()
        aux = self.aux(x) if self.training else None
        x = self.head(self.conv2(x).relu())
        return (x, aux) if aux is not None else x


def test_auxiliary_heads() -> None:
    model = Auxiliary().double()
    dense = convolutionize(model, 14)  # maps of 12 and 8
    x = doubles(2, 3, 22, 18)
    scores, aux = dense(x)
    assert (scores.shape, aux.shape) == ((2, 5, 5, 3), (2, 5, 3, 2))
    window = model(x[:, :, 6:20, 3:17])[1]
    torch.testing.assert_close(aux[:, :, 2, 1], window)
    assert type(dense) is Auxiliary, "the model's own forward stays"
    averaged = convolutionize(model, 14, average=True)
    for a, b in zip(averaged(x), (scores, aux), strict=True):
        torch.testing.assert_close(a, b.mean((2, 3)))
    model.eval(), averaged.eval()
    torch.testing.assert_close(averaged(x), dense.eval()(x).mean((2, 3)))
    torch.testing.assert_close(dense(x)[:, :, 1, 2], model(x[:, :, 2:16, 4:18]))


GLOBAL: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: torch.mean(x, (-1, 2)),
    "keepdim": lambda x: x.mean((2, 3), keepdim=True).flatten(1),
    "function": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).squeeze(),
    "computed window": lambda x: _whole(x),
}


def _whole(x: Tensor) -> Tensor:
    _n, channels, height, width = x.shape
    return F.avg_pool2d(x, (height, width)).reshape(-1, channels)


@pytest.mark.parametrize("name", GLOBAL)
def test_global_averages(name: str) -> None:
    """Behind them one Linear may serve twice."""
    model = Tail(lambda x, fc: fc(torch.relu(fc(GLOBAL[name](x)))), 5).double()
    for option, stride in ((False, 2), (True, 1)):
        assert_slides(convolutionize(model, 16, dense_max_pool=option), model, doubles(2, 3, 19, 21), (16, 16), stride)


class Shifted(nn.Sequential):
    """Makes a tensor on the CPU, so that it does not run on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.ones(3, 1, 1, dtype=x.dtype))


def test_a_model_that_does_not_run_on_meta() -> None:
    model = Shifted(*sequential(nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(125, 4), nn.Dropout())).double()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    dense = convolutionize(model, 16)
    assert torch.equal(torch.get_rng_state(), generator)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), "running statistics stay"
    assert type(dense) is Shifted
    assert_slides(dense, model, doubles(2, 3, 18, 20), (16, 16), 2)


class Gated(nn.Module):
    """Squeeze-and-excitation by Linears, which stays, before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3))))
        return self.fc(torch.flatten(x * gate.view(gate.size(0), -1, 1, 1), 1))


def test_gates_stay() -> None:
    model = Gated().double()
    dense = convolutionize(model, 8)
    assert type(dense.squeeze) is nn.Linear
    x = doubles(2, 3, 11, 9)
    maps = model.conv(x)
    maps = maps * torch.sigmoid(model.squeeze(maps.mean((2, 3))))[:, :, None, None]
    expected = F.conv2d(maps, model.fc.weight.view(5, 4, 6, 6), model.fc.bias)
    torch.testing.assert_close(dense(x), expected)


def test_parameters_and_keys() -> None:
    model = LeNet()
    model.fc2.weight.requires_grad_(False)
    dense = convolutionize(model, (32, 28), average=True)
    own, made = dict(model.named_parameters()), dict(dense.named_parameters())
    assert list(own) == list(made)
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, p in made.items():
        assert p.requires_grad == own[name].requires_grad
        assert p.data_ptr() == own[name].data_ptr()
        assert (p is own[name]) == (not name.startswith("fc") or "bias" in name)
    assert dense.fc1.weight.shape == (7, 4, 5, 4)
    with torch.no_grad():
        dense.fc1.weight.add_(1)
    assert torch.equal(dense.fc1.weight.flatten(1), model.fc1.weight)

    x, other = torch.randn(2, 2, 33, 41), LeNet()
    for target in (dense, convert(dense), nn.Sequential(dense)):
        prefix = "0." if isinstance(target, nn.Sequential) else ""
        other = LeNet()
        target.load_state_dict({prefix + key: value for key, value in other.state_dict().items()})
        torch.testing.assert_close(target.eval()(x), convolutionize(other, (32, 28)).eval()(x).mean((2, 3)))
    shapes = other.state_dict()
    back = {key: value.reshape(shapes[key].shape) for key, value in dense.state_dict().items()}
    LeNet().load_state_dict(back)
    dense.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        dense.load_state_dict({**shapes, "fc1.weight": torch.zeros(7, 79)})


@pytest.mark.parametrize("average", [False, True])
def test_copies(average: bool) -> None:
    dense = convolutionize(LeNet(), (32, 28), dense_max_pool=True, average=average).eval()
    x = torch.randn(2, 2, 40, 41)
    file = io.BytesIO()
    torch.save(dense, file)
    file.seek(0)
    for other in (copy.deepcopy(dense), torch.load(file, weights_only=False)):
        assert type(other) is type(dense)
        assert torch.equal(other(x), dense(x))
        assert other.fc1.weight.data_ptr() != dense.fc1.weight.data_ptr()
        other.train()
        assert not torch.equal(other(x), other(x)), "dropout draws in training"
    compiled = torch.compile(dense, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), dense(x))
