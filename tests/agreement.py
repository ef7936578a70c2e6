"""Whether a converted net does what the original does: both go through a life of calls and are held against float64.

The rule: an error against the original in float64 is at most FACTOR times the original's own in the dtype at hand, plus
`allowed`. In float64 masks and winners practically never differ, so that there the rule is sharp for gradients too; in
float32 and bfloat16 it says that nothing is lost, doubled, mixed up or rounded more often.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from zoo_case import Net

from fastconv.bench import gate

# The errors of two computations with equally many roundings are of one size, but not equal; Winograd's transforms have up to
# 2.5 times a direct sum's (fastconv.bench.gate), and an output of a few scores is a small sample.
FACTOR = 4.0
# Of float64 gradients against the outputs' bound: normalisation over few elements and two steps of training enlarge errors.
_AMPLIFIED = 1e3
# Of one turned sign, against its share 1/√elements: normalisation over few elements enlarges it. In float32 plain torch's
# ResNet-18 (two images of 64², smallest map 4096 elements) lies up to 0.1 from float64 behind a step, whatever its layout.
_TURNED = 8.0
_STEPS = 2
# Calls with weights that gradients were added to: a ReLU that rounding opened is part of them.
_BEHIND_A_STEP = ("step 1", "eval with gradients", "eval")
_SAMPLE = 2**14  # elements that are kept of one tensor


@dataclass
class Life:
    """What a net gave in its calls.

    Attributes:
        tensors: of (call, kind), by name; kinds are outputs, gradients and state.
        exact: what has to be equal: values that are no tensors, structures, dtypes, which gradients are there, draws.
    """

    tensors: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)

    def keep(self, call: str, kind: str, tree: Any) -> None:
        leaves, structure = tree_flatten(tree)
        self.exact[f"{call}: structure of {kind}"] = structure
        group = self.tensors.setdefault((call, kind), {})
        for index, leaf in enumerate(leaves):
            name = str(index)
            if isinstance(tree, dict) and len(tree) == len(leaves):
                name = str(list(tree)[index])
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                group[name] = _sample(leaf.detach())
                self.exact[f"{call}: {kind} {name}"] = (leaf.dtype, leaf.shape, leaf.requires_grad)
            else:
                self.exact[f"{call}: {kind} {name}"] = leaf.tolist() if isinstance(leaf, Tensor) else leaf


def live(entry: Net, net: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> Life:
    """A net's life: eval, two steps of training, eval with gradients and without, the first weights again, training.

    Args:
        net: in `dtype`; in float32 for bfloat16, which stands for autocast.
        optimizer: of its parameters, made before a conversion.
    """
    life = Life()
    seed = sum(map(ord, entry.name))
    at_first = copy.deepcopy(net.state_dict())

    def call(name: str, grad: bool, again: bool = False, step: bool = False) -> None:
        args, kwargs = arguments(entry, seed + len(life.exact), torch.float32 if dtype == torch.bfloat16 else dtype, again)
        leaves = [leaf.requires_grad_(grad) for leaf in tree_flatten((args, kwargs))[0] if _is_float(leaf)]
        # Clones, since a net may write to its input, which a leaf with gradients does not allow.
        handed = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            if dtype == torch.bfloat16:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if entry.drops:
                stack.enter_context(_LogicalDraws())
            torch.manual_seed(seed)
            random.seed(seed + len(life.exact))
            outputs = entry.call(net, *handed[0], **handed[1])
        life.exact[f"{name}: draws"] = (torch.rand(1).item(), random.random())
        life.keep(name, "outputs", outputs)
        life.keep(name, "inputs", handed)
        if grad:
            optimizer.zero_grad()
            _loss(outputs).backward()
            life.keep(name, "gradients", {f"input {index}": leaf.grad for index, leaf in enumerate(leaves)})
            life.keep(name, "gradients of parameters", {key: p.grad for key, p in net.named_parameters()})
        life.keep(name, "seen", entry.seen(net))
        if step:
            optimizer.step()
        life.keep(name, "state", net.state_dict())

    net.eval()
    call("first eval", grad=False)
    net.train()
    entry.alter(net)
    modes = {name: module.training for name, module in net.named_modules()}
    for index in range(_STEPS):
        call(f"step {index}", grad=True, again=index > 0, step=True)
    net.eval()
    call("eval with gradients", grad=True)
    call("eval", grad=False, again=True)
    net.load_state_dict(at_first)
    call("eval with the first weights", grad=False)
    for name, module in net.named_modules():
        module.training = modes.get(name, True)
    call("last training", grad=True, again=True)
    return life


def disagreements(converted: Life, original: Life, oracle: Life, dtype: torch.dtype, entry: Net) -> list[str]:
    """What of a converted net's life is not as it should be."""
    wrong = [
        f"{key}: {converted.exact.get(key)} instead of {original.exact.get(key)}"
        for key in {**original.exact, **converted.exact}
        if converted.exact.get(key) != original.exact.get(key)
    ]
    if wrong:
        return wrong
    for group, expected in oracle.tensors.items():
        scale = max((_rms(tensor) for tensor in expected.values()), default=0.0)
        stepped = group[0] in _BEHIND_A_STEP or group == ("step 0", "state")
        bound = allowed(dtype, entry, "gradients" in group[1], stepped) * scale
        for name, tensor in expected.items():
            error, own = (_rms(life.tensors[group][name] - tensor) for life in (converted, original))
            if not error <= FACTOR * own + bound:
                wrong.append(
                    f"{' '.join(group)} {name}: error {error:.2e}, the original's {own:.2e}, allowed beside {bound:.2e}"
                )
    return wrong


