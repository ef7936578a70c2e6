"""Pictures of records: those that the records allow, the same bytes each time, each knowing what it was drawn from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import made_records
import pytest

from fastconv.bench import plots
from fastconv.bench.plots import bars, scaling
from fastconv.bench.records import Record

pytest.importorskip("matplotlib")

MOST_BYTES = 200_000
ALL = ["nets.png", "layers.png", "pools.png", "roofline.png", "scaling.png"]


@pytest.mark.parametrize("is_gpu", [False, True], ids=["as of a CPU", "as of a card"])
def test_all_suites(is_gpu: bool, tmp_path: Path) -> None:
    records = made_records.chip(is_gpu)
    paths = plots.draw(records, tmp_path)
    assert [path.name for path in paths] == ALL == list(plots.pictures(records))
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < MOST_BYTES
        assert plots.drawn_from(path) == plots.digest(plots.pictures(records)[path.name])


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    import matplotlib

    records = [r for r in made_records.chip(False) if r.suite == "pools"]
    (first,) = plots.draw(records, tmp_path / "first")
    with matplotlib.rc_context({"font.size": 20}):  # a user's own settings change nothing
        (second,) = plots.draw(records, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("suite", ["models", "layers", "pools", "scaling"])
def test_one_suite(suite: str, tmp_path: Path) -> None:
    wanted = {"models": ["nets.png"], "layers": ["layers.png", "roofline.png"]}.get(suite, [f"{suite}.png"])
    paths = plots.draw([r for r in made_records.chip(False) if r.suite == suite], tmp_path)
    assert [path.name for path in paths] == wanted


def test_one_record_and_none(tmp_path: Path) -> None:
    one = made_records.record()
    assert [path.name for path in plots.draw([one], tmp_path)] == ["layers.png", "roofline.png"]
    nothing = {"fastest_stock": None, "over_stock": None, "over_stock_q20": None, "over_stock_q80": None}
    uncounted = dataclasses.replace(one, **nothing, flops=None, copy_gb_per_s=None)
    for records in ([], [uncounted], [made_records.record(suite="overhead", case="conv2d_relu")]):
        assert plots.draw(records, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_records_of_two_chips_are_refused(tmp_path: Path) -> None:
    records = [made_records.record(), made_records.record(case="64-64@28 3x3/1 batch 32", **made_records.GPU)]
    with pytest.raises(ValueError, match="Some CPU cpu-2 and Some GPU sm_90"):
        plots.draw(records, tmp_path)


def test_digest() -> None:
    first, second = made_records.record(), made_records.record(case="64-64@28 3x3/1 batch 32")
    others = [[second, first], [first], [first, dataclasses.replace(second, over_stock=1.51)]]
    assert len({plots.digest(records) for records in ([first, second], *others)}) == 4


def test_a_picture_of_something_else(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    assert plots.drawn_from(tmp_path / "plain.png") is None


def _selected(cases: list[str]) -> list[list[Record]]:
    made = [made_records.record(case=case) for case in cases]
    return bars.select(made, ("layers",), {"forward": "forward"})


def test_bars_are_of_the_largest_and_the_smallest_batch() -> None:
    cases = [f"{channels}-64@56 3x3/1 batch {batch}" for batch in (1, 8, 32) for channels in (16, 64)]
    (page,) = _selected([*cases, "64-64@56 3x3/1 batch 4 NCHW"])
    wanted = ["16-64@56 3x3/1 batch 32", "16-64@56 3x3/1 batch 1", "64-64@56 3x3/1 batch 32", "64-64@56 3x3/1 batch 1"]
    assert [r.case for r in page] == [*wanted, "64-64@56 3x3/1 batch 4 NCHW"]


@pytest.mark.parametrize("count, pages", [(0, []), (1, [1]), (32, [32]), (33, [16, 17]), (65, [21, 22, 22])])
def test_many_bars_are_several_pictures(count: int, pages: list[int]) -> None:
    assert [len(page) for page in _selected([f"64-64@{size} 3x3/1 batch 8" for size in range(8, 8 + count)])] == pages


def test_series() -> None:
    found = scaling.series([*made_records.GROWING, "64-64@56 3x3/1 batch 8 NCHW", "64-128@56 3x3/1 batch 8"])
    assert {axis: (kept, list(cases)) for axis, (kept, cases) in found.items()} == {
        "batch N": ("64-64@56 3x3/1 batch N", [1, 2, 4, 8, 16, 32]),
        "resolution R": ("64-64@R 3x3/1 batch 8", [14, 28, 56, 112, 224]),
        "channels C": ("C-C@56 3x3/1 batch 8", [16, 32, 64, 128, 256]),
    }
    two = ["64-64@56 3x3/1 batch 1", "64-64@56 3x3/1 batch 2", "64-128@56 3x3/1 batch 4", "recipe_net R=32 batch 4"]
    assert scaling.series(two) == {}
