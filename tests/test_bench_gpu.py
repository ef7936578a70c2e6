"""`make gpu`: parts in their order, whatever one of them does; what is kept when it is stopped, and left out then."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import gpu, gpu_parts, gpu_tests
from benchmarks.gpu_parts import PARTS, Setup, Step
from fastconv import cli
from fastconv.bench import kernels, sources, timing

pytest_plugins = ["pytester"]
ROOT = Path(gpu.__file__).parents[1]
Main = Callable[..., int]


def python(name: str, code: str, **limits: object) -> Step:
    return Step(name, (sys.executable, "-S", "-c", code), **limits)  # type: ignore[arg-type]


def setup(tmp_path: Path, device: str = "cpu", is_quick: bool = True) -> Setup:
    root, cache = tmp_path / "results", tmp_path / "cache"
    return Setup(device, is_quick, "A Chip sm_90", "sm_90", root, root / "a-chip", cache, cache / "fastconv" / "a-chip.json")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """`make gpu` with parts of the test's own; arguments as the command takes them."""

    def main(steps: dict[str, list[Step]], *arguments: str) -> int:
        monkeypatch.setattr(gpu, "parts", lambda setup: steps)
        return gpu.main(["--device", "cpu", "--quick", *arguments])

    monkeypatch.setattr(gpu, "_setup", lambda *_: setup(tmp_path))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return main


