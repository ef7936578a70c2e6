"""The Triton launchers of batch normalisation against torch in float64: every kernel, epilogue and dtype at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, ids
from tolerances import assert_close
from torch import Tensor

from fastconv.backends import aten, triton, triton_norm, triton_tiles
from fastconv.geometry import PoolGeometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
# One for each thing that can go wrong: tails of pixels and channels, one of each, several blocks and programs.
SHAPES = {
    "whole": (2, 16, 4, 8),
    "odd": (3, 5, 7, 5),
    "one_channel": (1, 1, 3, 2),
    "two_values": (2, 3, 1, 1),
    "one_row": (2, 40, 1, 9),
    "two_blocks_of_channels": (1, 136, 3, 4),
    "many_pixels": (1, 3, 50, 88),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


@pytest.fixture(params=["large_tiles", "tiles_of_a_gpu"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter's tiles are as large as the call; a GPU's, with more programs than rows of partial sums in a block."""
    if request.param == "tiles_of_a_gpu" and DEVICE == "cpu":
        elementwise = triton_tiles.elementwise
        monkeypatch.setattr(triton_tiles, "elementwise", lambda c, p, dtype, _: elementwise(c, p, dtype, False))
        monkeypatch.setattr(triton_tiles, "rows", lambda _: {"BLOCK_R": 2, "BLOCK_C": 64})
        monkeypatch.setattr(triton_tiles, "split", _several_programs)
    return str(request.param)


def _several_programs(pixels: int, block: int, others: int, processors: int | None) -> tuple[int, int]:
    each = triton_tiles.cdiv(triton_tiles.cdiv(pixels, 5), block) * block
    return triton_tiles.cdiv(pixels, each), each


def _small(shape: tuple[int, ...]) -> bool:
    return shape[2] * shape[3] < 1000


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)


