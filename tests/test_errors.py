"""Bad input: torch's exception type, and a sentence that names the operator, the argument and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as FC
from fastconv.functional import ConvLayer

X, W = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3)

# (arguments that differ from conv2d(X, W), what the message must name)
CONV_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"stride": 0}, "stride=(0, 0)"),
    ({"stride": (1, 1, 1)}, "stride=(1, 1, 1)"),
    ({"stride": ()}, "stride=()"),
    ({"stride": 1.5}, "stride=1.5"),
    ({"stride": "x"}, "stride='x'"),
    ({"padding": -1}, "padding=(-1, -1)"),
    ({"padding": "full"}, "padding='full'"),
    ({"padding": "same", "stride": 2}, "padding='same'"),
    ({"dilation": 0}, "dilation=(0, 0)"),
    ({"groups": 0}, "groups=0"),
    ({"groups": 5}, "groups=5"),
    ({"groups": 4}, "groups=4"),
    ({"groups": 1.0}, "groups=1.0"),
    ({"input": None}, "input"),
    ({"input": [1.0]}, "input"),
    ({"weight": "w"}, "weight"),
    ({"bias": 3}, "bias"),
    ({"input": X[0, 0]}, "[8, 8]"),
    ({"input": X[None]}, "[1, 1, 4, 8, 8]"),
    ({"input": X[:, :3]}, "to have 4 channels, but got 3"),
    ({"weight": W[0]}, "[4, 3, 3]"),
    ({"weight": W[:0]}, "[0, 4, 3, 3]"),
    ({"weight": W[..., :0]}, "[6, 4, 3, 0]"),
    ({"weight": torch.randn(6, 4, 9, 9)}, "Kernel size: (9 x 9)"),
    ({"bias": torch.randn(5)}, "bias of size [5]"),
    ({"bias": torch.randn(6, 1)}, "bias of size [6, 1]"),
    ({"weight": W.double()}, "torch.float64"),
    ({"bias": torch.randn(6).double()}, "bias type (torch.float64)"),
    ({"input": X[..., :0, :], "padding": 3}, "[1, 4, 0, 8]"),
    ({"stride": torch.tensor(1.5)}, "stride=tensor(1.5"),
]

POOL_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 0}, "kernel_size=(0, 0)"),
    ({"kernel_size": (2, 2, 2)}, "kernel_size=(2, 2, 2)"),
    ({"kernel_size": "2"}, "kernel_size='2'"),
    ({"kernel_size": 9}, "Output size is too small"),
    ({"stride": 0}, "stride=(0, 0)"),
    ({"padding": 2}, "padding=(2, 2)"),
    ({"padding": -1}, "padding=(-1, -1)"),
    ({"ceil_mode": 1}, "ceil_mode=1"),
    ({"input": X[None]}, "[1, 1, 4, 8, 8]"),
    ({"input": X[:, :0]}, "[1, 0, 8, 8]"),
    ({"input": 3}, "input"),
]


def check(ours: Callable[[], Any], theirs: Callable[[], Any], op: str, words: str) -> None:
    with pytest.raises((TypeError, RuntimeError)) as expected:
        theirs()
    with pytest.raises(expected.type) as caught:
        ours()
    assert f"{op}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(("change", "words"), CONV_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_conv2d(change: dict[str, Any], words: str) -> None:
    args = {"input": X, "weight": W, **change}
    for op in ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"):
        check(lambda op=op: getattr(FC, op)(**args), lambda: F.conv2d(**args), op, words)


@pytest.mark.parametrize(
    ("change", "words"), [*POOL_ERRORS, ({"dilation": 0}, "dilation=(0, 0)")], ids=lambda v: v if isinstance(v, str) else ""
)
def test_max_pool2d(change: dict[str, Any], words: str) -> None:
    args = {"input": X, "kernel_size": 2, **change}
    check(lambda: FC.max_pool2d(**args), lambda: F.max_pool2d(**args), "max_pool2d", words)
    check(lambda: FC.relu_max_pool2d(**args), lambda: F.max_pool2d(**args), "relu_max_pool2d", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [*POOL_ERRORS, ({"divisor_override": 0}, "divisor_override=0"), ({"divisor_override": 2.5}, "divisor_override=2.5")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_avg_pool2d(change: dict[str, Any], words: str) -> None:
    args = {"input": X, "kernel_size": 2, **change}
    check(lambda: FC.avg_pool2d(**args), lambda: F.avg_pool2d(**args), "avg_pool2d", words)


def test_fused_pool_arguments_have_their_prefix() -> None:
    with pytest.raises(RuntimeError, match="pool_kernel_size"):
        FC.conv2d_relu_max_pool2d(X, W, pool_kernel_size=(1, 2, 3))
    with pytest.raises(TypeError, match="pool_ceil_mode"):
        FC.conv2d_relu_max_pool2d(X, W, pool_ceil_mode=0)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        FC.conv2d_relu_max_pool2d(X, W, pool_kernel_size=7)
    ones = torch.ones(4)
    for args, words in (
        ({"pool_padding": 2}, "got pool_padding=(2, 2), pool_kernel_size=(2, 2)"),
        ({"pool_padding": -1}, "got pool_padding=(-1, -1)"),
        ({"pool_stride": 0}, "got pool_stride=(0, 0)"),
        ({"pool_dilation": 0}, "got pool_dilation=(0, 0)"),
        ({"pool_kernel_size": 0}, "got pool_kernel_size=(0, 0)"),
        ({"pool_kernel_size": 9}, "got pool_kernel_size=(9, 9), pool_padding=(0, 0), pool_dilation=(1, 1)"),
    ):
        calls = (
            lambda args=args: FC.conv2d_relu_max_pool2d(X, W, **args),
            lambda args=args: FC.batch_norm_relu_max_pool2d(X, ones, ones, **args),
            lambda args=args: FC.conv_chain(X, [ConvLayer(W, **{"pool_kernel_size": 2, **args})]),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match=re.escape(words)):
                call()


# (a second layer of the chain, what the message must name)
LAYER_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": W}, RuntimeError, "to have 4 channels, but got 6"),
    ({"weight": "w"}, TypeError, "weight must be a Tensor"),
    ({"weight": torch.randn(2, 6, 1, 1).double()}, RuntimeError, "weight type (torch.float64)"),
    ({"bias": torch.randn(2).to("meta")}, RuntimeError, "bias is on meta"),
    ({"bias": torch.randn(3)}, RuntimeError, "bias of size [3]"),
    ({"stride": 1.5}, TypeError, "stride=1.5"),
    ({"padding": "same", "stride": 2}, RuntimeError, "padding='same'"),
    ({"weight": torch.randn(2, 6, 7, 7)}, RuntimeError, "Kernel size: (7 x 7)"),
    ({"pool_kernel_size": 7}, RuntimeError, "got pool_kernel_size=(7, 7)"),
    ({"pool_kernel_size": 2, "pool_ceil_mode": 1}, TypeError, "pool_ceil_mode=1"),
]


@pytest.mark.parametrize(("change", "kind", "words"), LAYER_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_conv_chain_names_the_layer_and_runs_none(
    change: dict[str, Any], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastconv.autograd, "call_chain", lambda *_: pytest.fail("a layer ran"))
    layers = [ConvLayer(W), ConvLayer(**{"weight": torch.randn(2, 6, 1, 1), **change})]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        FC.conv_chain(X, layers)
    assert str(caught.value).startswith("conv_chain: layers[1]: ")


def test_conv_chain_takes_a_sequence_and_a_map() -> None:
    for layers in (iter([ConvLayer(W)]), (layer for layer in [ConvLayer(W)]), {ConvLayer: 1}, 3):
        with pytest.raises(TypeError, match="conv_chain: layers must be a sequence of ConvLayer, got "):
            FC.conv_chain(X, layers)
    for layers in ([], [ConvLayer(W)]):
        for bad, kind in ((X.long(), RuntimeError), (X[0, 0], RuntimeError), (3, TypeError)):
            with pytest.raises(kind, match=r"conv_chain: .*input"):
                FC.conv_chain(bad, layers)
    assert torch.equal(FC.conv_chain(X, (ConvLayer(W),)), FC.conv2d_relu(X, W))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "torch.sparse_coo": lambda t: t.to_sparse(),
    "torch._mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_dense_tensors(layout: str) -> None:
    words = f"must be a dense strided tensor, got layout {layout}"
    x, w, ones = LAYOUTS[layout](X), LAYOUTS[layout](W), torch.ones(4)
    calls = [
        *((call, "input") for call in (lambda: FC.conv2d(x, W), lambda: FC.conv2d_relu(x, W), lambda: FC.max_pool2d(x, 2))),
        *((call, "input") for call in (lambda: FC.avg_pool2d(x, 2), lambda: FC.global_avg_pool2d(x))),
        (lambda: FC.batch_norm_relu(x, ones, ones), "input"),
        (lambda: FC.batch_norm_relu(X, ones, ones, residual=x), "residual"),
        (lambda: FC.conv2d_relu(X, torch.randn(4, 4, 1, 1), residual=x), "residual"),
        (lambda: FC.conv_chain(x, []), "input"),
        (lambda: FC.conv_chain(X, [ConvLayer(w)]), "weight"),
        (lambda: FC.conv2d(X, w), "weight"),
    ]
    for call, name in calls:
        with pytest.raises(RuntimeError, match=f"{name} {words}"):
            call()


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (6, 6, 6), (2, 6, 6, 6)], ids=str)
def test_residual_is_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"conv2d_relu: residual must have exactly the output's shape \[1, 6, 6, 6\]"):
        FC.conv2d_relu(X, W, residual=torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_unserved_dtypes_are_named(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 4, 8, 8).to(dtype)
    for call in (lambda: FC.conv2d(x, x), lambda: FC.max_pool2d(x, 2), lambda: FC.global_avg_pool2d(x)):
        with pytest.raises(RuntimeError, match=f"input has dtype {dtype}; allowed: torch.float64, torch.float32"):
            call()


def test_nothing_is_launched_or_lost_on_an_error() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError):
        FC.conv2d_relu(x, W, torch.randn(5))
    assert x.grad is None
    assert torch.equal(x, X)


def test_integers_of_any_kind() -> None:
    """What configuration files and numpy code hand over."""
    two, one = np.int64(2), torch.tensor(1)
    want = F.conv2d(X, W, None, 2, (1, 1), 1, 1)
    assert torch.equal(FC.conv2d(X, W, None, two, (np.int32(1), one), one, np.int64(1)), want)
    assert torch.equal(FC.max_pool2d(X, two, two), F.max_pool2d(X, 2))
    assert torch.equal(FC.avg_pool2d(X, two, divisor_override=np.int64(3)), F.avg_pool2d(X, 2, divisor_override=3))


def test_zero_channels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="conv2d: Only a zero batch is supported, not zero channels"):
        FC.conv2d(torch.randn(2, 0, 6, 6), torch.randn(4, 0, 3, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_residual_must_be_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="conv2d_relu: residual must have a floating-point dtype"):
        FC.conv2d_relu(X, W, residual=torch.ones(1, 6, 6, 6).to(dtype))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; allowed: 'auto', 'triton', 'native', 'aten'"):
        fastconv.use_backend("cudnn")
