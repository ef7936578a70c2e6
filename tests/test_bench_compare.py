"""Two runs held against each other: what is worse is found, what is only noise or the machine's drift is not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import made_records
import pytest

from fastconv.bench import records
from fastconv.bench.compare import Change, compare, lines
from fastconv.cli import bench_compare

SLOWER = {"over_stock": 1.3, "over_stock_q20": 1.2, "over_stock_q80": 1.39}
NO_RATIO = {"fastest_stock": None, "over_stock": None, "over_stock_q20": None, "over_stock_q80": None}


def change(before: dict[str, Any], after: dict[str, Any]) -> Change:
    (found,) = compare([made_records.record(**before)], [made_records.record(**after)]).changes
    return found


@pytest.mark.parametrize(
    "before, after, what",
    [
        ({}, SLOWER, "ratio over stock torch"),
        (NO_RATIO, {**NO_RATIO, "median_ms": 2.5, "q20_ms": 2.21, "q80_ms": 2.6}, "time"),
        (NO_RATIO, {"median_ms": 2.5, "q20_ms": 2.21, "q80_ms": 2.6}, "time"),
        ({}, {"saved_bytes": 10**7 + 1}, "bytes saved 10,000,000 to 10,000,001"),
        ({"launches": 3}, {"launches": 4}, "kernels launched 3 to 4"),
        ({"launches": 0}, {"launches": 1}, "kernels launched 0 to 1"),
        ({}, {"peak_bytes": 106 * 10**6}, "bytes at the peak 100,000,000 to 106,000,000"),
        ({}, {"rms_error": 2.1e-6}, "RMS error 1e-06 to 2.1e-06"),
        ({"rms_error": 0.0}, {"rms_error": 1e-9}, "RMS error 0 to 1e-09"),
    ],
)
def test_worse_and_better(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    worse, better = change(before, after), change(after, before)
    assert (worse.worse, worse.better) == ((what,), ())
    assert better.worse == () and len(better.better) == 1 and better.better[0].split()[0] == what.split()[0]


@pytest.mark.parametrize(
    "after",
    [
        {},
        {"over_stock": 1.35, "over_stock_q20": 1.2, "over_stock_q80": 1.41},  # the intervals meet
        {"median_ms": 4.0, "q20_ms": 3.9, "q80_ms": 4.1},  # the machine is slower, for stock torch too
        {"peak_bytes": 104 * 10**6},
        {"rms_error": 1.9e-6, "max_error": 1.0},
        {"saved_bytes": None, "peak_bytes": None, "launches": 7},  # not measured both times
    ],
)
def test_no_change(after: dict[str, Any]) -> None:
    assert change({}, after).worse == change({}, after).better == change(after, {}).worse == ()


def test_what_is_only_in_one() -> None:
    kept, gone, new = (made_records.record(case=f"64-64@{size} 3x3/1 batch 8") for size in (56, 28, 14))
    stock = made_records.record(provider="eager_channels_last")
    found = compare([stock, gone, kept], [new, kept])
    assert [c.after for c in found.changes] == [kept]
    assert [key.trial.case for key in (*found.missing, *found.new)] == [gone.case, new.case]
    told = lines(found)
    assert any(line.startswith("not measured after: 64-64@28") for line in told)
    assert any(line.startswith("new: 64-64@14") for line in told)
    assert told[-1] == "1 compared, 0 worse, 0 better, 1 not measured after, 1 new"
    assert lines(compare([], []))[-1] == "0 compared, 0 worse, 0 better, 0 not measured after, 0 new"


def test_providers_of_ours_are_apart() -> None:
    frozen = made_records.record(provider="fastconv_frozen")
    found = compare([made_records.record(), frozen], [made_records.record(), made_records.record(**SLOWER)])
    assert [c.after.provider for c in found.changes] == ["fastconv"]
    assert [key.provider for key in found.missing] == ["fastconv_frozen"]


def test_lines() -> None:
    after = made_records.record(**{**SLOWER, "fastest_stock": "compile_default"})
    table, worse = lines(compare([made_records.record()], [after]))[1:3]
    for part in ("64-64@56 3x3/1 batch 32 forward float32", "1.50× (1.40–1.60)", "1.30× (1.20–1.39)", "2 (1.9–2.2)"):
        assert part in table
    assert "WORSE ratio over stock torch" in table and "stock was eager_channels_last, is compile_default" in table
    assert worse == "WORSE 64-64@56 3x3/1 batch 32 forward float32: ratio over stock torch"


def test_other_chips_are_refused() -> None:
    with pytest.raises(ValueError, match="Some CPU cpu-2 and Some GPU sm_90"):
        compare([made_records.record()], [made_records.record(**made_records.GPU)])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    bench_compare.add_compare(parser.add_subparsers())
    before, after, folder = tmp_path / "before.json", tmp_path / "after.json", tmp_path / "folder"
    records.write(before, [made_records.record()], whole=True)
    records.write(after, [made_records.record(**SLOWER)], whole=True)
    records.write(folder / "layers.json", [made_records.record(**SLOWER)], whole=True)
    for a, b, status in ((before, after, 1), (before, folder, 1), (after, before, 0), (before, before, 0)):
        options = parser.parse_args(["compare", str(a), str(b)])
        assert options.run(options) == status
    printed = capsys.readouterr().out
    assert "before: Some CPU cpu-2, torch 2.13.0+cpu, 2026-11-22, commit 0123456789ab" in printed
    (tmp_path / "empty.json").write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(ValueError, match="no records"):
        bench_compare.run_compare(argparse.Namespace(before=tmp_path / "empty.json", after=after))