def allowed(dtype: torch.dtype, entry: Net, gradient: bool, stepped: bool) -> float:
    """The error allowed in units of the largest size in a group of tensors, beside the original's: gate.net_bounds.

    Its shares of signs turned by rounding are means: where one turns in the smallest map, it is one of few.

    Args:
        stepped: behind a step of training, to whose gradients such a sign belongs.
    """
    reductions, elements = _sizes(entry)
    output, of_gradient = gate.net_bounds(dtype, reductions, transformed=True)
    if dtype == torch.float64:
        return _AMPLIFIED * output
    return (1 + stepped) * max(of_gradient, _TURNED / math.sqrt(elements)) if gradient or stepped else output


@cache
def _sizes(entry: Net) -> tuple[list[int], int]:
    """Products summed into an element, layer by layer, and the elements of the smallest map of a layer."""
    net, elements = fresh(entry, torch.float32).eval(), []
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    reductions = [layer.weight[0].numel() for layer in layers if not isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_hook(
            lambda module, args, output: elements.append(output.numel()) if output.dim() == 4 else None
        )
    args, kwargs = arguments(entry, 0, torch.float32)
    with torch.no_grad():
        entry.call(net, *args, **kwargs)
    return reductions or [1], min(elements, default=1)


def assert_agrees(entry: Net, convert: Callable[[nn.Module], nn.Module], dtype: torch.dtype, lives: Sequence[Life]) -> None:
    """`convert`ed, the net lives as the original does.

    Args:
        lives: the original's in `dtype`, and in float64.
    """
    net = fresh(entry, dtype)
    optimizer = sgd(net, entry)
    expected, oracle = lives
    wrong = disagreements(live(entry, convert(net), optimizer, dtype), expected, oracle, dtype, entry)
    assert not wrong, "\n".join(wrong[:12])


def fresh(entry: Net, dtype: torch.dtype) -> nn.Module:
    """The entry's net with its one set of weights; in float32 for bfloat16, which stands for autocast."""
    torch.manual_seed(sum(map(ord, entry.name)))
    random.seed(0)
    net = entry.build()
    return net.double() if dtype == torch.float64 else net


def sgd(net: nn.Module, entry: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=entry.learning_rate, momentum=0.9)


def arguments(entry: Net, seed: int, dtype: torch.dtype, again: bool = False) -> tuple[Any, Any]:
    """Arguments and keyword arguments of a call, the same numbers for every dtype."""
    torch.manual_seed(seed)
    made = ((entry.again or entry.inputs)() if again else entry.inputs(), entry.kwargs())
    return tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, made)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _loss(outputs: Any) -> Tensor:
    """A sum over all outputs in random directions, the same for every dtype."""
    generator = torch.Generator().manual_seed(7)
    leaves = [leaf for leaf in tree_flatten(outputs)[0] if _is_float(leaf) and leaf.requires_grad]
    sums = [
        (leaf.double() * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)).sum()
        / max(leaf.numel(), 1) ** 0.5
        for leaf in leaves
    ]
    return torch.stack(sums).sum()


def _sample(tensor: Tensor) -> Tensor:
    """A copy, since later calls write to parameters and statistics; of a large tensor some elements, always the same."""
    if tensor.numel() > _SAMPLE:
        places = torch.randint(tensor.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(tensor.numel()))
        tensor = tensor[torch.unravel_index(places, tensor.shape)]
    return tensor.double().clone()


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


class _LogicalDraws(TorchDispatchMode):
    """Dropout's masks in the order of indices, so that nets with maps in other layouts drop the same elements."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float and not args[0].is_contiguous():
            mask = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
            return args[0].copy_(func(mask, *args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))
