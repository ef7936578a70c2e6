"""fastconv.nn.ConvChain: one Function where nothing stands between two layers, torch.nn.Sequential in all else."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastconv import convert
from fastconv import nn as fast


def _plain() -> nn.Sequential:
    """A net in torchvision's manner: nine members, of which three compute."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 4, 3, padding="same"), nn.ReLU(inplace=True)),
    )


def _nodes(output: Tensor) -> list[str]:
    """The names of the Functions and nodes behind `output`, without the accumulation of gradients."""
    names, waiting = [], [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and "Accumulate" not in node.name():
            names.append(node.name())
            waiting += [below for below, _ in node.next_functions]
    return names


ONE = ["ConvChainBackward"]


def _same(module: nn.Module, expected: nn.Module) -> None:
    """Outputs and gradients, in float64 so that no ReLU or winner flips."""
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    module, expected = copy.deepcopy(module).double(), copy.deepcopy(expected).double()
    got, want = module(x), expected(x)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((got, module), (want, expected))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_converted_sequential() -> None:
    plain = _plain()
    chain = convert(plain)
    assert type(chain) is fast.ConvChain
    assert isinstance(chain, nn.Sequential)
    assert type(plain) is nn.Sequential
    assert _nodes(chain(torch.randn(1, 3, 8, 8))) == ONE
    _same(chain, plain)


def test_keys_and_checkpoints_move_both_ways() -> None:
    plain, other = _plain(), _plain()
    chain = convert(plain)
    assert (
        list(chain.state_dict())
        == list(plain.state_dict())
        == [f"{i}.{part}" for i in (0, 2, 5) for part in ("weight", "bias")]
    )
    chain.load_state_dict(other.state_dict())
    _same(plain, other)  # the Parameters are shared
    other = _plain()
    other.load_state_dict(chain.state_dict())
    _same(chain, other)
    named = nn.Sequential(OrderedDict(a=fast.ConvReLU2d(3, 4, 1), b=fast.ConvReLU2d(4, 4, 1)))
    assert list(fast.ConvChain(OrderedDict(named.named_children())).state_dict()) == list(named.state_dict())


def test_slices_and_indexing() -> None:
    plain = _plain()
    chain = convert(plain)
    assert type(chain[:5]) is fast.ConvChain
    assert type(chain[0]) is fast.ConvReLU2d
    assert chain[-2] is chain[5]
    assert len(chain) == len(plain) == 7
    for end in (2, 5):
        _same(chain[:end], plain[:end])
    longer = chain + fast.ConvChain(nn.Conv2d(4, 2, 1))
    _same(longer, nn.Sequential(*plain, longer[-1]))
    chain[5] = nn.Conv2d(8, 2, 1)
    assert _nodes(chain(torch.randn(1, 3, 8, 8)))[-1:] == ONE
    del chain[5:]
    _same(chain, plain[:5])
    assert fast.ConvChain()(1) == 1


def test_converting_twice_changes_nothing() -> None:
    chain = convert(_plain())
    members = list(chain)
    assert convert(chain, inplace=True) is chain
    assert all(a is b for a, b in zip(chain, members, strict=True))
    again = convert(chain)
    assert type(again) is fast.ConvChain
    assert [type(member) for member in again] == [type(member) for member in members]


class Subclass(fast.ConvReLU2d):
    pass


def _hook(chain: nn.Sequential) -> None:
    chain[2].register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook(chain: nn.Sequential) -> None:
    chain[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _backward_hook(chain: nn.Sequential) -> None:
    chain[2].register_full_backward_hook(lambda module, below, above: (below[0] * 2,))


def _patch(chain: nn.Sequential) -> None:
    forward = chain[2].forward
    chain[2].forward = lambda x: forward(x) * 2


def _hook_on_an_identity(chain: nn.Sequential) -> None:
    chain[3].register_forward_hook(lambda module, args, output: output * 2)


def _parametrization(chain: nn.Sequential) -> None:
    parametrizations.weight_norm(chain[2])


def _reflection(chain: nn.Sequential) -> None:
    chain[2].padding_mode = "reflect"


def _subclass(chain: nn.Sequential) -> None:
    chain[2].__class__ = Subclass


@pytest.mark.parametrize(
    "change",
    [_hook, _pre_hook, _backward_hook, _patch, _hook_on_an_identity, _parametrization, _reflection, _subclass],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_member_that_is_more_than_a_layer_runs_by_itself(change: Callable[[nn.Sequential], None]) -> None:
    chain = convert(_plain(), memory_format=None)  # torch's kernels, the same bits in a chain and out of it
    change(chain)
    sequence = nn.Sequential(*chain)
    parts = list(fast.ConvChain.parts(chain))
    assert all(len(part) == 1 for part in parts) or change is _hook_on_an_identity
    x = torch.randn(2, 3, 8, 8)
    got, want = (torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (chain, sequence))
    assert torch.equal(chain(x), sequence(x))
    assert all(map(torch.equal, got, want))


def test_a_forward_patched_onto_the_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, forward = convert(_plain()), fast.ConvReLU2d.forward
    monkeypatch.setattr(fast.ConvReLU2d, "forward", lambda self, x: forward(self, x) * 2)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(chain(x), nn.Sequential(*chain)(x))
    assert all(len(part) == 1 for part in fast.ConvChain.parts(chain))


def test_global_hooks_see_every_member() -> None:
    chain, seen = convert(_plain()), []
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)):
        chain(torch.randn(1, 3, 8, 8))
    assert seen == [*chain, chain]


def test_hooks_on_the_chain_itself_stay() -> None:
    plain, seen = _plain(), []
    plain.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    chain = convert(plain, inplace=True)
    chain(torch.randn(1, 3, 8, 8))
    assert chain is plain
    assert seen == [fast.ConvChain]


def _saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), _saved],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    chain = convert(_plain())
    other = copied(chain)
    assert type(other) is fast.ConvChain
    assert repr(other) == repr(chain)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(other(x), chain(x))
    assert _nodes(other(x)) == ONE
    assert all(p is not q for p, q in zip(other.parameters(), chain.parameters(), strict=True))


