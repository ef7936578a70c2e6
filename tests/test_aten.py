"""What the aten backend mends of torch's CUDA kernels, shown on a CPU with what those kernels return."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_native_kernels import POOLS, pool_of

from fastconv.backends import aten


@pytest.mark.parametrize("case", POOLS)
def test_a_window_of_nothing_has_its_own_first_element(case: str) -> None:
    """torch's CUDA kernel for channels_last gives it the first of the whole map."""
    x = torch.randint(0, 3, (2, 5, 9, 11)).float()
    x[0] = -torch.inf
    x[1, :, 4:] = -torch.inf
    x[1, 0] = torch.nan
    pool = pool_of(case, tuple(x.shape))
    arguments = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    output, indices = F.max_pool2d(x, *arguments, return_indices=True)
    assert (output == -torch.inf).any()
    of_cuda = indices.masked_fill(output == -torch.inf, 0)
    mended = aten.first_of_nothing(output, of_cuda, pool)
    code = aten.indices_to_code(mended, pool)
    assert torch.equal(code, aten.indices_to_code(indices, pool))
    inside = code > 0
    assert torch.equal(mended[inside], indices[inside])


@pytest.mark.parametrize("divisor", [2**32, 3 * 10**9, -(2**33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_divisor_that_torchs_cuda_kernels_cut(divisor: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 6, 6, dtype=dtype)
    pool = pool_of("3/2/1", tuple(x.shape))
    grad = torch.randn(pool.output_shape, dtype=dtype)
    expected = aten.avg_pool2d(x.double(), pool, True, divisor), aten.avg_pool2d_backward(grad.double(), pool, True, divisor)
    monkeypatch.setattr(aten, "_is_cut", lambda _, value: not -(2**31) <= value < 2**31)
    got = aten.avg_pool2d(x, pool, True, divisor), aten.avg_pool2d_backward(grad, pool, True, divisor)
    for result, wanted in zip(got, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, rtol={torch.bfloat16: 2**-8}.get(dtype, 1e-5), atol=1e-14)


def test_which_divisors_those_are() -> None:
    on_gpu, on_cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    divisors = (1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1)
    assert [aten._is_cut(on_gpu, divisor) for divisor in divisors] == [False, False, True, False, True]  # type: ignore[arg-type]
    assert not any(aten._is_cut(on_cpu, divisor) for divisor in divisors)  # type: ignore[arg-type]
