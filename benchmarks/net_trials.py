"""Whole nets: the forward pass of an evaluation, and training steps."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from benchmarks.cases import Net
from benchmarks.measure import Trial, Verdict, is_ours, ours
from fastconv.bench import gate
from fastconv.bench.audit import Audit

_EAGER = "eager_channels_last"


def providers(net: Net, is_step: bool) -> list[str]:
    names = [ours(), _EAGER]
    if not is_step and hasattr(fastconv, "freeze"):
        names.append("fastconv_frozen")
    if net.is_compiled:
        names += ["compile_default"] if is_step else ["compile_default", "compile_freezing"]
    return names


class Batch:
    """Images [N, 3, R, R], channels_last, and labels [N], which all providers share and `fresh` draws anew."""

    def __init__(self, net: Net, dtype: torch.dtype, classes: int) -> None:
        images = torch.empty(net.batch, 3, net.size, net.size, dtype=dtype)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.empty(net.batch, dtype=torch.int64)
        self._classes = classes
        self.fresh()

    def fresh(self) -> None:
        self.images.normal_()
        self.labels.random_(0, self._classes)


class Runner:
    """A provider's own copy of a net, and what it does with a batch."""

    def __init__(self, net: Net, dtype: str, provider: str, weights: Mapping[str, Tensor], is_step: bool) -> None:
        self.provider = provider
        self._autocast = dtype.endswith("_autocast")
        model = net.build("fastconv" if is_ours(provider) else "torch")
        model.load_state_dict(weights)
        model = model.to(memory_format=torch.channels_last).train(is_step)  # type: ignore[call-overload]
        self.model = model if self._autocast else model.to(_maps(dtype))
        self._run: Callable[[Tensor], Tensor] = self.model
        if provider == "fastconv_frozen":
            self._run = fastconv.freeze(self.model)  # type: ignore[attr-defined]
        elif provider.startswith("compile"):
            self._run = torch.compile(self.model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def forward(self, batch: Batch) -> Tensor:
        with torch.inference_mode(), self._dtypes():
            return self._run(batch.images)

    def step(self, batch: Batch) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._dtypes():
            scores = self._run(batch.images)
        F.cross_entropy(scores.float(), batch.labels).backward()
        self._optimizer.step()

    def _dtypes(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._autocast)

    @contextlib.contextmanager
    def first(self) -> Iterator[Audit | None]:
        """Around the first call: ours is audited; one that freezes compiles under the switch that makes it freeze."""
        if is_ours(self.provider):
            with Audit() as audit:
                yield audit
        elif self.provider == "compile_freezing":
            from torch._inductor import config

            with config.patch(freezing=True):
                yield None
        else:
            yield None


def trial(net: Net, dtype: str, is_step: bool, peaks: Mapping[str, int] | None = None) -> Trial:
    """A net's forward pass or training step by every provider, all with the same initial weights."""
    exact = net.build("torch")
    weights = copy.deepcopy(exact.state_dict())
    held = torch.float32 if dtype.endswith("_autocast") else _maps(dtype)
    exact = exact.to(held).double().train(is_step)
    classes = next(m.out_features for m in reversed(list(exact.modules())) if isinstance(m, nn.Linear))
    batch = Batch(net, held, classes)
    runners = {name: Runner(net, dtype, name, weights, is_step) for name in providers(net, is_step)}
    with torch.set_grad_enabled(is_step):
        scores = exact(batch.images.double())
        if is_step:
            F.cross_entropy(scores, batch.labels).backward()
    output_bound, gradient_bound = gate.net_bounds(_maps(dtype), _reductions(exact), fastconv.get_precision() == "fast")

    def check(provider: str) -> Verdict:
        runner = runners[provider]
        with runner.first() as audit:
            output = runner.step(batch) if is_step else runner.forward(batch)
        if audit is not None and (audit.wrong is not None or not audit.calls):
            return Verdict(audit.wrong or "no operator of ours was called", math.inf, math.inf)
        if output is not None:
            largest, rms = gate.errors(output, scores)
            return Verdict(_over("output", rms, output_bound), largest, rms)
        return _gradients(runner.model, exact, gradient_bound)

    calls = {name: _call(runner, batch, is_step) for name, runner in runners.items()}
    suite, direction = ("training", "step") if is_step else ("models", "forward")
    close = torch._dynamo.reset if net.is_compiled else lambda: None
    return Trial(suite, net.case, direction, dtype, calls, check, batch.fresh, peaks or {}, close)


def _call(runner: Runner, batch: Batch, is_step: bool) -> Callable[[], object]:
    return (lambda: runner.step(batch)) if is_step else (lambda: runner.forward(batch))


def _maps(dtype: str) -> torch.dtype:
    """The dtype of a net's maps."""
    found: torch.dtype = getattr(torch, dtype.removesuffix("_autocast"))
    return found


def _reductions(model: nn.Module) -> list[int]:
    """Of each layer with weights, the number of products summed into an element; a norm scales one."""
    return [math.prod(p.shape[1:]) for name, p in model.named_parameters() if name.endswith("weight")]


def _gradients(model: nn.Module, exact: nn.Module, bound: float) -> Verdict:
    """Gradients of all parameters together, and of the worst, where each is held to the bound."""
    wrong, worst, total, size = None, 0.0, 0.0, 0.0
    for (name, own), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        if own.grad is None or theirs.grad is None:
            return Verdict(f"{name} has no gradient", math.inf, math.inf)
        difference, norm = (own.grad.double() - theirs.grad).norm().item(), theirs.grad.norm().item()
        total, size = total + difference**2, size + norm**2
        worst = max(worst, difference / norm)
        wrong = wrong or _over(f"gradient of {name}", difference / norm, bound)
    return Verdict(wrong, worst, math.sqrt(total / size))


def _over(what: str, error: float, bound: float) -> str | None:
    return None if error <= bound else f"{what}: relative error {error:.1e}, allowed {bound:.1e}"
