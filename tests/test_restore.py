"""fastconv.restore, and what has to work with a converted net: copies, files, DDP, compile, export, a new head."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agreement import Life, arguments, assert_agrees, disagreements, fresh, live, sgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from zoo import NETS

import fastconv
from fastconv import convert

BY_NAME = {entry.name: entry for entry in NETS}
# A few nets of every kind: functional, Sequential, a ReLU at two sites, a sum, gates, concatenation, heads in training.
FEW = ["lenet5", "vgg11_bn", "resnet_basic", "residual_sequential", "efficientnet", "densenet", "car_truck", "unet"]
# Classes that pickle finds by name; a function's own classes it does not.
SAVED = [*FEW, "googlenet", "resnet_bottleneck", "preact_in_place", "network_in_network", "hooks_record"]

few = pytest.mark.parametrize("name", FEW)
# Nets whose forward torch.export and fullgraph compilation take.
TRACEABLE = ["lenet5", "vgg11_bn", "resnet_basic", "residual_sequential", "car_truck", "unet"]
traceable = pytest.mark.parametrize("name", TRACEABLE)


def _life(name: str, net: nn.Module, dtype: torch.dtype = torch.float64) -> Life:
    return live(BY_NAME[name], net, sgd(net, BY_NAME[name]), dtype)


@cache
def _oracle(name: str) -> Life:
    return _life(name, fresh(BY_NAME[name], torch.float64))


def _assert_lives(name: str, net: nn.Module) -> None:
    """`net`, in float64, lives as the original does."""
    oracle = _oracle(name)
    wrong = disagreements(_life(name, net), oracle, oracle, torch.float64, BY_NAME[name])
    assert not wrong, "\n".join(wrong[:12])


def _settings(net: nn.Module) -> list[tuple[str, type, str, list[str], bool]]:
    """Of every module its place, type, printed settings, attributes, and mode."""
    return [
        (name, type(module), module.extra_repr(), sorted(vars(module)), module.training)
        for name, module in net.named_modules(remove_duplicate=False)
    ]


def _tensors(net: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(tensor)) for name, tensor in (*net.named_parameters(), *net.named_buffers())]


def _outputs(name: str, net: nn.Module) -> list[Any]:
    args, kwargs = arguments(BY_NAME[name], 3, torch.float64)
    torch.manual_seed(4)
    with torch.no_grad():
        return tree_flatten(BY_NAME[name].call(net, *args, **kwargs))[0]


def _assert_same(actual: list[Any], expected: list[Any]) -> None:
    for leaf, wanted in zip(actual, expected, strict=True):
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(leaf, wanted, rtol=1e-10, atol=1e-10)
        else:
            assert leaf == wanted


@pytest.mark.parametrize(
    ("name", "inplace"),
    [
        # The copy of a net that is converted is restored by the same means.
        pytest.param(name, inplace, id=f"{name}-{inplace}", marks=[pytest.mark.slow] * (not inplace and name not in SAVED))
        for inplace in (False, True)
        for name in BY_NAME
    ],
)
def test_restore_gives_the_very_net(name: str, inplace: bool) -> None:
    net = fresh(BY_NAME[name], torch.float32)
    settings, tensors, keys = _settings(net), _tensors(net), list(net.state_dict())
    forwards = [getattr(module.forward, "__func__", module.forward) for module in net.modules()]
    restored = fastconv.restore(convert(net, inplace=inplace))
    assert _settings(restored) == settings
    assert _tensors(restored) == tensors, "the very Parameters and buffers"
    assert list(restored.state_dict()) == keys
    if inplace:
        assert [getattr(module.forward, "__func__", module.forward) for module in restored.modules()] == forwards
    assert not any(type(module).__module__.startswith("fastconv") for module in restored.modules())


@few
def test_restored_lives_as_the_original(name: str) -> None:
    _assert_lives(name, fastconv.restore(convert(fresh(BY_NAME[name], torch.float64))))


@few
def test_restore_after_training(name: str) -> None:
    """What a converted net learned and counted is the restored net's."""
    net, twin = (fresh(BY_NAME[name], torch.float64).train() for _ in range(2))
    converted = convert(net)
    for each in (converted, twin):
        _step(name, each)
    restored = fastconv.restore(converted)
    _assert_same(list(restored.state_dict().values()), list(twin.state_dict().values()))
    for training in (True, False):
        _assert_same(_outputs(name, restored.train(training)), _outputs(name, twin.train(training)))


