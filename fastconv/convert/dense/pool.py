"""The last max-pool with stride 1, and all that follows dilated."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn
from torch.nn.modules.utils import _pair

from fastconv import nn as fast
from fastconv.convert.dense.calls import POINTWISE, POINTWISE_MODULES, POOLED, Calls, after, argument, before
from fastconv.convert.dense.edits import Convolve, Edit, Pair, Spread, Window

# Element by element, or over channels only.
_UNCHANGED = (*POINTWISE_MODULES, nn.BatchNorm2d, fast.BatchNormReLU2d, nn.Dropout2d)
_CONVS = (nn.Conv2d, fast.Conv2d, fast.ConvReLU2d)
_WHAT = "convolutionize: dense_max_pool=True, but"


def unstride_last_pool(calls: Calls, edits: dict[fx.Node, Edit], flatten: fx.Node, flat: set[fx.Node]) -> None:
    """Add to `edits` stride 1 for the last strided max-pool before `flatten`, and its stride as dilation of what follows.

    Position s · i of the denser maps is position i of the sparse ones, at every layer: padding grows with the dilation, and
    what lies past the edge of one lies past that of the other.

    Args:
        flat: the nodes of heads, behind the flatten; those that are edited are dilated too.

    Raises:
        ValueError: there is none, paths lead around it, or a layer behind it cannot be dilated.
    """
    earlier = set(before(flatten))
    pools = [node for node in calls.graph.nodes if node in earlier and calls.max_pool_stride(node) not in (None, (1, 1))]
    if not pools:
        raise ValueError(f"{_WHAT} no max-pool with a stride above 1 comes before the flatten")
    pool = pools[-1]
    if any(node.op == "placeholder" for node in before(flatten, without=pool)):
        raise ValueError(f"{_WHAT} {calls.say(pool)} is not on every path to the flatten")
    factor, module = calls.max_pool_stride(pool), calls.module(pool)
    assert factor is not None
    if module.pool_ceil_mode if isinstance(module, POOLED) else calls.window(pool).ceil_mode:
        raise ValueError(
            f"{_WHAT} {calls.say(pool)} has ceil_mode=True: windows past the edge have no place among those of stride 1"
        )
    pooled = isinstance(module, POOLED)
    edits[pool] = Spread(unstrided=True) if pooled else replace(calls.window(pool), stride=(1, 1))
    for node in after(pool):
        if "shape" in node.meta and node.op != "output" and (node in edits or node not in flat):
            _dilate(calls, edits, node, factor)


def _dilate(calls: Calls, edits: dict[fx.Node, Edit], node: fx.Node, factor: Pair) -> None:
    edit, module = edits.get(node), calls.module(node)
    if isinstance(edit, (Convolve, Window)):
        one = edit.size[1:] if isinstance(edit, Convolve) else edit.kernel_size
        if one != (1, 1):
            edits[node] = replace(edit, dilation=factor)
    elif edit is not None or type(module) in _UNCHANGED or calls.calls(node, POINTWISE | {"cat", "concat"}):
        return
    elif (type(module) in _CONVS or isinstance(module, POOLED)) and _can_spread(module):
        edits[node] = Spread(factor)
    elif calls.is_pool(node) and _is_bare(calls, node):
        window = calls.window(node)
        edits[node] = replace(window, dilation=(window.dilation[0] * factor[0], window.dilation[1] * factor[1]))
    else:
        raise ValueError(f"{_WHAT} {calls.say(node)} behind the last strided max-pool cannot be dilated")


def _can_spread(module: nn.Module | None) -> bool:
    """Whether zeros around the map, as many as wanted, are all that the layer reads past its edge."""
    if isinstance(module, POOLED) and (_pair(module.pool_padding) != (0, 0) or module.pool_ceil_mode):
        return False
    if not isinstance(module, nn.Conv2d) or module.padding in ("valid", (0, 0)):
        return True
    # An odd number of zeros lies unevenly around the map, and twice as many evenly.
    even = all(d * (k - 1) % 2 == 0 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding_mode == "zeros" and (module.padding != "same" or even)


def _is_bare(calls: Calls, node: fx.Node) -> bool:
    """Whether a pool reads whole windows of its map only, and divides by their size."""
    window, module = calls.window(node), calls.module(node)
    divisor = argument(node, 6, "divisor_override") if module is None else getattr(module, "divisor_override", None)
    return window.padding == (0, 0) and not window.ceil_mode and (window.kind == "max" or divisor is None)
