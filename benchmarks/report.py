"""What the committed records say, as text and pictures: `python -m benchmarks.report [--check]`.

Writes the pictures beside the records, docs/results.md, and what stands between two marks in README.md and docs/numerics.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import goals, tables
from fastconv.bench import pairs, plots, records
from fastconv.bench.records import SUITES, Record

BEGIN = "<!-- results: begin, written by python -m benchmarks.report -->"
END = "<!-- results: end -->"
_ROOT = Path(__file__).parent.parent
_README, _RESULTS, _NUMERICS = Path("README.md"), Path("docs/results.md"), Path("docs/numerics.md")
_IN_README = ("nets", "layers")  # pictures
_COMMITS = 3  # that are named

_ALT = {
    "nets": "Bars: how many times as fast as the fastest of stock torch whole nets run",
    "layers": "Bars: how many times as fast as the fastest of stock torch single layers run",
    "pools": "Bars: how many times as fast as the fastest of stock torch pools run",
    "roofline": "Operations a second of single layers by operations a byte, under the roof of memory and matrix products",
    "scaling": "Operations a second of a layer by batch, resolution and channels",
}
_RATIOS = """\
A ratio is the time of the fastest of stock torch (eager, torch.compile and what else it has, whichever is the fastest for
that row) in that of fastconv, paired within rounds: above 1 fastconv is the faster one; in brackets its 20 % and 80 %
quantiles. Times are medians.
"""
_RESULTS_NOTE = f"""\
Written by `python -m benchmarks.report` from the records in [benchmarks/results](../benchmarks/results), which hold the
slower providers of stock torch too.

