"""Who runs a call: the choice of a backend, and what every backend offers.

A backend is a module with a `NAME`, `supports(...)` and one launcher for each entry of `Launchers`. A launcher allocates
its outputs and launches; it gets checked tensors of any strides and a geometry, and may return any dense memory format.

`requested()` is one setting of the process, as torch.backends' are: it comes from the environment variable
FASTCONV_BACKEND, `use_backend` changes it. The request in force in a forward travels to that call's backward.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast

import torch
from torch import Tensor

from fastconv import tuning
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.precision import policy as policy_of

NAMES = ("triton", "native", "aten")
REQUESTS = ("auto", *NAMES)

# Of a batch normalisation, one value a channel each: (mean, biased variance).
Statistics = tuple[Tensor, Tensor]
_VARIABLE = "FASTCONV_BACKEND"

_log = logging.getLogger("fastconv")

# The backends that automatic choices have fallen on in this process; whoever wants to know clears it before.
chosen: set[str] = set()
_noted: set[tuple[object, ...]] = set()  # kinds of choices that are in the log


class Launchers(Protocol):
    """The launchers of a backend: shapes as in the geometry, `x` the input, `grad` a gradient of an output.

    Codes of a max-pool (geometry.code_dtype): 0 where ReLU closed the window, else 1 + row · KW + column of the winner.
    Bias gradients are sums over (N, H, W), accumulated in float32 (float64 for float64) in a fixed order.
    """

    NAME: str

    def supports(
        self, op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, device_type: str
    ) -> str | None:
        """None where it can serve the call, else the reason why not."""

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        g: ConvGeometry,
        policy: Policy,
        relu: bool,
        prepared: Tensor | None = None,
    ) -> Tensor:
        """conv2d(x, weight, bias) + residual, then ReLU (NaN stays NaN) when `relu`.

        `prepared`: what `prepare_conv2d` made of the weight, for those who have a use for it.
        """

    def conv2d_relu_max_pool2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        pool: PoolGeometry,
        policy: Policy,
        prepared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(max_pool2d(relu(conv2d(x, weight, bias))), code); `prepared` as in conv2d."""

    def conv2d_input_grad(self, grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
        """torch.nn.grad.conv2d_input."""

    def conv2d_weight_grad(self, grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
        """torch.nn.grad.conv2d_weight."""

    def conv2d_relu_weight_grad(
        self,
        grad: Tensor,
        gate: Tensor,
        x: Tensor,
        g: ConvGeometry,
        policy: Policy,
        pool: PoolGeometry | None,
        with_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(weight gradient, bias gradient when `with_bias`) of conv2d_relu; `grad` is of its output, which is the `gate`.

        With a `pool`, of conv2d_relu_max_pool2d, and `gate` is the code.
        """

    def conv2d_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy
    ) -> tuple[Tensor, Tensor]:
        """(conv2d_input_grad, conv2d_weight_grad), for those whom doing both at once spares something."""

    def conv2d_input_grad_relu(
        self, grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """relu_backward of conv2d_input_grad, where `gate` is the convolution's own input: the output of a ReLU below."""

    def conv2d_backward_relu(
        self, grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(masked input gradient, weight gradient, bias sum): conv2d_input_grad_relu with gate `x`, conv2d_weight_grad."""

    def bias_grad(self, grad: Tensor) -> Tensor:
        """grad.sum((0, 2, 3))."""

    def relu_backward(self, grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """(where(output <= 0, 0, grad), its sum over (N, H, W) when `with_bias`), in one pass."""

    def max_pool2d(self, x: Tensor, pool: PoolGeometry, relu: bool) -> tuple[Tensor, Tensor]:
        """(max_pool2d(relu(x) if relu else x), code)."""

    def max_pool2d_backward(
        self, grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(the gradient of the unpooled map, its sum over (N, H, W) when `with_bias`)."""

    def avg_pool2d(self, x: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
        """torch.nn.functional.avg_pool2d."""

    def avg_pool2d_backward(
        self, grad: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None
    ) -> Tensor:
        """The gradient of avg_pool2d's input."""

    def global_avg_pool2d(self, x: Tensor) -> Tensor:
        """x.mean((2, 3), keepdim=True)."""

    def global_avg_pool2d_backward(self, grad: Tensor, height: int, width: int) -> Tensor:
        """grad / (height · width), spread over the map."""

    def batch_norm_relu(
        self,
        x: Tensor,
        statistics: Statistics | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Statistics]:
        """(relu((x − mean) / √(var + eps) · weight + bias + residual), (mean, var)).

        Without `statistics` the batch's own are taken, and returned in float32 (float64 for float64).
        """

    def batch_norm_relu_max_pool2d(
        self,
        x: Tensor,
        statistics: Statistics | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        pool: PoolGeometry,
    ) -> tuple[Tensor, Tensor, Statistics]:
        """(max_pool2d of batch_norm_relu, code, statistics)."""

    def batch_norm_relu_backward(
        self,
        grad: Tensor,
        gate: Tensor,
        x: Tensor | None,
        statistics: Statistics,
        weight: Tensor | None,
        eps: float,
        training: bool,
        pool: PoolGeometry | None,
        with_input: bool,
        with_residual: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(x's gradient when `with_input`, sums where `x` is given, the residual's gradient when `with_residual`).

        The closed gradient is where(gate <= 0, 0, grad), `gate` the output; with a `pool` its unpooled gradient, `gate`
        the code. The sums, [2, C] of the statistics' dtype, are the bias's gradient and the weight's: of the closed
        gradient, and of its products with the normalised x. When `training`, with `x` given, the statistics depend on x.
        """

    def batch_norm_update(
        self, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
    ) -> None:
        """In place: running = (1 − momentum) · running + momentum · batch, with var · count / (count − 1)."""


def check_request(name: str, source: str = "use_backend") -> str:
    if name not in REQUESTS:
        raise ValueError(f"{source}: unknown backend {name!r}; allowed: {', '.join(map(repr, REQUESTS))}")
    return name


_requested = check_request(os.environ.get(_VARIABLE) or "auto", _VARIABLE)


def requested() -> str:
    """The backend asked for: 'auto' or one of NAMES."""
    return _requested


class use_backend:
    """Ask for a backend, from now on or for the length of a `with` block.

    Args:
        name: 'auto' (the default: per shape and direction, the fastest known), 'triton', 'native' or 'aten'. A named
            backend uses only its own kernels and raises where it cannot serve a call.

    Raises:
        ValueError: `name` is none of these.

    Example:
        >>> fastconv.use_backend("aten")            # doctest: +SKIP
        >>> with fastconv.use_backend("triton"):    # doctest: +SKIP
        ...     y = fastconv.functional.conv2d_relu(x, weight)
    """

    def __init__(self, name: str) -> None:
        global _requested
        self._name = check_request(name)
        self._before: list[str] = []  # what each block entered goes back to
        self._replaced: str | None = _requested  # by this call, until a block is entered
        _requested = name

    def __enter__(self) -> use_backend:
        global _requested
        in_force = _requested == self._name
        self._before.append(self._replaced if in_force and self._replaced is not None else _requested)
        self._replaced = None
        _requested = self._name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._before.pop()


def load(name: str) -> Launchers:
    """A backend's module. Importing one never needs what it drives: a missing library is a reason of `supports`."""
    return cast(Launchers, _modules(name))


@cache
def _modules(name: str) -> object:
    return importlib.import_module(f"fastconv.backends.{name}")


def prepare_conv2d(weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor | None:
    """What the native backend's conv2d_prepared spares its calls; None where that is nothing."""
    from fastconv.backends import native

    return native.prepare(weight, stride, dilation, groups)


def chip(device_type: str, index: int | None = None) -> str:
    """What tables of measurements are keyed by: a GPU's name and compute capability, a CPU's name and torch's threads."""
    return _chip(device_type, torch.get_num_threads() if device_type == "cpu" else index)


@cache
def _chip(device_type: str, number: int | None) -> str:
    if device_type == "cpu":
        return f"{_cpu_name()} cpu-{number}"
    if device_type != "cuda":
        return device_type
    major, minor = torch.cuda.get_device_capability(number)
    return f"{torch.cuda.get_device_name(number)} sm_{major}{minor}"


def _cpu_name() -> str:
    """As Linux tells it; elsewhere the kind of machine."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def select(
    request: str,
    op: str,
    direction: str,
    geometry: ConvGeometry | PoolGeometry,
    policy: Policy,
    tensor: Tensor,
    channels_last: bool,
) -> Launchers:
    """The backend that serves a call on `tensor`'s device.

    Raises:
        RuntimeError: the requested backend cannot serve it; the message holds the reason.
    """
    device = tensor.device
    kind = device.type
    if request == "auto" and kind != "cpu":
        if kind == "meta" and _simulated is not None:
            return _simulate(op, direction, geometry, policy, _simulated, channels_last)
        if kind == "cuda" and channels_last and op == "conv2d_relu" and direction == "forward":
            from fastconv.backends import cudnn

            assert isinstance(geometry, ConvGeometry)
            cudnn.fuses(device, geometry, policy)  # which tuning has to know before it orders candidates
    number = torch.get_num_threads() if kind == "cpu" else device.index
    backend = _select(request, op, direction, geometry, policy, kind, number, channels_last)
    if request == "auto":
        chosen.add(backend.NAME)
    return backend


_simulated: str | None = None


@contextlib.contextmanager
def simulating(chip: str) -> Iterator[None]:
    """Choose for tensors of the meta device as on `chip`, that later choices may depend on earlier ones as they do there."""
    global _simulated
    before, _simulated = _simulated, chip
    try:
        yield
    finally:
        _simulated = before


def _simulate(
    op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, chip: str, channels_last: bool
) -> Launchers:
    """Of ours it is the Triton backend that serves, whose launches can be recorded in place of being run."""
    device_type = "cpu" if tuning.capability(chip) is None else "cuda"
    call = tuning.Call(op, direction, geometry, policy_of(policy.dtype, device_type), chip, channels_last)
    tuning.observe(call)
    names = (candidate.backend for candidate in tuning.pick(*call))
    name = next(name for name in names if load(name).supports(op, direction, geometry, policy, device_type) is None)
    return load("aten" if name == "aten" else "triton")


@tuning.cached_unless_watched
def _select(
    request: str,
    op: str,
    direction: str,
    geometry: ConvGeometry | PoolGeometry,
    policy: Policy,
    device_type: str,
    number: int | None,
    channels_last: bool,
) -> Launchers:
    if request != "auto":
        backend = load(request)
        reason = backend.supports(op, direction, geometry, policy, device_type)
        if reason is not None:
            raise RuntimeError(
                f"{op} ({direction}): backend {request!r} cannot serve this call: {reason}. "
                f"Ask for another one with fastconv.use_backend, or for 'auto'."
            )
        return backend
    call = tuning.Call(op, direction, geometry, policy, _chip(device_type, number), channels_last)
    tuning.observe(call)
    for candidate in tuning.pick(*call):
        name = candidate.backend
        backend = load(name)
        if backend.supports(op, direction, geometry, policy, device_type) is None:
            if (noted := (op, direction, device_type, policy.dtype, name)) not in _noted:
                _noted.add(noted)
                _log.info("backend %s for %s on %s (%s)", name, call, device_type, tuning.explain(*call))
            return backend
    raise RuntimeError(f"{op} ({direction}): no backend serves {policy.dtype} on a {device_type} tensor")