def test_parts_run_in_their_order_whatever_fails(run: Main, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = {part: [python("one", f"print('this is {part}')")] for part in PARTS}
    steps["layers"] = [
        python("fails", "import sys; print('no such case'); sys.exit(1)"),
        Step("absent", ("no-such-program",)),
        python("refused", "import sys; sys.exit(3)", unfinished=75),
        python("goes on", "print('all the same')"),
    ]
    assert run(steps) == 1
    printed = capfd.readouterr().out
    assert re.findall(r"=== (\w+): one", printed) == [part for part in PARTS if part != "layers"]
    table = printed[printed.rindex("=== ") :].splitlines()
    assert [row.split()[0] for row in table if " s  " in row] == [p for p in PARTS for _ in steps[p]]
    (fails,) = (row for row in table if "fails" in row)
    assert "failed: 1" in fails and fails.endswith("no such case")
    assert any("absent" in row and "failed: 127" in row for row in table)
    assert any("refused" in row and "failed: 3" in row for row in table)
    assert any("goes on" in row and "ok" in row and row.endswith("all the same") for row in table)
    assert (out / "gpu.log").read_text() == printed


def test_a_list_of_parts_runs_in_the_usual_order(run: Main, capfd: pytest.CaptureFixture[str]) -> None:
    steps = {part: [python("one", "")] for part in PARTS}
    assert run(steps, "--part", "models,tune") == 0
    assert re.findall(r"=== (\w+): one", capfd.readouterr().out) == ["tune", "models"]


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_part_over_its_time_is_stopped_and_hides_none(run: Main, stubborn: bool, tmp_path: Path) -> None:
    """With what it started, and whether or not it minds being interrupted."""
    child = "import time; time.sleep(60)"
    code = f"""
import pathlib, signal, subprocess, sys, time
{"signal.signal(signal.SIGINT, signal.SIG_IGN)" if stubborn else ""}
child = subprocess.Popen([sys.executable, "-S", "-c", {child!r}])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    steps = {"tune": [python("hangs", code), python("behind it", "")], "layers": [python("other part", "print('ran')")]}
    start = time.monotonic()
    assert run(steps, "--limit", "2") == 1
    assert time.monotonic() - start < 20
    log = (tmp_path / "results" / "a-chip" / "gpu.log").read_text()
    assert re.search(r"hangs +2 s +over its time", log)
    assert re.search(r"behind it +0 s +not begun", log)
    assert re.search(r"other part +\d s +ok +ran", log)
    assert _ended(int((tmp_path / "child").read_text()))


def _ended(pid: int) -> bool:
    """Gone, or waiting for its parent to see that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_command_knows_its_seconds_and_may_stop_in_time(run: Main, capfd: pytest.CaptureFixture[str]) -> None:
    told = (sys.executable, "-S", "-c", "import sys; print('told', sys.argv[1]); sys.exit(3)", "{seconds}")
    whole = Step("whole", told)
    bounded = Step("bounded", told, most=50.0)
    assert run({"tune": [bounded, whole, python("behind", "")]}, "--limit", "100") == 3
    printed = capfd.readouterr().out
    assert re.search(r"bounded .* unfinished +told 40\n", printed)
    assert re.search(r"whole .* unfinished +told (80|79)\n", printed)
    assert re.search(r"behind .* not begun", printed), "what is left of a part is for what it did not finish"


def test_a_step_may_be_run_always(run: Main, capfd: pytest.CaptureFixture[str]) -> None:
    """The goals beside what was measured, when there was no time for all of it."""
    refused = python("refused", "import sys; sys.exit(3)")
    steps = [refused, python("behind", ""), python("goals", "print('so far')", most=30.0, unfinished=None, always=True)]
    assert run({"layers": [*steps, python("last", "")]}) == 3
    printed = capfd.readouterr().out
    assert re.search(r"behind .* not begun", printed) and re.search(r"goals .* ok +so far", printed)
    assert re.search(r"last .* not begun", printed)


def test_copies_are_few_flat_and_small(run: Main, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results" / "a-chip"
    folder.mkdir(parents=True)
    (folder / "models.json").write_text("from another run")
    monkeypatch.setattr(gpu, "_MOST_BYTES", 4000)
    names = ["tuning.json", "layers.json", "pools.json", "scaling.json", "overhead.json", "passed.txt", "probe-a-chip.json"]
    write = "import os, pathlib\nfor name in {}: pathlib.Path(os.environ['OUT'], name).write_text(name)"
    many = python("many", write.format(names))
    assert run({"tune": [python("few", write.format([*names[:2], "plot.png"])), python("log", "print('x' * 9000)")]}) == 0
    assert sorted(file.name for file in out.iterdir()) == ["gpu.log", *sorted(names[:2])]
    assert (out / "gpu.log").stat().st_size == 4000 and "in " in (out / "gpu.log").read_text()[-500:], "the log's end"
    assert run({"tune": [many]}) == 0
    copies = {file.name for file in out.iterdir()}
    assert len(copies) <= 8 and "models.json" not in copies and all(re.fullmatch(r"[\w.-]+", name) for name in copies)
    assert all(file.is_file() and file.stat().st_size <= 4000 for file in out.iterdir())
    with tarfile.open(out / "more.tar.gz") as archive:
        packed = archive.getnames()
    assert {*copies, *packed} == {"gpu.log", "more.tar.gz", *names} and not copies & set(packed)
    assert {"gpu.log", "tuning.json", "layers.json", "pools.json"} <= copies


def test_a_table_is_put_where_later_processes_read_it(run: Main, tmp_path: Path) -> None:
    where = setup(tmp_path)
    where.table.parent.mkdir(parents=True)
    where.table.write_text("shipped")
    read = f"import pathlib; print('read', pathlib.Path({str(where.table)!r}).read_text())"
    measure = "import os, pathlib; pathlib.Path(os.environ['OUT'], 'tuning.json').open('a').write(', tuned')"
    assert run({"tune": [python("one", measure)], "layers": [python("two", read)]}) == 0
    assert "read shipped, tuned" in (where.folder / "gpu.log").read_text()
    where.table.unlink()
    assert run({"layers": [python("two", read)]}) == 0, "another machine, to which the results were brought"
    assert where.table.read_text() == "shipped, tuned"


def test_pages_are_gathered(run: Main, out: Path) -> None:
    steps = [python("First", f"print('{ROOT}/one')", is_page=True), python("Second", "1 / 0", is_page=True)]
    assert run({"inspect": steps}) == 1
    page = (out / "inspect.md").read_text()
    assert page.startswith("# Seen on A Chip sm_90\n")
    assert "## First\n" in page and "```\none\n```" in page, "without the path of this machine"
    assert page.index("First") < page.index("## Second") < page.index("ZeroDivisionError")


_STOPPABLE = """
import sys
from pathlib import Path
from benchmarks import gpu
from benchmarks.gpu_parts import Setup, Step
root = Path(sys.argv[1])
python = lambda name, code: Step(name, (sys.executable, "-S", "-c", code))
code = "import os, pathlib, time; pathlib.Path(os.environ['OUT'], 'layers.json').write_text('[1]'); print('up', flush=True)"
steps = [python("first", "print('done')"), python("second", code + "; time.sleep(60)"), python("third", "")]
gpu._EVERY = 0.2
gpu._setup = lambda *_: Setup("cpu", True, "A Chip", "sm_90", root, root / "a-chip", root / "cache", root / "table.json")
gpu.parts = lambda setup: {"layers": steps, "models": [python("fourth", "")]}
sys.exit(gpu.main([]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_what_was_measured_survives(number: signal.Signals, out: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STOPPABLE, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (out / "layers.json").is_file() or "up\n" not in (out / "gpu.log").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert (out / "layers.json").read_text() == "[1]"
    log = (out / "gpu.log").read_text()
    assert "=== layers: second\nup\n" in log and "third" not in log
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert re.search(r"first .* ok +done\n", printed) and re.search(r"second .* stopped +", printed)
        assert printed == log, "the table is copied too"


@pytest.mark.parametrize("arguments", [["--part", "nets"], ["--part", "tests,"], ["--part", ""], ["--limit", "0"]], ids=str)
def test_arguments_that_are_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*arguments, "--check"])
    assert stopped.value.code == 2
    assert (
        "PART must be of tests, tune, layers, models, training, inspect, train, and LIMIT above 0" in capsys.readouterr().err
    )
    assert gpu.main(["--part", "inspect,tests", "--check"]) == 0


def test_arguments_are_looked_at_before_torch_is_installed() -> None:
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--check", "--part", "tests"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "Run", None)  # nothing is begun
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("make gpu: torch sees no CUDA device; DEVICE=cpu QUICK=1 rehearses")


def test_a_rehearsal_leaves_results_and_package_alone() -> None:
    found = gpu._setup("cpu", True)
    assert found is not None
    assert all(path.is_relative_to(ROOT / "runs" / "gpu") for path in (found.root, found.folder, found.cache, found.table))
    assert found.folder.parent == found.root and found.table.is_relative_to(found.cache) and found.arch == "sm_90"


@pytest.mark.parametrize("device, is_quick", [("cuda", False), ("cuda", True), ("cpu", True)])
def test_commands_are_ones_that_there_are(
    tmp_path: Path, device: str, is_quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = gpu_parts.parts(setup(tmp_path, device, is_quick))
    assert tuple(parts) == PARTS and all(parts.values())
    parsed = []
    for command in cli._COMMANDS:
        monkeypatch.setattr(command, "run", parsed.append)
    ours = [step.command[3:] for part in PARTS for step in parts[part] if step.command[1:3] == ("-m", "fastconv")]
    for words in ours:
        assert cli.main([word.replace("{seconds}", "5") for word in words]) == 0, words
    assert len(parsed) == len(ours) >= 5
    timed = [step for part in ("tests", "tune", "layers", "models", "training") for step in parts[part]]
    assert all("{seconds}" in step.command or step.name == "goals" for step in timed if step.command[0] != "echo")
    names = [step.name for step in parts["tune"]]
    if not is_quick:
        assert names[:3] == ["recipe 256x3x224x224 bfloat16", "recipe 128x3x32x32 bfloat16", "vgg16 32x3x224x224 bfloat16"]
        assert len(set(names)) == 9
    assert [s.command.count("--suite") for part in ("layers", "models", "training") for s in parts[part]] == [
        4,
        0,
        1,
        0,
        1,
        0,
    ]


_SOME_TESTS = """
import pathlib
from benchmarks import gpu_tests
def test_passes(): pathlib.Path("ran").open("a").write("p")
def test_fails(): assert pathlib.Path("mended").exists(), "not yet"
def test_waits(): gpu_tests.time.now += 0.3
def test_last(): pathlib.Path("ran").open("a").write("l")
"""


def test_tests_go_on_where_they_stopped(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(gpu_tests, "time", clock)
    pytester.makepyfile(test_some=_SOME_TESTS)
    passed = pytester.path / "passed.txt"

    def tests(*options: str) -> tuple[int, dict[str, int]]:
        arguments = ("-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider", "-p", "no:warnings", "--passed", str(passed))
        result = pytester.runpytest_inprocess(*arguments, *options)
        return int(result.ret), result.parseoutcomes()

    assert tests("--seconds", "0.2") == (1, {"passed": 2, "failed": 1}), "what failed is no less told"
    names = [f"test_some.py::test_{name}" for name in ("passes", "waits", "last")]
    assert passed.read_text().splitlines()[1:] == names[:2]
    (pytester.path / "mended").touch()
    assert tests("--seconds", "-1") == (gpu_tests.UNFINISHED, {"passed": 1, "deselected": 2})
    assert tests("--seconds", "-1") == (0, {"passed": 1, "deselected": 3}), "the last one was in time"
    assert tests() == (0, {"deselected": 4}), "nothing is left"
    assert (pytester.path / "ran").read_text() == "pl"
    passed.write_text("\n".join(["other sources", *names]))
    assert tests() == (0, {"passed": 4})


def test_sources(tmp_path: Path) -> None:
    before = sources.digest(tmp_path)
    (tmp_path / "table.json").write_text("{}")
    assert sources.digest(tmp_path) == before, "tables change while they are measured"
    (tmp_path / "new.py").write_text("")
    assert sources.digest(tmp_path) != before == sources.digest()


def test_launches_of_a_cpu_are_operators() -> None:
    x = torch.randn(64, 64)
    found = kernels.launches(lambda: (x @ x).relu() @ x, "cpu")
    counts = {kernel.name: kernel.count for kernel in found}
    assert counts["aten::mm"] == 2 and counts["aten::relu"] == 1
    times = [kernel.microseconds for kernel in found]
    assert times == sorted(times, reverse=True) and min(times) >= 0 < max(times)
    assert kernels.count_launches(lambda: x @ x, "cpu") is None


def test_kernels_of_a_gpu_are_told_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, microseconds: float, device: DeviceType = DeviceType.CUDA, is_range: bool = False) -> object:
        lasting = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_range, time_range=lasting)

    events = [
        event("conv", 5.0),
        event("Optimizer.step", 99.0, is_range=True),
        event("cudaLaunchKernel", 50.0, DeviceType.CPU),
        event("Memcpy DtoD", 9.0),
        event("conv", 6.0),
    ]
    found = kernels.summed(events, on_gpu=True)  # type: ignore[arg-type]
    assert found == [kernels.Kernel("conv", 2, 11.0), kernels.Kernel("Memcpy DtoD", 1, 9.0)]
    monkeypatch.setattr(kernels, "launches", lambda *_: found)
    assert kernels.count_launches(lambda: None) == 2
    assert kernels.table(found, 1).splitlines() == [
        "        11 µs  55%    2× conv",
        "         9 µs  45%    1× others",
        "        20 µs 100%    3× all",
    ]


@pytest.mark.gpu
def test_launches_of_a_gpu() -> None:
    x = torch.randn(512, 512, device="cuda")
    found = kernels.launches(lambda: x.relu().exp_())
    assert sum(kernel.count for kernel in found) == 2 == kernels.count_launches(lambda: x.relu().exp_())
    assert all(kernel.microseconds > 0 for kernel in found)


def test_kernels_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cpu", "--batch", "1", "--size", "8", "--most", "3"]) == 0
    ours, theirs = capsys.readouterr().out.strip().split("\n\n")
    assert ours.startswith("recipe R=8 batch 1 bfloat16, a training step on fastconv's layers")
    assert "fastconv" in ours.partition("\n")[2] and "fastconv" not in theirs and theirs.count("\n") == 5


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_fault_ends_the_process_that_it_happened_in(is_lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every test behind it would fail too."""

    def synchronize(*_: object) -> None:
        if is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(gpu_tests.os, "_exit", ended.append)
    failed, passed = (SimpleNamespace(failed=failed, nodeid="test_it") for failed in (True, False))
    for report in (failed, passed):
        with pytest.raises(pytest.exit.Exception) if is_lost and report is failed else contextlib.nullcontext():
            gpu_tests._Faults(is_worker=False).pytest_runtest_logreport(report)  # type: ignore[arg-type]
    assert ended == []
    with contextlib.suppress(pytest.exit.Exception):  # which only a process that really ended would not come to
        gpu_tests._Faults(is_worker=True).pytest_runtest_logreport(failed)  # type: ignore[arg-type]
    assert ended == [1] * is_lost
    error = ValueError("no such kernel")
    timing.require_alive(torch.device("cpu"), "a call", error)
    with (
        pytest.raises(RuntimeError, match=r"a call: the GPU no longer answers .* first error was: no such kernel")
        if is_lost
        else contextlib.nullcontext()
    ):
        timing.require_alive(torch.device("cuda"), "a call", error)