{_RATIOS}
Peaks of memory are fastconv's / the fastest stock provider's. *Of the roofline* is the least time that this machine's rates
of copies and matrix products allow, operations counted by the definition, as a share of the time taken. Errors are in units
of the exact result's root mean square.
"""
_NUMERICS_NOTE = """\
Of each pair the first number is the root mean square error, the second the largest, both in units of the exact result's
root mean square; *stock torch* is its provider that was the fastest. Of the layers there is one for each number of summed
products.
"""
_TITLES = {
    "layers": "Layers",
    "pools": "Pools",
    "models": "Nets, inference",
    "training": "Nets, training step",
    "overhead": "Host time of a call",
    "scaling": "Layers that grow",
}
_ERRORS = {
    "Layers, forward": (tables.layer_errors, "forward"),
    "Layers, forward and backward: the worst of output and gradients": (tables.layer_errors, "both"),
    "Nets, outputs": (tables.net_errors, "forward"),
    "Nets, gradients of a training step: all parameters together / the worst parameter": (tables.net_errors, "step"),
}


def chips(root: Path) -> dict[Path, list[Record]]:
    """The folders of chips that have records, GPUs first."""
    folders = sorted({file.parent for suite in SUITES for file in root.glob(f"benchmarks/results/*/{suite}.json")})
    found = {folder: records.read(folder) for folder in folders}
    return dict(sorted(((f, r) for f, r in found.items() if r), key=lambda item: item[1][0].cudnn is None))


def texts(root: Path) -> dict[Path, str]:
    """What the files that are written, or written in part, should hold.

    Raises:
        ValueError: a file has not the two marks; a record is none.
    """
    found = chips(root)
    return {
        root / _README: _between(root / _README, _readme(found, root)),
        root / _RESULTS: "\n".join(_results(found)) + "\n",
        root / _NUMERICS: _between(root / _NUMERICS, _numerics(found)),
    }


def write(root: Path) -> None:
    for path, text in texts(root).items():
        path.write_text(text, encoding="utf-8")
    for folder, found in chips(root).items():
        drawn = plots.draw(found, folder)
        for file in set(folder.glob("*.png")) - set(drawn):
            file.unlink()


def disagreements(root: Path) -> list[str]:
    """What does not say what the records say; nothing is drawn to find that out."""
    wrong = [
        f"{path.relative_to(root)} does not say what the records say"
        for path, text in texts(root).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for folder, found in chips(root).items():
        wanted = {folder / name: plots.digest(drawn) for name, drawn in plots.pictures(found).items()}
        for path in sorted({*wanted, *folder.glob("*.png")}):
            if not path.is_file():
                wrong.append(f"{path.relative_to(root)} is missing")
            elif path not in wanted or plots.drawn_from(path) != wanted[path]:
                wrong.append(f"{path.relative_to(root)} was not drawn from these records")
    return wrong


def _readme(found: dict[Path, list[Record]], root: Path) -> Iterator[str]:
    yield from f"{_RATIOS}[All rows]({_RESULTS}); [errors]({_NUMERICS}).".splitlines()
    for folder, of in found.items():
        yield from ("", f"### {pairs.chip(of)}", "", _machine(of))
        yield from _titled("", tables.nets(of))
        yield from _titled(
            "Ratios of single operators: geometric mean, least and greatest; slower counts whole intervals below 1:",
            tables.summary(of),
        )
        yield from _titled("What the host does for a call, tiny operands:", tables.overhead(of))
        yield from _pictures(of, folder.relative_to(root), lambda kind: kind in _IN_README)


def _results(found: dict[Path, list[Record]]) -> Iterator[str]:
    yield "# Results, row by row"
    yield ""
    yield from _RESULTS_NOTE.splitlines()
    for folder, of in found.items():
        yield from ("", f"## {pairs.chip(of)}", "", _machine(of))
        yield from _pictures(of, Path("..") / "benchmarks" / "results" / folder.name, lambda kind: True)
        yield from _titled("### Goals", goals.table(of))
        for suite in SUITES:
            yield from _titled(f"### {_TITLES[suite]}", tables.everything([r for r in of if r.suite == suite]))


def _numerics(found: dict[Path, list[Record]]) -> Iterator[str]:
    yield from _NUMERICS_NOTE.splitlines()
    for of in found.values():
        made = [(title, made) for title, (make, direction) in _ERRORS.items() if (made := make(of, direction))]
        yield from ("", f"### {pairs.chip(of)}", "", _machine(of)) if made else ()
        for title, lines in made:
            yield from _titled(f"{title}:", lines)


def _titled(title: str, table: Sequence[str]) -> Iterator[str]:
    if table:
        yield from ("", title) if title else ()
        yield from ("", *table)


def _machine(of: Sequence[Record]) -> str:
    parts = [pairs.dates(of), f"torch {pairs.span(r.torch for r in of)}"]
    for name, of_record in (("Triton", "triton"), ("cuDNN", "cudnn"), ("driver", "driver")):
        versions = pairs.span(getattr(r, of_record) for r in of)
        parts += [f"{name} {versions}"] if versions else []
    commits = list(dict.fromkeys(r.commit for r in sorted(of, key=lambda r: r.date)))
    named = ", ".join(commits) if len(commits) <= _COMMITS else f"{commits[0]} to {commits[-1]} ({len(commits)})"
    return ", ".join([*parts, f"commit{'s' if len(commits) > 1 else ''} {named}"]) + "."


def _pictures(of: Sequence[Record], folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    for name in plots.pictures(of):
        kind = name.removesuffix(".png").partition("_")[0]
        if wanted(kind):
            yield from ("", f"![{_ALT[kind]}]({(folder / name).as_posix()})")


def _between(path: Path, lines: Iterator[str]) -> str:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: wants one line {BEGIN} and below it one line {END}")
    return "\n".join((text[: text.index(BEGIN)] + BEGIN, "", *lines, "", text[text.index(END) :]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; say what disagrees, with an exit status of 1")
    parser.add_argument("--root", type=Path, default=_ROOT, help="the folder that README.md lies in")
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.root)
    wrong = disagreements(options.root)
    print("\n".join(wrong) or "README.md, docs and pictures say what the records say")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
