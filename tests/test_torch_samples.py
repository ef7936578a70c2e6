"""torch's own operator samples and error inputs, through our functionals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

import fastconv
import fastconv.functional as FC

pytest.importorskip("expecttest", reason="torch.testing._internal imports it: pip install 'fastconv[test]'")
from torch.testing._internal.common_methods_invocations import op_db

NAMES = ("conv2d", "max_pool2d", "avg_pool2d")
OPS = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in NAMES}
SHARE = {"auto": 1, "native": 1, "aten": 5, "triton": 97}  # every n-th sample; the interpreter is slow
DTYPES = {"auto": torch.float64, "native": torch.float32, "aten": torch.bfloat16, "triton": torch.float32}


def samples(name: str, backend: str, dtype: torch.dtype) -> Iterator[Any]:
    """Samples of torch; the conv ones are few, so that Triton gets every fourth of them."""
    step = 4 if backend == "triton" and name != "max_pool2d" else SHARE[backend]
    for i, sample in enumerate(OPS[name].sample_inputs("cpu", dtype, requires_grad=True)):
        if i % step == 0:
            yield sample


def exact(value: Any) -> Any:
    return value.detach().double().requires_grad_() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("backend", list(SHARE))
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, backend: str) -> None:
    dtype = DTYPES[backend]
    ran = 0
    for sample in samples(name, backend, dtype):
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        exact_args = [exact(a) for a in (sample.input, *sample.args)]
        exact_tensors = [t for t in exact_args if isinstance(t, torch.Tensor)]
        want = getattr(F, name)(*exact_args, **sample.kwargs)
        with fastconv.use_backend(backend):
            got = getattr(FC, name)(sample.input, *sample.args, **sample.kwargs)
        if isinstance(want, tuple):
            assert torch.equal(got[1], want[1]), sample
            got, want = got[0], want[0]
        weight = sample.args[0] if name == "conv2d" else None
        products = 64 if weight is None else math.prod(weight.shape[1:])
        assert_close(got, want, dtype, max(products, 1), f"{sample}")
        grad = torch.randn_like(got)
        grads = torch.autograd.grad(got, tensors, grad)
        exact_grads = torch.autograd.grad(want, exact_tensors, grad.double())
        for g, e in zip(grads, exact_grads, strict=True):
            size = math.sqrt(grad.numel() / len(e)) if e.dim() == 1 else 0.0  # of a bias gradient before cancellation
            assert_close(g, e, dtype, max(products, grad.numel(), 64), f"gradient of {sample}", scale=size)
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs(name: str) -> None:
    """The same exception type as torch's, and torch's own words within ours."""
    ran = 0
    for error in OPS[name].error_inputs("cpu"):
        sample = error.sample_input
        if sample.input.dtype.is_complex:
            continue  # refused for its dtype before anything else
        with pytest.raises(error.error_type) as caught:
            getattr(FC, name)(sample.input, *sample.args, **sample.kwargs)
        assert f"{name}: " in str(caught.value)
        with pytest.raises(error.error_type):
            getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
        ran += 1
    assert ran >= 4