def _step(name: str, net: nn.Module) -> None:
    optimizer = sgd(net, BY_NAME[name])
    args, kwargs = arguments(BY_NAME[name], 5, torch.float64)
    torch.manual_seed(6)
    leaves = tree_flatten(BY_NAME[name].call(net, *args, **kwargs))[0]
    sum(leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", BY_NAME)
def test_restore_of_a_net_never_converted_changes_nothing(name: str) -> None:
    net = fresh(BY_NAME[name], torch.float32)
    settings, tensors, modules = _settings(net), _tensors(net), list(net.modules())
    forwards = [module.forward for module in modules]
    restored = fastconv.restore(net)
    assert _settings(restored) == settings and _tensors(restored) == tensors
    assert _settings(net) == settings and _tensors(net) == tensors
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert [module.forward for module in modules] == forwards


@few
def test_restore_twice_and_convert_again(name: str) -> None:
    net = fresh(BY_NAME[name], torch.float64)
    converted = convert(net)
    restored = fastconv.restore(fastconv.restore(converted))
    assert _settings(restored) == _settings(net)
    again = convert(restored)
    assert [type(module) for module in again.modules()] == [type(module) for module in converted.modules()]
    _assert_lives(name, again)


@few
def test_deepcopy_is_a_net_of_its_own(name: str) -> None:
    """A copy computes with its own parameters and statistics, not with those of the net that it was copied from."""
    converted = convert(fresh(BY_NAME[name], torch.float64))
    _outputs(name, converted.eval())  # whatever is cached is cached
    twin = copy.deepcopy(converted)
    assert not {tensor.data_ptr() for tensor in twin.parameters()} & {tensor.data_ptr() for tensor in converted.parameters()}
    with torch.no_grad():
        for tensor in (*converted.parameters(), *converted.buffers()):
            tensor.zero_()
    _assert_lives(name, twin)
    restored = fastconv.restore(copy.deepcopy(twin))
    assert _settings(restored)[0][1] is type(fresh(BY_NAME[name], torch.float32))


def _pickled(net: nn.Module, path: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def _saved(net: nn.Module, path: Path) -> nn.Module:
    torch.save(net, path / "net.pt")
    return torch.load(path / "net.pt", weights_only=False)


def _state(net: nn.Module, path: Path) -> nn.Module:
    """Weights only, into a net that was converted after it was made."""
    torch.save(net.state_dict(), path / "state.pt")
    net = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    net.load_state_dict(torch.load(path / "state.pt", weights_only=True))
    return net


# torch.save pickles too; a state is of tensors, whatever the net.
_FILES = [(_pickled, name) for name in SAVED] + [
    (way, name) for way in (_saved, _state) for name in ("lenet5", "resnet_basic")
]


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(way, name, id=f"{way.__name__}-{name}", marks=[pytest.mark.slow] * ((way, name) not in _FILES))
        for way in (_pickled, _saved, _state)
        for name in SAVED
    ],
)
def test_files(name: str, way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    net = way(convert(fresh(BY_NAME[name], torch.float64)), tmp_path)
    assert isinstance(net, type(fresh(BY_NAME[name], torch.float32)))
    _assert_lives(name, net)


@few
def test_a_plain_checkpoint_loads_and_back(name: str) -> None:
    """A checkpoint of the original with its optimizer goes into a converted net, and a converted net's into the original."""
    net = fresh(BY_NAME[name], torch.float64).train()
    optimizer = sgd(net, BY_NAME[name])
    buffer = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    converted = convert(fresh(BY_NAME[name], torch.float64))
    state = torch.load(buffer, weights_only=True)
    converted.load_state_dict(state["net"])
    sgd(converted, BY_NAME[name]).load_state_dict(state["optimizer"])
    _assert_lives(name, converted)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@few
@pytest.mark.usefixtures("group")
def test_ddp(name: str) -> None:
    """Gradients through DistributedDataParallel are the plain net's; its hooks and buffers' broadcast work."""
    net, twin = (fresh(BY_NAME[name], torch.float64).train() for _ in range(2))
    wrapped = DistributedDataParallel(convert(net))
    args, kwargs = arguments(BY_NAME[name], 8, torch.float64)
    for each in (wrapped, twin):
        torch.manual_seed(9)
        leaves = tree_flatten(each(*args, **kwargs))[0]
        sum(leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor)).backward()
    _assert_same([p.grad for p in wrapped.module.parameters()], [p.grad for p in twin.parameters()])
    _assert_same(list(wrapped.module.state_dict().values()), list(twin.state_dict().values()))


