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
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.bench import gate
from fastconv.bench.audit import Audit
from fastconv.bench.records import is_ours
from fastconv.bench.suites.cases import Net
from fastconv.bench.suites.providers import forget_compiled, layout
from fastconv.bench.trial import Trial, Verdict, Work, ours, torch_dtype

_MODES = {"compile_max_autotune": "max-autotune"}  # with CUDA graphs, as a user gets it
_WARM = 3  # steps before a capture


def providers(net: Net, is_step: bool, device_type: str, compiled: bool = True) -> list[str]:
    """Those that a net is measured by; without `compiled` those alone that are ready in no time."""
    names = [ours(), "eager_channels_last", "eager_nchw"]
    on_gpu = device_type == "cuda"
    if not is_step and not on_gpu:
        names.append("fastconv_frozen")
    if net.is_compiled and compiled:
        names += ["compile_default", "compile_max_autotune"] if on_gpu else ["compile_default"]
        names += [] if is_step or on_gpu else ["compile_freezing"]
    if is_step and net.is_captured and on_gpu:
        names += ["fastconv_cuda_graph", "eager_cuda_graph"]
    return names


class Batch:
    """Images [N, 3, R, R] in both memory formats, and labels [N], which all providers share and `fresh` draws anew."""

    def __init__(self, net: Net, dtype: torch.dtype, classes: int, device: torch.device) -> None:
        self.nchw = torch.empty(net.batch, 3, net.size, net.size, dtype=dtype, device=device)
        self.images = self.nchw.contiguous(memory_format=torch.channels_last)
        self.labels = torch.empty(net.batch, dtype=torch.int64, device=device)
        self._classes = classes
        self.fresh()

    def fresh(self) -> None:
        self.nchw.normal_()
        self.images.copy_(self.nchw)
        self.labels.random_(0, self._classes)


class Runner:
    """A provider's own copy of a net, and what it does with a batch."""

    def __init__(
        self, net: Net, dtype: str, provider: str, weights: Mapping[str, Tensor], is_step: bool, device: torch.device
    ) -> None:
        self.provider = provider
        self._autocast = dtype.endswith("_autocast")
        self._device = device
        model = net.build("fastconv" if is_ours(provider) else "torch")
        model.load_state_dict(weights)
        model = model.to(device).to(memory_format=layout(provider)).train(is_step)  # type: ignore[call-overload]
        self.model = model if self._autocast else model.to(torch_dtype(dtype))
        self._run: Callable[[Tensor], Tensor] = self.model
        if provider == "fastconv_frozen":
            self._run = fastconv.freeze(self.model)
        elif provider.startswith("compile"):
            self._run = torch.compile(self.model, mode=_MODES.get(provider), dynamic=False)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self._replay: Callable[[], object] | None = None

    def act(self, batch: Batch, is_step: bool) -> Tensor | None:
        """A step, which leaves gradients, or the output of a forward pass."""
        if not is_step:
            return self.forward(batch)
        self.step(batch)
        return None

    def forward(self, batch: Batch) -> Tensor:
        with torch.inference_mode(), self._dtypes():
            return self._run(self._images(batch))

    def step(self, batch: Batch) -> None:
        if not self.provider.endswith("cuda_graph"):
            self._step(batch)
            return
        if self._replay is None:
            self._replay = self._captured(batch)
        self._replay()

    def _step(self, batch: Batch) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._dtypes():
            scores = self._run(self._images(batch))
        F.cross_entropy(scores.float(), batch.labels).backward()
        self._optimizer.step()

    def _captured(self, batch: Batch) -> Callable[[], object]:
        """A whole step as a CUDA graph, which reads the batch where it lies; weights are what they were before."""
        before = copy.deepcopy(self.model.state_dict())
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                self._step(batch)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._step(batch)
        self.model.load_state_dict(before)
        for state in self._optimizer.state.values():
            state["momentum_buffer"].zero_()
        return graph.replay

    def _images(self, batch: Batch) -> Tensor:
        return batch.nchw if layout(self.provider) is torch.contiguous_format else batch.images

    def _dtypes(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)

    @contextlib.contextmanager
    def first(self) -> Iterator[Audit | None]:
        """Around the first call: ours is audited; one that freezes compiles under the switch that makes it freeze."""
        if is_ours(self.provider) and not self.provider.endswith("cuda_graph"):
            with Audit() as audit:
                yield audit
        elif self.provider == "compile_freezing":
            from torch._inductor import config

            with config.patch(freezing=True):
                yield None
        else:
            yield None


def trial(
    net: Net,
    dtype: str,
    is_step: bool,
    device: torch.device,
    peaks: Mapping[str, int] | None = None,
    compiled: bool = True,
) -> Trial:
    """A net's forward pass or training step by each of `providers`, all with the same initial weights."""
    exact = net.build("torch")
    weights = copy.deepcopy(exact.state_dict())
    held = torch.float32 if dtype.endswith("_autocast") else torch_dtype(dtype)
    exact = exact.to(device=device, dtype=held).double().train(is_step)
    classes = next(m.out_features for m in reversed(list(exact.modules())) if isinstance(m, nn.Linear))
    batch = Batch(net, held, classes, device)
    with torch.set_grad_enabled(is_step), gate.searching(False):
        scores = exact(batch.images.double())
        if is_step:
            F.cross_entropy(scores, batch.labels).backward()
    scores = scores.detach()
    names = providers(net, is_step, device.type, compiled)
    if "compile_max_autotune" in names:
        torch._dynamo.mark_static_address(batch.images)  # or its graph would copy what the others read in place
    runners = {name: Runner(net, dtype, name, weights, is_step, device) for name in names}
    is_transformed = device.type == "cpu" and fastconv.get_precision() == "fast"
    bounds = gate.net_bounds(torch_dtype(dtype), _reductions(exact), is_transformed, dtype == "tf32")
    output_bound, gradient_bound = bounds

    def check(provider: str) -> Verdict:
        runner = runners[provider]
        with runner.first() as audit:
            output = runner.act(batch, is_step)
        if audit is not None and (audit.wrong is not None or not audit.calls):
            return Verdict(audit.wrong or "no operator of ours was called", math.inf, math.inf)
        if output is not None:
            largest, rms = gate.errors(output, scores)
            return Verdict(_over("output", rms, output_bound), largest, rms)
        return _gradients(runner.model, exact, gradient_bound)

    calls = {name: _call(runner, batch, is_step) for name, runner in runners.items()}
    suite, direction = ("training", "step") if is_step else ("models", "forward")
    what = (suite, net.case, direction, dtype)
    work, close = Work(flops(net, is_step)), forget_compiled(calls)
    return Trial(*what, device, calls, check, batch.fresh, work, records=is_step, peaks=peaks or {}, close=close)


def flops(net: Net, is_step: bool) -> int:
    """Operations by the definition, of products alone."""
    with torch.device("meta"):
        model, images = net.build("torch").train(is_step), torch.empty(net.batch, 3, net.size, net.size)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_step):
        output = model(images)
        if is_step:
            output.sum().backward()
    return int(counter.get_total_flops())


def _call(runner: Runner, batch: Batch, is_step: bool) -> Callable[[], object]:
    return lambda: runner.act(batch, is_step)


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
