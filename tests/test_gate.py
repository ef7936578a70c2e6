"""The gate: what passes, what is named as wrong, and that large maps are judged in parts as they are in one piece."""

from __future__ import annotations

import math

import pytest
import torch

from fastconv.bench import gate

EXACT = torch.linspace(-3, 3, 5 * 4 * 6 * 7, dtype=torch.float64).reshape(5, 4, 6, 7)


@pytest.fixture(params=[gate._PART, 2 * 4 * 6 * 7, 1], ids=["whole", "two images", "one image"], autouse=True)
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_PART", request.param)


def rounded() -> torch.Tensor:
    return EXACT.float()


def test_searching_is_undone() -> None:
    """Also where torch's own tests' utilities were imported, which forbid the switch's assignment."""
    import torch.testing._internal.common_utils

    before = torch.backends.cudnn.benchmark
    for wanted in (True, False):
        with gate.searching(wanted):
            assert torch.backends.cudnn.benchmark is wanted
        assert torch.backends.cudnn.benchmark is before


def test_a_rounding_passes() -> None:
    before = EXACT.clone()
    assert gate.deviation(rounded(), EXACT, 9) is None
    assert gate.deviation(EXACT.bfloat16(), EXACT, 9) is None
    assert torch.equal(EXACT, before), "what is compared stays as it is"


@pytest.mark.parametrize("at", [0, -1])
def test_what_is_wrong_is_named(at: int) -> None:
    far, near = rounded(), rounded()
    far[at, 0, 0, 0] += 0.1
    assert "maximum error 1.0" in str(gate.deviation(far, EXACT, 9))
    near += 3e-6 * torch.sign(torch.randn(near.shape))
    assert "RMS error 3.0" in str(gate.deviation(near, EXACT, 9))
    lost = rounded()
    lost[at, 1, 2, 3] = math.nan
    assert "1 of 840 elements are not finite" in str(gate.deviation(lost, EXACT, 9))
    assert "shape (5, 4, 6, 1) != (5, 4, 6, 7)" in str(gate.deviation(rounded()[..., :1], EXACT, 9))


def test_what_is_not_finite_has_its_place() -> None:
    exact = EXACT.clone()
    exact[1, 0, 0, 0], exact[4, 3, 5, 6] = math.nan, -math.inf
    assert gate.deviation(exact.float(), exact, 9) is None
    assert gate.deviation(torch.full((2, 3), math.inf), torch.full((2, 3), math.inf).double(), 9) is None
    for wrong in (math.inf, 0.0, math.nan):
        other = exact.float()
        other[4, 3, 5, 6] = wrong
        assert gate.deviation(other, exact, 9) == "NaN or infinities are not where they are expected"


def test_nothing_is_right() -> None:
    for shape in ((0, 3), (2, 0, 4), ()):
        empty = torch.zeros(shape)
        assert gate.deviation(empty, empty.double(), 9) is None
        assert gate.errors(empty, empty.double()) == (0.0, 0.0)


def test_errors_are_in_units_of_the_exact_result() -> None:
    actual = EXACT.clone()
    actual[3, 2, 1, 0] += 2.0
    size = EXACT.square().mean().sqrt().item()
    largest, rms = gate.errors(actual, EXACT)
    assert largest == pytest.approx(2.0 / size) and rms == pytest.approx(2.0 / math.sqrt(EXACT.numel()) / size)


def test_truncated_operands_are_tf32() -> None:
    """Of a sum of few products, whose operands all become smaller; of a net of such layers."""
    bits = torch.randn(4096, 27).view(torch.int32)
    x = torch.randn(4096, 27)
    truncated = [(t.view(torch.int32) & -8192).view(torch.float32) for t in (x, bits.view(torch.float32))]
    exact = (x.double() * bits.view(torch.float32).double()).sum(1)
    actual = (truncated[0].double() * truncated[1].double()).sum(1).float()
    assert gate.deviation(actual, exact, 27, tf32=True) is None
    assert gate.deviation(actual, exact, 27) is not None
    direct, tf32 = (gate.net_bounds(torch.float32, [27, 576, 576], tf32=allowed) for allowed in (False, True))
    assert 100 * direct[0] < tf32[0] < 4e-3 and direct[1] < tf32[1]