def _seconds(name: str) -> Any:
    """Compilations take seconds each: those of every kind are slow tests."""
    return name if name in ("lenet5", "residual_sequential") else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [_seconds(name) for name in TRACEABLE])
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_compile(name: str, backend: str, training: bool) -> None:
    """One graph: a converted net breaks none that the original does not break."""
    torch._dynamo.reset()
    net, twin = (fresh(BY_NAME[name], torch.float64).train(training) for _ in range(2))
    compiled = torch.compile(convert(net), backend=backend, fullgraph=True)
    args, kwargs = arguments(BY_NAME[name], 10, torch.float64)
    results = []
    for each in (compiled, twin):
        leaves = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.manual_seed(11)
                leaves += tree_flatten(each(*args, **kwargs))[0]
        sum(leaf.square().mean() for leaf in leaves if leaf.requires_grad).backward()
        results.append(
            [leaf.detach() for leaf in leaves] + [p.grad for p in each.parameters()] + [*each.state_dict().values()]
        )
    _assert_same(*results)


@traceable
@pytest.mark.parametrize("training", [True, False])
def test_export(name: str, training: bool) -> None:
    net = fresh(BY_NAME[name], torch.float64).train(training)
    args, kwargs = arguments(BY_NAME[name], 12, torch.float64)
    exported = torch.export.export(convert(net), args, kwargs or None).module()
    twin = fresh(BY_NAME[name], torch.float64).train(training)
    results = []
    for each in (exported, twin):
        torch.manual_seed(13)
        results.append(tree_flatten(each(*args, **kwargs))[0])
    _assert_same(*results)
    assert {key for key, _ in exported.named_parameters()} == {key for key, _ in twin.named_parameters()}


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet_basic", "car_truck", "densenet"])
@pytest.mark.parametrize("norms_in_eval", [False, True])
def test_frozen_features_with_a_trained_head(name: str, norms_in_eval: bool) -> None:
    """Only the head learns: features get no gradient, keep their statistics where in eval, and agree."""
    nets = [fresh(BY_NAME[name], torch.float64) for _ in range(2)]
    nets[0] = convert(nets[0])
    results = []
    for net in nets:
        head = list(net.modules())[-1]
        assert isinstance(head, nn.Linear)
        net.requires_grad_(False)
        head.requires_grad_(True)
        net.train()
        if norms_in_eval:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        before = copy.deepcopy(net.state_dict())
        for _ in range(3):
            _step(name, net)
        after = net.state_dict()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        prefix = next(key for key, module in net.named_modules() if module is head)
        expected = {f"{prefix}.weight", f"{prefix}.bias"}
        statistics = {key for key in after if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
        assert moved == (expected if norms_in_eval else expected | statistics)
        results.append([*after.values(), *_outputs(name, net.eval())])
    _assert_same(*results)


@few
def test_weights_changed_behind_the_nets_back(name: str) -> None:
    """Nothing of a weight or a statistic is remembered: in-place writes, .data, a new Parameter, a cast there and back."""
    net, twin = (fresh(BY_NAME[name], torch.float64).eval() for _ in range(2))
    converted = convert(net)
    for change in (_halve, _data, _replace, _cast):
        _assert_same(_outputs(name, converted), _outputs(name, twin))
        for each in (converted, twin):
            change(each)
    _assert_same(_outputs(name, converted), _outputs(name, twin))


def _halve(net: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.5)


def _data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.5 + 0.01


def _replace(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and module.weight is not None:
            module.weight = nn.Parameter(module.weight.detach() * 0.75)
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var = module.running_var * 2


def _cast(net: nn.Module) -> None:
    net.float().double()


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restored_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    original, oracle = (_life(name, fresh(BY_NAME[name], kind), kind) for kind in (dtype, torch.float64))
    assert_agrees(BY_NAME[name], lambda net: fastconv.restore(convert(net)), dtype, (original, oracle))