def test_replicas_of_data_parallel() -> None:
    """As torch.nn.parallel.replicate makes them: parameters are plain tensors, parts of a graph."""
    chain = convert(_plain())
    replica = chain._replicate_for_data_parallel()
    for name, member in chain.named_children():
        copied = member._replicate_for_data_parallel()
        for key, parameter in member.named_parameters():
            copied._parameters.pop(key, None)
            setattr(copied, key, parameter * 1)
        replica._modules[name] = copied
    x = torch.randn(2, 3, 8, 8)
    got, want = (torch.autograd.grad(m(x).sum(), list(chain.parameters())) for m in (replica, chain))
    assert "ConvChainBackward" in _nodes(replica(x))
    assert all(map(torch.equal, got, want))


def test_functional_call() -> None:
    chain = convert(_plain())
    doubled = {name: p.detach() * 2 for name, p in chain.named_parameters()}
    x = torch.randn(1, 3, 8, 8)
    want = copy.deepcopy(chain)
    want.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(chain, doubled, (x,)), want(x))


def test_symbolic_trace() -> None:
    chain = convert(nn.Sequential(_plain(), nn.Flatten()))
    traced = torch.fx.symbolic_trace(chain)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(traced(x), chain(x))
    assert "ConvChainBackward" in _nodes(traced(x))
    assert [p.shape for p in traced.parameters()] == [p.shape for p in chain.parameters()]


def test_export_and_compile() -> None:
    chain = convert(_plain(), memory_format=None)  # torch's kernels, the same bits in a chain and out of it
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(chain, (x,))
    assert sum("fastconv" in str(node.target) for node in exported.graph.nodes) == 3
    torch.testing.assert_close(exported.module()(x), chain(x))
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(m(x).square().sum(), list(chain.parameters())) for m in (compiled, chain))
    assert all(map(torch.equal, got, want))


def test_train_and_eval() -> None:
    chain = convert(nn.Sequential(_plain(), nn.Dropout(0.5)))
    assert not any(module.training for module in chain.eval().modules())
    x = torch.randn(1, 3, 8, 8)
    evaluated = chain[0](x)
    assert torch.equal(chain(x), evaluated)
    assert all(module.training for module in chain.train().modules())
    assert torch.equal(chain[0](x), evaluated)
    with torch.no_grad():
        assert torch.equal(chain[0](x), evaluated)


def test_per_sample_gradients_of_a_chain() -> None:
    """Batched gradients, with vmap around the chain's backward."""
    chain = convert(_plain())
    y = chain(torch.randn(2, 3, 8, 8))
    several = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, list(chain.parameters()), several, retain_graph=True, is_grads_batched=True)
    for i, gradient in enumerate(several):
        for a, b in zip(torch.autograd.grad(y, list(chain.parameters()), gradient, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(a, b[i])
