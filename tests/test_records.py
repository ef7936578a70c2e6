"""Records of measurements: what may be one, and that files give back what they were given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_bench import MACHINE

from fastconv.bench import records


def _record(**changes: Any) -> records.Record:
    times = {"median_ms": 2.0, "q20_ms": 1.5, "q80_ms": 2.5, "runs": 9}
    gains = {"fastest_stock": "eager_nchw", "over_stock": 1.25, "over_stock_q20": 1.0, "over_stock_q80": 1.5}
    what = {"suite": "models", "case": "net", "direction": "forward", "dtype": "float32", "provider": "fastconv"}
    found = {"gate_passed": True, "max_error": 1e-6, "rms_error": 1e-7, "flops": 10, "bytes": None, "roofline_percent": 50.0}
    rest = dict.fromkeys(("peak_bytes", "saved_bytes", "launches", "copy_gb_per_s", "matmul_tflop_per_s"))
    return records.Record(**{**what, **times, **gains, **found, **rest, **dataclasses.asdict(MACHINE), **changes})


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "chip" / "models.json"
    first, second = _record(), _record(provider="eager_channels_last", peak_bytes=7)
    records.write(path, [first, second], whole=True)
    assert records.read(path) == [first, second]
    (row, _) = json.loads(path.read_text(encoding="utf-8"))
    wanted = "suite case direction dtype provider median_ms q20_ms q80_ms gate_passed max_error rms_error peak_bytes"
    assert {*wanted.split(), "chip", "driver", "torch", "triton", "cudnn", "commit", "date"} <= set(row)
    assert row["chip"] == MACHINE.chip and row["cudnn"] is None and row["torch"] == torch.__version__
    other = _record(case="another")
    records.write(path, [other], whole=False)
    records.write(path, [_record(median_ms=2.1)], whole=False)
    assert [(r.case, r.median_ms) for r in records.read(path)] == [("another", 2.0), ("net", 2.1)]
    records.write(path, [other], whole=True)
    assert records.read(path) == [other]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate_passed": False}, "did not pass its gate"),
        ({"suite": "speed"}, "suite must be one of"),
        ({"direction": "sideways"}, "direction must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"provider": "somebody"}, "unknown provider"),
        ({"q20_ms": 3.0}, "not in order"),
    ],
)
def test_what_is_no_record(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _record(**changes)


def test_what_is_no_file_of_records(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    for text, message in (("{}", "a list of records is wanted"), ('[{"suite": "models"}]', "missing"), ("[", "Expecting")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            records.read(path)
