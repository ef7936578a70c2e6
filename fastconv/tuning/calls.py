"""A call as tuning sees it, and the two ways in which a search looks into dispatch: observing calls, forcing a choice."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning.candidates import Candidate

F = TypeVar("F", bound=Callable[..., Any])

CONVOLUTIONS = (
    ("conv2d", "forward"),
    ("conv2d_relu", "forward"),
    ("conv2d_relu_max_pool2d", "forward"),
    ("conv2d", "input_grad"),
    ("conv2d_relu", "input_grad"),
    ("conv2d", "weight_grad"),
)
PASSES = (
    ("conv2d", "bias_grad"),
    ("relu", "backward"),
    ("max_pool2d", "forward"),
    ("relu_max_pool2d", "forward"),
    ("max_pool2d", "backward"),
    ("avg_pool2d", "forward"),
    ("avg_pool2d", "backward"),
    ("global_avg_pool2d", "forward"),
    ("global_avg_pool2d", "backward"),
)


class Call(NamedTuple):
    """What a choice depends on; the arguments of `fastconv.tuning.pick`.

    A 'conv2d_relu_max_pool2d' has a 2×2 pool with stride 2: no other is fused. The 'input_grad' of a 'conv2d_relu' is closed
    by the ReLU of the layer below.
    """

    op: str
    direction: str
    geometry: ConvGeometry | PoolGeometry
    policy: Policy
    chip: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.op} {self.direction} {_sizes(self.geometry)}, {str(self.policy.dtype).removeprefix('torch.')}" + (
            " (TF32)" if self.policy.tf32 else " (direct)" if self.policy.direct else ""
        )


def _sizes(g: ConvGeometry | PoolGeometry) -> str:
    map_size = f"{g.height}x{g.width}"
    kernel = f"{g.kernel_height}x{g.kernel_width}/{g.stride_h}"
    if isinstance(g, PoolGeometry):
        return f"{g.batch}x{g.channels}x{map_size}, {kernel}"
    groups = f", groups {g.groups}" if g.groups > 1 else ""
    return f"{g.batch}x{g.in_channels}x{map_size} to {g.out_channels}, {kernel}{groups}"


_CACHE_SIZE = 4096
_caches: list[Callable[[], None]] = []


def cached(function: F) -> F:
    """Remember what `function` chose, until `forget`."""
    found = lru_cache(_CACHE_SIZE)(function)
    _caches.append(found.cache_clear)
    return found  # type: ignore[return-value]


def cached_unless_watched(function: F) -> F:
    """As `cached`, but asked anew while calls are observed or forced."""
    remembered = cached(function)

    @wraps(function)
    def choose(*args: Any) -> Any:
        return remembered(*args) if _observed is None and _forced is None else function(*args)

    return choose  # type: ignore[return-value]


def forget() -> None:
    """Choose anew from now on: what can run, or the tables, changed."""
    for clear in _caches:
        clear()


_observed: Counter[Call] | None = None
_forced: tuple[Call, Candidate] | None = None


@contextlib.contextmanager
def observing() -> Iterator[Counter[Call]]:
    """Count the calls for which a backend is chosen automatically, in the order in which they first come."""
    global _observed
    before = _observed
    _observed = Counter()
    try:
        yield _observed
    finally:
        _observed = before


def observe(call: Call) -> None:
    if _observed is not None:
        _observed[call] += 1


@contextlib.contextmanager
def forcing(call: Call, candidate: Candidate) -> Iterator[None]:
    """Choose `candidate` for that operator, direction and geometry, whatever tables and models say: for measuring it."""
    global _forced
    before = _forced
    _forced = (call, candidate)
    try:
        yield
    finally:
        _forced = before


def forced(call: Call) -> Candidate | None:
    """The candidate forced for this call. Its chip and layout do not count: the Triton backend asks again with its own."""
    if _forced is None or _forced[0][:3] != call[:3]:
        return None
    return _forced[1]
