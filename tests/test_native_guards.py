"""Every native kernel between guard bands and on misaligned memory: the same bits as without, and nothing touched around."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from guards import guarded, transforming
from test_native_kernels import CONVS, DTYPES, MAPS, POOLS, assert_same, conv_of, few_values, pool_of, random
from torch import Tensor

from fastconv.backends import native, native_amx
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

Results = tuple[Tensor | None, ...]
SHAPES = ((2, 3, 40, 41), (2, 67, 14, 13), (3, 5, 11, 12), (1, 1, 9, 9), (2, 130, 4, 4), (3, 1, 1, 1))
# Beside the shared cases: 3×3 with vectors, tiles and blocks that are whole, short or only one.
PLAIN = ((1, 1, 1, 1, 1), (2, 16, 16, 8, 8), (1, 70, 33, 5, 11), (3, 3, 64, 19, 6), (2, 65, 130, 9, 14), (1, 64, 48, 28, 28))


def convs() -> Iterator[ConvGeometry]:
    yield from map(conv_of, CONVS)
    for batch, inputs, outputs, height, width in PLAIN:
        for pad in (0, 1, 2):
            if min(height, width) + 2 * pad >= 3:
                shape, weight = (batch, inputs, height, width), (outputs, inputs, 3, 3)
                yield ConvGeometry.of("guards", shape, weight, None, (1, 1), (pad, pad), (1, 1), 1)


def conv_calls(dtype: torch.dtype) -> Iterator[Callable[[], Results]]:
    for g in convs():
        x, weight, grad = (random(s, dtype) for s in (g.input_shape, g.weight_shape, g.output_shape))
        bias, residual = torch.randn(g.out_channels).to(dtype), random(g.output_shape, dtype)
        gate = random(g.input_shape, dtype).relu_()
        for policy in (Policy(dtype), Policy(dtype, direct=True)):
            yield lambda g=g, p=policy, x=x, w=weight: (native.conv2d(x, w, None, None, g, p, False),)
            yield lambda g=g, p=policy, x=x, w=weight, b=bias, r=residual: (native.conv2d(x, w, b, r, g, p, True),)
            yield lambda g=g, p=policy, w=weight, d=grad: (native.conv2d_input_grad(d, w, g, p),)
            yield lambda g=g, p=policy, x=x, d=grad: (native.conv2d_weight_grad(d, x, g, p),)
            yield lambda g=g, p=policy, x=x, w=weight, d=grad: native.conv2d_backward(d, x, w, g, p)
            yield lambda g=g, p=policy, w=weight, d=grad, y=gate: native.conv2d_input_grad_relu(d, w, y, g, p, True)
            yield lambda g=g, p=policy, w=weight, d=grad, y=gate: native.conv2d_backward_relu(d, y, w, g, p, True)
            for window in ("2/2", "3/2/1"):
                if min(g.output_shape[2:]) >= 2:
                    pool = pool_of(window, g.output_shape)
                    yield lambda g=g, p=policy, q=pool, x=x, w=weight, b=bias: native.conv2d_relu_max_pool2d(
                        x, w, b, g, q, p
                    )


def pool_calls(dtype: torch.dtype) -> Iterator[Callable[[], Results]]:
    for shape in MAPS:
        for case, (*_, dilation, _) in POOLS.items():
            pool = pool_of(case, shape)
            x, grad, few = random(shape, dtype), random(pool.output_shape, dtype), few_values(shape, dtype)
            _, code = native.max_pool2d(x, pool, relu=True)
            yield lambda p=pool, x=x: native.max_pool2d(x, p, False)
            yield lambda p=pool, x=few: native.max_pool2d(x, p, True)
            yield lambda p=pool, d=grad, c=code: native.max_pool2d_backward(d, c, p, True)
            if dilation == 1:
                yield lambda p=pool, x=x: (native.avg_pool2d(x, p, False, None),)
                yield lambda p=pool, d=grad: (native.avg_pool2d_backward(d, p, True, None),)


def map_calls(dtype: torch.dtype) -> Iterator[Callable[[], Results]]:
    for shape in SHAPES:
        x, grad, small = random(shape, dtype), random(shape, dtype), random((*shape[:2], 1, 1), dtype)
        yield lambda d=grad: (native.bias_grad(d),)
        yield lambda x=x, d=grad: native.relu_backward(d, x, True)
        yield lambda x=x, d=grad: native.relu_backward(d, x, False)
        yield lambda x=x: (native.global_avg_pool2d(x),)
        yield lambda d=small, s=shape: (native.global_avg_pool2d_backward(d, *s[2:]),)


def norm_calls(dtype: torch.dtype) -> Iterator[Callable[[], Results]]:
    for shape in SHAPES:
        mean, var, weight, bias = torch.randn(4, shape[1]).unbind()
        statistics = (mean, var.abs() + 0.5)
        pools = (None, pool_of("2/2", shape), pool_of("3/2/1", shape)) if min(shape[2:]) >= 2 else (None,)
        for pool in pools:
            for training in (True, False):
                if training and shape[0] * shape[2] * shape[3] == 1:
                    continue
                x, residual = random(shape, dtype), random(shape, dtype)
                yield (
                    lambda *a, s=None if training else statistics, x=x, r=residual, p=pool, w=weight, b=bias, t=training: (
                        _norm(x, s, w, b, r, p, t)
                    )
                )


def _norm(
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    pool: PoolGeometry | None,
    training: bool,
) -> Results:
    operands = (x, statistics, weight, bias, residual, 1e-3)
    if pool is None:
        output, found = native.batch_norm_relu(*operands)
        gate = output
    else:
        output, gate, found = native.batch_norm_relu_max_pool2d(*operands, pool)
    grad = output.sin()
    grads = native.batch_norm_relu_backward(grad, gate, x, found, weight, 1e-3, training, pool, True, True)
    running = torch.zeros_like(found[0]), torch.ones_like(found[1])
    native.batch_norm_update(*running, *found, x.numel() // x.shape[1], 0.1)
    return output, gate, *found, *grads, *running


needs_amx = pytest.mark.skipif(native_amx.unavailable() is not None, reason="of a processor with AMX")

CALLS = {"convolution": conv_calls, "pool": pool_calls, "map": map_calls, "norm": norm_calls}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize(
    "choosing", [transforming, pytest.param(contextlib.nullcontext, marks=needs_amx)], ids=["Winograd", "AMX"]
)
def test_bits_are_those_of_aligned_memory(kind: str, dtype: torch.dtype, choosing: Any) -> None:
    with choosing():
        for call in CALLS[kind](dtype):
            expected = call()
            with guarded():
                actual = call()
            for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
                assert (got is None) == (want is None)
                if got is not None and want is not None:
                    assert_same(got, want, f"result {number}")


def test_every_kernel_is_among_them() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastconv_native::")]
    kernels = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")}
    with transforming(), guarded() as mode:
        for calls in CALLS.values():
            for call in calls(torch.float32):
                call()
        weight = random((40, 24, 3, 3), torch.float32)
        filters = torch.empty(native.library().winograd_filters_size(24, 40))
        torch.ops.fastconv_native.winograd_filters(weight, filters)
        assert filters.isfinite().any()
    if native_amx.unavailable() is None:
        with mode:
            for call in conv_calls(torch.bfloat16):
                call()
    missing = kernels - {f"fastconv_native::{name}" for name in mode.seen}
    # Of another processor: tests/test_amx.py guards them itself.
    assert {name for name in missing if "::amx_" not in name or native_amx.unavailable() is None} == set()


class TestGuards:
    """The guards themselves: an operator that errs is caught."""

    @pytest.fixture(autouse=True)
    def _operators(self) -> Iterator[None]:
        library = torch.library.Library("fastconv_native", "FRAGMENT")
        library.define("test_write(Tensor x, Tensor(a!) output, int at) -> ()")
        library.define("test_read(Tensor x, Tensor(a!) output, int at) -> ()")

        def outside(tensor: Tensor, at: int) -> Tensor:
            return tensor.as_strided((1,), (1,), tensor.storage_offset() + at)

        def write(x: Tensor, output: Tensor, at: int) -> None:
            outside(x if at == 0 else output, at).fill_(1)

        def read(x: Tensor, output: Tensor, at: int) -> None:
            output.fill_(float(outside(x, at)))

        library.impl("test_write", write, "CPU")
        library.impl("test_read", read, "CPU")
        yield
        library._destroy()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("at", [-1, 12, 40])
    def test_a_write_outside(self, at: int, dtype: torch.dtype) -> None:
        x = torch.zeros(3, 4, dtype=dtype)
        with guarded(), pytest.raises(AssertionError, match=f"test_write, tensor 1 .*written outside, from element {at} "):
            torch.ops.fastconv_native.test_write(x, torch.zeros(3, 4, dtype=dtype), at)

    def test_a_write_to_an_input(self) -> None:
        with guarded(), pytest.raises(AssertionError, match=r"tensor 0 .*an input was written to, at element 0 of 12"):
            torch.ops.fastconv_native.test_write(torch.zeros(3, 4), torch.zeros(3, 4), 0)

    @pytest.mark.parametrize("at", [-1, 12])
    def test_a_read_outside(self, at: int) -> None:
        output = torch.zeros(3)
        with guarded():
            torch.ops.fastconv_native.test_read(torch.zeros(3, 4), output, at)
        assert output.isnan().all()

    def test_operands_are_misaligned_and_in_place_stays_in_place(self) -> None:
        seen = []
        library = torch.library.Library("fastconv_native", "FRAGMENT")
        library.define("test_places(Tensor x, Tensor(a!) output) -> ()")
        library.impl("test_places", lambda x, output: seen.append((x.data_ptr(), output.data_ptr(), x.stride())), "CPU")
        try:
            for dtype in (torch.uint8, torch.bfloat16, torch.float32):
                x = torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
                with guarded():
                    torch.ops.fastconv_native.test_places(x, x)
                one, other, strides = seen.pop()
                assert one == other != x.data_ptr()
                assert one % 64 == x.element_size()
                assert strides == x.stride()
        finally:
            library._destroy()
