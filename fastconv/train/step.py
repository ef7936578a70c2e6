"""One step of a training: forward, loss, backward, optimizer; eager, compiled, captured, or over several processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.train.distributed import Group
from fastconv.train.settings import DTYPES, Settings

_RISE = 0.25  # of the steps
_LEAST = 1e-3  # of the highest learning rate
_WARM = 3  # steps before a capture: libraries choose and allocate in the first ones


class Step:
    """A net with its optimizer and its scaler, and the sums of an epoch so far.

    Attributes:
        optimizer, scaler: torch's; the scaler does nothing but in float16.
        growth: bytes that a captured step takes above what was taken before, at most; 0 without a capture.
        loss_sum, right: of this process's images since they were last zero: the sum of their losses, float64, and how many
            were classified rightly, int64; zero-dimensional tensors on the device.
    """

    def __init__(self, model: nn.Module, settings: Settings, group: Group, compiled: bool) -> None:
        self._settings = settings
        self._device = torch.device(settings.device)
        on_gpu = self._device.type == "cuda"
        self._is_captured = on_gpu and group.world == 1 if settings.cuda_graph is None else settings.cuda_graph
        if self._is_captured and group.world > 1:
            raise ValueError(f"train: cuda_graph is of one process, got {group.world} processes")
        self._model = model
        self._frozen = freeze(model, settings.freeze)
        self.optimizer = _optimizer(model, settings, capturable=self._is_captured)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=settings.dtype == "float16")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self.right = torch.zeros((), dtype=torch.int64, device=self._device)
        self._run: Callable[[Tensor], Tensor] = group.parallel(model)
        self._is_compiled, self._is_shared = compiled, group.world > 1
        if compiled:
            # The whole step is captured here, the optimizer with it, for all nets alike.
            self._run = torch.compile(self._run, mode="max-autotune-no-cudagraphs" if on_gpu else None, dynamic=False)
        self.growth = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[Tensor, Tensor] | None = None

    @property
    def gains_by_preparation(self) -> bool:
        """Whether a first step is not like those behind it.

        It takes longer where it compiles or captures. DistributedDataParallel puts gradients into other buckets after its
        first backward, and sums them in another order from then on.
        """
        return self._is_captured or self._is_compiled or self._is_shared

    def mode(self) -> None:
        """Training mode, before an epoch."""
        self._model.train()
        for module in self._frozen:
            module.eval()  # a norm that is not trained keeps its statistics

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float) -> None:
        """Learn from a batch: images [B, C, R, R], labels int64 [B]."""
        if self._is_captured and self._graph is None:
            self.prepare(images, labels)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if self._graph is None or self._static is None:
            self._learn(images, labels)
            return
        for static, fresh in zip(self._static, (images, labels), strict=True):
            static.copy_(fresh)
        self._graph.replay()

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Compile and capture, on a batch of the size of those to come; net, optimizer and random numbers stay the same."""
        tensors = [*self._model.state_dict().values(), self.loss_sum, self.right]
        states = {p: dict(state) for p, state in self.optimizer.state.items()}
        kept = [tensor.clone() for tensor in tensors]
        kept_states = {p: {k: v.clone() for k, v in state.items()} for p, state in states.items()}
        scale = self.scaler.state_dict()
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            if self._is_captured:
                self._capture(images, labels)
            else:
                self._learn(images, labels)
        if self._graph is None:
            self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
            for parameter, state in self.optimizer.state.items():
                for name, value in state.items():
                    if parameter in kept_states:
                        value.copy_(kept_states[parameter][name])
                    else:
                        value.zero_()
        if scale:
            self.scaler.load_state_dict(scale)

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told, before the first step."""
        # Groups hold no more than settings, and perhaps a learning rate on the GPU.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(self._device)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        """The step as a CUDA graph, which reads its batch from tensors of its own."""
        self._static = images.clone(), labels.clone()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True", category=UserWarning)  # not captured yet
            for _ in range(_WARM):
                self._learn(*self._static)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        memory = Growth(self._device)
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._learn(*self._static)
        except RuntimeError as error:
            raise RuntimeError(
                f"train: a step of this net cannot be captured as a CUDA graph; cuda_graph=False (--no-cuda-graph) runs it "
                f"step by step: {error}"
            ) from error
        self.growth = memory.bytes()

    def _learn(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self._settings):
            scores = self._run(images)
        loss = loss_of(scores, labels, self._settings.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.loss_sum += loss * len(labels)
            self.right += (predicted(scores) == labels).sum()


def schedule(progress: float, kind: str) -> float:
    """The share of the highest learning rate after `progress` in [0, 1] of all steps.

    Source:
        Smith and Topin, 2017 (arXiv:1708.07120); Loshchilov and Hutter, 2016 (arXiv:1608.03983).
    """
    rise = _RISE if kind == "one-cycle" else 0.0
    if progress < rise:
        return max(progress / rise, _LEAST)
    return max(0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise))), _LEAST)


def autocast(settings: Settings) -> torch.autocast:
    dtype = DTYPES[settings.dtype]
    return torch.autocast(torch.device(settings.device).type, dtype=dtype, enabled=dtype != torch.float32)


def loss_of(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of scores [B, K]; of one score [B, 1] binary cross-entropy of its sigmoid. Mean over images, float32."""
    if scores.shape[1] > 1:
        return F.cross_entropy(scores.float(), labels, label_smoothing=label_smoothing)
    target = labels.float() * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(scores.float()[:, 0], target)


def predicted(scores: Tensor) -> Tensor:
    """The likeliest class, int64 [B], of scores [B, K], or [B, 1] of class 1."""
    return scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()


def probabilities(scores: Tensor) -> Tensor:
    """Of all classes, float32 [B, K]; of scores [B, 1], [B, 2]."""
    scores = scores.float()
    if scores.shape[1] > 1:
        return scores.softmax(1)
    second = scores.sigmoid()
    return torch.cat((1 - second, second), 1)


def freeze(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Take the parameters of the modules of these names out of the training; the modules.

    Raises:
        ValueError: there is no such module, or nothing is left to train.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"train: freeze must name modules of the net, such as {known}; got freeze={name!r}")
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"train: nothing is left to train with freeze={', '.join(names)}")
    return [modules[name] for name in names]


def _optimizer(model: nn.Module, settings: Settings, capturable: bool) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate: float | Tensor = settings.learning_rate
    if capturable:  # a number would be part of the graph
        rate = torch.tensor(settings.learning_rate, device=settings.device)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=capturable)
    sgd = torch.optim.SGD(groups, lr=rate, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True)
    if settings.momentum:
        # Else they come with the first step, which writes nothing to them where float16 overflows in it.
        for parameter in trained:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class Growth:
    """By how much a GPU's allocated memory grows, at most."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before if self._device.type == "cuda" else 0
