"""Tables of measurements as files: what is refused, how they are replaced, where they lie."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import CHIP, FP32, call, conv, entry, put

from fastconv import backends, tuning
from fastconv.geometry import PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Call, pick, tables
from fastconv.tuning.candidates import ATEN, is_cpu

pytestmark = pytest.mark.usefixtures("cache")


def _set(*path: str | int, to: object) -> Callable[[Any], object]:
    def change(content: Any) -> object:
        place = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to
        return content

    return change


BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "list": (lambda content: [content], "the file must be of type dict"),
    "newer": (_set("format", to=2), "its format is 2, and this version of fastconv reads 1"),
    "format": (_set("format", to="1"), "the file: format must be of type int"),
    "foreign": (_set("chip", to="NVIDIA A100 sm_80"), "it was measured on 'NVIDIA A100 sm_80'"),
    "no entries": (lambda content: {k: v for k, v in content.items() if k != "entries"}, "the file has no 'entries'"),
    "entry": (_set("entries", 0, to=7), "entry 0 must be of type dict"),
    "op": (_set("entries", 0, "op", to="conv3d"), "entry 0: unknown operator 'conv3d'"),
    "direction": (_set("entries", 0, "direction", to="backward"), "unknown operator 'conv2d_relu' \\('backward'\\)"),
    "dtype": (_set("entries", 0, "dtype", to="int8"), "unknown dtype 'int8'"),
    "tf32": (_set("entries", 0, "tf32", to=True), "tf32 with dtype 'bfloat16'"),
    "bool": (_set("entries", 0, "channels_last", to=1), "channels_last must be of type bool"),
    "field": (_set("entries", 0, "geometry", "kernel_size", to=[2, 2]), "geometry must have the fields"),
    "shape": (_set("entries", 0, "geometry", "input", to=[32, 128, 28]), "input must be 4 integers from 1 on"),
    "size": (_set("entries", 0, "geometry", "stride", 0, to=0), "stride must be 2 integers from 1 on"),
    "float": (_set("entries", 0, "geometry", "stride", 0, to=1.0), "stride must be 2 integers"),
    "geometry": (_set("entries", 0, "geometry", "groups", to=3), "expected weight to be divisible by 3"),
    "backend": (_set("entries", 0, "candidate", "backend", to="cutlass"), "unknown backend 'cutlass'"),
    "config": (_set("entries", 0, "candidate", "config", to={"BLOCK_N": "64"}), "BLOCK_N must be of type int"),
    "seconds": (_set("entries", 0, "seconds", to=-1.0), "seconds must be a positive number, got -1.0"),
    "infinity": (_set("entries", 0, "seconds", to=float("inf")), "seconds must be a positive number, got inf"),
    "too large": (_set("entries", 0, "seconds", to=10**400), "seconds must be a positive number, got 1000"),
    "true": (_set("entries", 0, "seconds", to=True), "seconds must be a positive number, got True"),
    "sources": (_set("entries", 0, "sources", to=7), "entry 0: sources must be of type str"),
    "other": (_set("entries", 0, "others", 0, "seconds", to=None), "entry 0, other 0: seconds must be"),
}


@pytest.mark.parametrize("name", [*BROKEN, "cut off", "no text", "nested"])
def test_a_table_that_is_none_is_reported_once_and_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    modelled = pick(*call())
    path = put(entry(call(), modelled[-1], ATEN))
    assert pick(*call())[0] == modelled[-1]
    if name in BROKEN:
        change, reason = BROKEN[name]
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        texts = {"cut off": path.read_bytes()[:-9], "no text": b"\xff\xfe\x00", "nested": b"[" * 200_000}
        path.write_bytes(texts[name])
        reason = "it is not JSON"
    caplog.set_level(logging.INFO, "fastconv")
    for _ in range(3):
        tuning.forget()
        assert pick(*call()) == modelled
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    with pytest.raises(tables.TableError, match=reason):
        tables.read(path, CHIP)
    with pytest.raises(tables.TableError):
        tables.write(path, CHIP, [entry(call(), ATEN)])


def test_tables_are_read_back_as_written() -> None:
    pool = PoolGeometry.of("max_pool2d", (2, 8, 9, 9), (3, 3), (2, 2), (1, 1), (1, 1), True)
    kept = entry(Call("max_pool2d", "forward", pool, FP32, CHIP, False), ATEN)
    path = put(kept, entry(call(), ATEN), entry(call(policy=Policy(torch.float32, True)), pick(*call())[0], ATEN))
    put(entry(call(), pick(*call())[-1], ATEN))
    found = {e.call: e for e in tables.read(path, CHIP)}
    assert len(found) == 3
    assert found[kept.call] == kept
    assert found[call()].candidate != ATEN, "the later of two measurements of a call"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(entry(call(), ATEN))
    before = path.read_text()

    def full(source: object, target: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(tables.os, "replace", full)
        tables.write(path, CHIP, [entry(call(conv(batch=1)), ATEN)])
    assert path.read_text() == before
    assert _tables(path) == [path], "no half-written file is left"


def _tables(path: Path) -> list[Path]:
    """What lies beside a table, its lock excluded."""
    return [file for file in path.parent.iterdir() if file.name != path.name + ".lock"]


def test_writers_at_the_same_time_leave_a_whole_table() -> None:
    path = put(entry(call(), ATEN))
    wrong: list[Exception] = []

    def work(number: int) -> None:
        try:
            for batch in range(10 * number + 1, 10 * number + 9):
                tables.write(path, CHIP, [entry(call(conv(batch=batch)), ATEN)])
                assert tables.read(path, CHIP)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    batches = {10 * number + i for number in range(4) for i in range(1, 9)}
    assert {e.call for e in tables.read(path, CHIP)} == {call(), *(call(conv(batch=batch)) for batch in batches)}
    assert _tables(path) == [path]


def test_a_users_entry_goes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "shipped_folder", lambda: tmp_path / "shipped")
    modelled, other = pick(*call()), conv(channels=256)
    shipped = tmp_path / "shipped" / tables.file_name(CHIP)
    tables.write(shipped, CHIP, [entry(call(), modelled[-1]), entry(call(other), ATEN)])
    tuning.forget()
    assert pick(*call())[0] == modelled[-1]
    user = put(entry(call(), modelled[-2]))
    assert pick(*call())[0] == modelled[-2]
    assert pick(*call(other))[0] == ATEN
    assert tables.files(CHIP) == [shipped, user]
    assert [tables.describe(path, CHIP) for path in tables.files(CHIP)] == ["2 entries", "1 entries"]


def test_where_a_users_tables_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables.user_file(CHIP) == tmp_path / "fastconv" / "nvidia-h100-80gb-hbm3-sm_90.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tables.user_folder() == tmp_path / "home" / ".cache" / "fastconv"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(tables.Path, "home", homeless)
    assert tables.user_folder() is None
    assert pick(*call()), "a table is no need"
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        tables.user_file(CHIP)


def test_names_of_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_cpu(name) for name in ("cpu", "AMD EPYC 9B14 cpu-2", CHIP, "interpreter", "sm_80")] == [True] * 2 + [
        False
    ] * 3
    assert [tuning.capability(name) for name in (CHIP, "sm_120", "cpu", "interpreter")] == [90, 120, None, None]
    for threads in (3, 5):  # times of other numbers of threads are other times
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert backends.chip("cpu").endswith(f" cpu-{threads}")