def _channels(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, var, weight, bias)."""
    mean, var, weight, bias = torch.randn(4, shape[1], device=DEVICE).unbind()
    return mean, var.abs() + 0.5, weight, bias


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _pool(shape: tuple[int, ...]) -> PoolGeometry:
    return PoolGeometry.of("pool", shape, (2, 2), (2, 2), (0, 0), (1, 1), False)


@shapes
@dtypes
def test_statistics(shape: tuple[int, int, int, int], dtype: torch.dtype, tiles: str) -> None:
    """Far from zero: the deviation is a thousandth of the mean, and half precision has rounded it already."""
    x = (_random(shape, torch.float32) + 1000).to(dtype)
    mean, var = triton_norm._batch_statistics(x)
    var64, mean64 = torch.var_mean(_double(x), (0, 2, 3), correction=0)
    count = x.numel() // x.shape[1]
    assert_close(mean.cpu(), mean64, torch.float32, 1, "mean")
    # Sums are of distances to the first value.
    distance = (_double(x)[:1, :, 0, 0] - mean64).square().max().item()
    assert_close(var.cpu(), var64, torch.float32, 2 * count, "variance", scale=1 + distance)


@pytest.mark.parametrize("settings", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@shapes
@dtypes
def test_forward(
    shape: tuple[int, int, int, int], dtype: torch.dtype, settings: tuple[bool, bool, bool], tiles: str
) -> None:
    if tiles == "tiles_of_a_gpu" and not _small(shape) and settings != (False, True, False):
        pytest.skip("some 70 programs are enough once")
    training, affine, with_residual = settings
    x, residual = _random(shape, dtype), _random(shape, dtype) if with_residual else None
    mean, var, weight, bias = _channels(shape)
    operands = (x, None if training else (mean, var), *((weight, bias) if affine else (None, None)), residual, EPS)
    output, statistics = triton.batch_norm_relu(*operands)
    expected, expected_statistics = aten.batch_norm_relu(*_double(operands))
    assert_close(output.cpu(), expected, dtype, x.numel() // shape[1], "output", scale=4)
    for got, want in zip(statistics, expected_statistics, strict=True):
        assert_close(got.cpu(), want, torch.float32, x.numel() // shape[1], "statistics", scale=1)
    if min(shape[2:]) < 2:
        return
    pool = _pool(shape)
    output, code, _ = triton.batch_norm_relu_max_pool2d(*operands, pool)
    expected, _, _ = aten.batch_norm_relu_max_pool2d(*_double(operands), pool)
    assert_close(output.cpu(), expected, dtype, x.numel() // shape[1], "pooled", scale=4)
    unpooled, _ = aten.batch_norm(*_double(operands))
    named = unpooled.flatten(2).gather(2, aten.code_to_indices(code.cpu(), pool).flatten(2)).view_as(expected)
    named.masked_fill_(code.cpu() == 0, 0)
    assert_close(named.to(dtype), expected, dtype, x.numel() // shape[1], "what the codes name", scale=4)
    assert code.max() <= 4


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("pooled", [False, True], ids=["map", "pooled"])
@shapes
@dtypes
def test_backward(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    pooled: bool,
    training: bool,
    wanted: tuple[bool, bool],
    tiles: str,
) -> None:
    if pooled and min(shape[2:]) < 2:
        pytest.skip("no window fits")
    if wanted != (True, True) and (dtype != torch.float32 or tiles == "tiles_of_a_gpu"):
        pytest.skip("neither loads nor stores depend on what is wanted")
    if not _small(shape) and dtype != torch.float32:
        pytest.skip("steps of a loop do not depend on the dtype")
    if tiles == "tiles_of_a_gpu" and (not _small(shape) or dtype == torch.float16 or (shape[0] == 1 and pooled)):
        pytest.skip("many programs")
    pool = _pool(shape) if pooled else None
    x = _random(shape, dtype)
    if pool is None:
        grad, gate = _random(shape, dtype), _random(shape, dtype)
    else:
        grad = _random(pool.output_shape, dtype)
        gate = torch.randint(0, 5, pool.output_shape, dtype=torch.uint8, device=DEVICE).to(memory_format=torch.channels_last)
    mean, var, weight, _ = _channels(shape)
    if training:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    statistics = (mean, var)
    for given in (x, None) if not (training and wanted[0]) else (x,):
        for scale in (weight, None):
            operands = (grad, gate, given, statistics, scale, EPS, training, pool, *wanted)
            got = triton.batch_norm_relu_backward(*operands)
            want = aten.batch_norm_relu_backward(*_double(operands))
            count = x.numel() // shape[1]
            slope = ((1 if scale is None else scale.abs()) / (var + EPS).sqrt()).max().item()
            digits = 1 + (mean.abs() / (var + EPS).sqrt()).max().item()
            measures = (
                ("input", dtype, slope * digits),
                ("sums", torch.float32, digits * count**0.5),
                ("residual", dtype, 1),
            )
            for actual, expected, (name, kind, size) in zip(got, want, measures, strict=True):
                assert (actual is None) == (expected is None), name
                if actual is not None:
                    assert_close(actual.cpu(), expected, kind, 2 * count, name, scale=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("channels", [1, 40, 128, 200])
def test_update(channels: int, dtype: torch.dtype) -> None:
    mean, var = torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE)
    mean[0] = float("nan")
    running = torch.randn(channels, 2, device=DEVICE).to(dtype)
    for momentum in (0.0, 0.1, 1.0):
        for running_mean, running_var in (running.clone().unbind(1), running.t().contiguous().unbind(0)):
            wide_mean, wide_var = running_mean.cpu().double(), running_var.cpu().double()
            triton.batch_norm_update(running_mean, running_var, mean, var, 7, momentum)
            aten.batch_norm_update(wide_mean, wide_var, mean.cpu().double(), var.cpu().double(), 7, momentum)
            assert_close(running_mean.cpu(), wide_mean, dtype, 1, "running_mean")
            assert_close(running_var.cpu(), wide_var, dtype, 1, "running_var")


@dtypes
def test_exact_with_nan_and_infinity(dtype: torch.dtype, tiles: str) -> None:
    """Numbers that need no rounding, by constant statistics: values, codes and gradients to the bit."""
    shape = (2, 9, 7, 8)
    x, residual = (torch.randint(-4, 5, shape, device=DEVICE).to(dtype) for _ in range(2))
    for value in (float("nan"), float("inf"), float("-inf")):
        x[torch.rand(shape, device=DEVICE) < 0.05] = value
    x[..., :4, :4] = float("-inf")
    x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    statistics = torch.ones(9, device=DEVICE), torch.full((9,), 4.0, device=DEVICE)
    weight = torch.tensor([1.0, -2, 0.5, 4, 2, -1, 1, 2, 2], device=DEVICE)
    operands = (x, statistics, weight, -weight, residual, 0.0)
    output, _ = triton.batch_norm_relu(*operands)
    expected, _ = aten.batch_norm_relu(*_double(operands))
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=0, equal_nan=True)
    pool = _pool(shape)
    pooled, code, _ = triton.batch_norm_relu_max_pool2d(*operands, pool)
    expected_pooled, expected_code, _ = aten.batch_norm_relu_max_pool2d(*_double(operands), pool)
    torch.testing.assert_close(pooled.cpu().double(), expected_pooled, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(code.cpu(), expected_code)
    for gate, window in ((output, None), (code, pool)):
        grad = torch.randint(-4, 5, gate.shape, device=DEVICE).to(dtype)
        saved = (grad, gate, None, statistics, weight, 0.0, False, window, True, True)
        got, want = triton.batch_norm_relu_backward(*saved), aten.batch_norm_relu_backward(*_double(saved))
        for actual, oracle in zip(got, want, strict=True):
            assert actual is oracle or torch.equal(actual.cpu().double(), oracle)
