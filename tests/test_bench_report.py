"""README, docs and pictures say what the committed records say, and whatever does not is found."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import made_records
import pytest

from benchmarks import report, tables
from fastconv.bench import records
from fastconv.bench.records import SUITES, Record

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
CPU = [r for r in made_records.chip(False) if r.dtype == "float32"]
WRITTEN = ("README.md", "docs/results.md", "docs/numerics.md")


def put(root: Path, folder: str, found: list[Record]) -> None:
    for suite in SUITES:
        of = [record for record in found if record.suite == suite]
        if of:
            records.write(root / "benchmarks" / "results" / folder / f"{suite}.json", of, whole=True)


def copied(root: Path) -> Path:
    """The project's texts, without records."""
    (root / "docs").mkdir()
    for name in ("README.md", "docs/numerics.md"):
        shutil.copy(ROOT / name, root / name)
    return root


def section(root: Path) -> str:
    text = (root / "README.md").read_text(encoding="utf-8")
    return text[text.index(report.BEGIN) : text.index(report.END)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose texts and pictures are those of two chips."""
    root = copied(tmp_path_factory.mktemp("root"))
    put(root, "a-cpu", CPU)
    put(root, "some-gpu", [r for r in made_records.chip(True) if r.suite in ("layers", "pools") and r.dtype == "bfloat16"])
    assert report.main(["--root", str(root)]) == 0
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_the_project_says_what_its_records_say() -> None:
    assert report.disagreements(ROOT) == [], "run `python -m benchmarks.report`"


@pytest.mark.parametrize("name", WRITTEN)
def test_a_changed_text_is_found(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (root / name).read_text(encoding="utf-8")
    at = re.search(r"^\| 64-64@56 .*?(\d)|^\| layers .*?(\d)", text, flags=re.MULTILINE)
    assert at is not None
    (root / name).write_text(f"{text[: at.end()]}0{text[at.end() :]}", encoding="utf-8")
    assert report.main(["--root", str(root), "--check"]) == 1
    assert capsys.readouterr().out == f"{name} does not say what the records say\n"
    assert report.texts(root)[root / name] == text


def test_a_changed_record_is_found(root: Path) -> None:
    path = root / "benchmarks" / "results" / "a-cpu" / "layers.json"
    first, *others = records.read(path)
    records.write(
        path, [dataclasses.replace(first, over_stock=9.0, over_stock_q80=9.5, rms_error=0.25), *others], whole=True
    )
    wrong = "\n".join(report.disagreements(root))
    assert all(f"{name} does not" in wrong for name in ("README.md", "docs/results.md"))
    assert "a-cpu/layers.png was not drawn" in wrong and "a-cpu/roofline.png was not drawn" in wrong
    assert "pools.png" not in wrong and "some-gpu" not in wrong


def test_missing_and_left_over_pictures_are_found(root: Path) -> None:
    folder = root / "benchmarks" / "results" / "a-cpu"
    (folder / "nets.png").rename(folder / "layers_2.png")
    told = ["layers_2.png was not drawn from these records", "nets.png is missing"]
    assert report.disagreements(root) == [f"benchmarks/results/a-cpu/{what}" for what in told]
    report.write(root)
    assert report.disagreements(root) == [] and not (folder / "layers_2.png").exists()


def test_what_is_told_of_two_chips(written: Path) -> None:
    text = section(written)
    gpu, cpu = text.split("### ")[1:]
    assert gpu.startswith(
        "Some GPU sm_90\n\n2026-11-22, torch 2.13.0+cu130, Triton 3.7.1, cuDNN 91300, driver 580.65, commit"
    )
    assert cpu.startswith("Some CPU cpu-2\n\n2026-11-22, torch 2.13.0+cpu, Triton 3.7.1, commit 0123456789ab.\n")
    assert "| net |" in cpu and "| call |" in cpu and "nets.png" in cpu
    assert "| net |" not in gpu and "| call |" not in gpu and "nets.png" not in gpu and "layers.png" in gpu
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    assert len(pictures) == 3 and all((written / file).is_file() for _, file in pictures)
    results = (written / "docs" / "results.md").read_text(encoding="utf-8")
    assert all((written / "docs" / file).is_file() for file in re.findall(r"!\[.+?\]\((.+?)\)", results))
    ours = [r for r in CPU if r.is_ours]
    assert sum(line.startswith("| ") for line in results[results.index("## Some CPU") :].splitlines()) == len(ours) + 6


@pytest.mark.parametrize("name", WRITTEN)
def test_tables_are_well_formed(name: str, written: Path) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", (written / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(blocks) >= 5
    for block in blocks:
        rows = block.splitlines()
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(columns) == 1 and set(rows[1]) <= set("|-:") and len(rows) >= 3, rows[0]
        assert all(row.endswith("|") for row in rows)


def test_nothing_measured(tmp_path: Path) -> None:
    root = copied(tmp_path)
    report.write(root)
    assert report.disagreements(root) == [] and "###" not in section(root) and "|" not in section(root)


def test_texts_without_marks_are_refused(tmp_path: Path) -> None:
    (copied(tmp_path) / "README.md").write_text(f"{report.END}\n{report.BEGIN}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: wants one line"):
        report.texts(tmp_path)


def test_ranges(tmp_path: Path) -> None:
    days = [
        made_records.record(case=f"64-64@{day} 3x3/1 batch 8", date=f"2026-11-{day}", commit=str(day))
        for day in (24, 22, 23, 25)
    ]
    put(copied(tmp_path), "chip", days)
    report.write(tmp_path)
    assert "\n2026-11-22 to 2026-11-25, torch 2.13.0+cpu, Triton 3.7.1, commits 22 to 25 (4).\n" in section(tmp_path)


def test_nets_table() -> None:
    forward = made_records.pair(2.0, 2500.0, "compile_default", suite="models", case="vgg16 R=224 batch 2")
    step = made_records.pair(0.5, 0.5, suite="training", case="vgg16 R=224 batch 2", direction="step", peak_bytes=1234567890)
    (_, _, row) = tables.nets([*forward, *step])
    assert row == (
        "| vgg16 R=224 batch 2 | float32 | 1.25 s / 2.5 s (torch.compile) | 2.00× (1.90–2.10) "
        "| 1 ms / 500 µs (eager) | 0.50× (0.44–0.56) | 1235 / 1235 |"
    )
    assert tables.nets([]) == []


def test_summary_table() -> None:
    gains = {"64-64@56 3x3/1": 2.0, "64-64@28 3x3/1": 0.5}
    found = [r for what, gain in gains.items() for r in made_records.pair(gain, 5.0, case=f"{what} batch 8")]
    assert tables.summary(found)[2:] == ["| layers | 8 | forward | 2 | 1.00× (0.50–2.00), 1 slower |"]
    many = [r for batch in (1, 2, 4, 8) for r in made_records.pair(2.0, 5.0, case=f"64-64@56 3x3/1 batch {batch}")]
    assert tables.summary(many)[2:] == ["| layers | 1–8 | forward | 4 | 2.00× (2.00–2.00) |"]


def test_errors_table() -> None:
    """Of each number of products the first layer, at its largest batch."""
    cases = ("64-64@56 3x3/1 batch 1", "64-64@56 3x3/1 batch 8", "64-128@28 3x3/1 batch 8", "16-64@56 3x3/1 batch 8")
    found = [made_records.record(case=case, max_error=0.5) for case in cases]
    stock = made_records.record(case=cases[1], provider="eager_channels_last", rms_error=2e-6)
    assert tables.layer_errors([*found, stock], "forward")[2:] == [
        "| 16-64@56 3x3/1 batch 8 | 1.0e-06 / 5.0e-01 |  |",
        "| 64-64@56 3x3/1 batch 8 | 1.0e-06 / 5.0e-01 | 2.0e-06 / 1.0e-05 |",
    ]
