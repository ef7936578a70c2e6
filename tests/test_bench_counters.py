"""Counters of a step: what is read of ncu's output, what it is told to run, and what stands beside what it counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastconv.bench import counters
from fastconv.bench.counters import Counted

TIME, READ, WRITTEN, MEMORY, _, HITS, _ = counters._METRICS
_COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC"'
)
HEADER = f'{_COLUMNS},"Section Name","Metric Name","Metric Unit","Metric Value"'


def row(launch: int, kernel: str, metric: str, value: str, process: int = 7) -> str:
    where = f'"{launch}","{process}","python3","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0"'
    return f'{where},"Command line profiler metrics","{metric}","","{value}"'


WRITTEN_BY_NCU = [
    "==PROF== Connected to process 7 (/usr/bin/python3)",
    HEADER,
    row(0, "conv_tma_kernel", TIME, "30,000"),
    row(0, "conv_tma_kernel", READ, "4,000,000"),
    row(0, "conv_tma_kernel", WRITTEN, "1,000,000"),
    row(0, "conv_tma_kernel", MEMORY, "80"),
    row(0, "conv_tma_kernel", HITS, "n/a"),
    row(1, "void add<float, 4>(int, T1)", TIME, "15,000"),
    row(1, "void add<float, 4>(int, T1)", READ, "100"),
    row(2, "conv_tma_kernel", TIME, "10,000"),
    row(2, "conv_tma_kernel", READ, "500,000"),
    row(2, "conv_tma_kernel", MEMORY, "40"),
    "==PROF== Disconnected from process 7",
]


def test_launches_are_summed_by_kernel() -> None:
    (conv, add), errors = counters.read(WRITTEN_BY_NCU)
    assert errors == []
    assert conv == Counted("conv_tma_kernel", 2, 40.0, 5_500_000, {"memory": pytest.approx(70.0)}), "weighted by time"
    assert add == Counted("void add<float, 4>(int, T1)", 1, 15.0, 100, {})
    both, _ = counters.read([*WRITTEN_BY_NCU[:-1], row(0, "conv_tma_kernel", TIME, "1,000", process=8)])
    assert both[0].launches == 3, "each process counts its launches from 0"


def test_a_table() -> None:
    header, conv, total = counters.table(
        counters.read(WRITTEN_BY_NCU).kernels, 1, {"conv_tma_kernel": 5_000_000}
    ).splitlines()
    assert header.split() == ["µs", "launches", "MB", "counted", "memory", "compute", "L2", "hits", "warps", "kernel"]
    assert conv.split() == ["40", "2", "5.5", "5.0", "70%", "conv_tma_kernel"]
    assert conv.index("70%") + 3 == header.index("memory") + 6, "in its column"
    assert total.split() == ["55", "3", "5.5", "all"]


def test_errors_are_told_beside_what_was_counted() -> None:
    refused = "==ERROR== ERR_NVGPUCTRPERM - no permission to access counters"
    assert counters.read([refused, HEADER]) == ([], ["ERR_NVGPUCTRPERM - no permission to access counters"])
    assert counters.read([HEADER]) == ([], ["no launch was seen"])
    found = counters.read([*WRITTEN_BY_NCU, "==ERROR== the process ended"])
    assert len(found.kernels) == 2 and found.errors == ["the process ended"]


_NCU = f"""#!{sys.executable}
import sys
from pathlib import Path
words = sys.argv[1:]
Path(words[words.index("--log-file") + 1]).write_text({{text!r}})
Path(__file__).with_name("told").write_text("\\n".join(words))
print("the last line", file=sys.stderr)
sys.exit({{status}})
"""


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text(_NCU.format(status=0, text="\n".join(WRITTEN_BY_NCU)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return program


def options(*words: str) -> object:
    parser = counters.kernels.parser("")
    parser.add_argument("--backend")
    return parser.parse_args(["--device", "cuda:0", "--size", "32", "--backend", "triton", *words])


def test_what_ncu_is_told(ncu: Path) -> None:
    (conv, _), errors = counters.count(options(), "fastconv")  # type: ignore[arg-type]
    assert conv.launches == 2 and errors == []
    told = ncu.with_name("told").read_text().splitlines()
    assert told[told.index("--metrics") + 1].split(",") == [*counters._METRICS]
    assert told[told.index("--clock-control") + 1] == "none", "clocks are not ours to set"
    step = told[told.index("fastconv.bench.counters") + 1 :]
    assert step[:2] == ["--step", "fastconv"] and step[step.index("--size") + 1] == "32"
    ncu.write_text(_NCU.format(status=9, text=HEADER))
    assert counters.count(options(), "fastconv").errors == ["status 9: the last line"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "status"),
    [("", 0), ("==ERROR== ERR_NVGPUCTRPERM", 0), ("==ERROR== out of memory", 1)],
    ids=["counted", "refused", "failed"],
)
def test_a_run(
    ncu: Path, said: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(counters, "expected", lambda *_: {})
    ncu.write_text(_NCU.format(status=0, text="\n".join([*WRITTEN_BY_NCU, said])))
    assert counters.main(["--device", "cuda", "--model", "lenet5"]) == status
    ours, theirs, _ = capsys.readouterr().out.split("\n\n")
    assert ours.startswith("lenet5 R=28 batch 32 bfloat16, a training step on fastconv's layers, channels_last, triton\n")
    assert "torch's layers" in theirs and (f"ncu: {said[10:]}" in ours) == bool(said)
    ncu.unlink()
    assert counters.main(["--device", "cuda"]) == 2
    assert "neither on PATH nor under $CUDA_HOME/bin" in capsys.readouterr().err


def test_what_follows_from_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.backends, "chip", lambda *_: "NVIDIA H100 80GB HBM3 sm_90")
    found = counters.expected(options("--batch", "4"), "fastconv")  # type: ignore[arg-type]
    assert found["conv_tma_kernel"] > 10**6 and all(name.endswith("_kernel") for name in found)
    twice = counters.expected(options("--batch", "8"), "fastconv")  # type: ignore[arg-type]
    assert twice["conv_tma_kernel"] > found["conv_tma_kernel"]
    assert counters.expected(options(), "torch") == {} == counters.expected(options("--backend", "auto"), "fastconv")  # type: ignore[arg-type]
    monkeypatch.setattr(counters.backends, "chip", lambda *_: "NVIDIA RTX sm_89")
    assert counters.expected(options(), "fastconv") == {}, "no launches are recorded for it"  # type: ignore[arg-type]


def test_a_cpu_has_no_counters(capsys: pytest.CaptureFixture[str]) -> None:
    assert counters.main(["--device", "cpu"]) == 2
    assert "a CUDA device is wanted, got --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(counters.ncu() is None, reason="no ncu")
def test_counters_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert counters.main(["--batch", "2", "--size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "conv_tma_kernel" in printed or "ERR_NVGPUCTRPERM" in printed
