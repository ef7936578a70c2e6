"""Tests, tuning and measurements on a GPU, part after part: `make gpu`, or `python -m benchmarks.gpu --help`.

A part is a list of commands. Each is told how many seconds it has, is interrupted when it takes longer, and killed with all
that it started at the part's limit; what it has finished by then is kept, and left out when the part is run again. Whatever
happens to a part, the others are run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_parts import PARTS, Setup, Step, parts

ROOT = Path(__file__).parents[1]
_SHARE = 0.8  # of its time, that a command may begin new work in
_LEAST = 0.1  # of a part's limit, with less of which left no command is begun
_GRACE = 15.0  # seconds between an interrupt and the end
_EVERY = 20.0  # seconds between copies
_MOST_FILES, _MOST_BYTES = 7, 15 * 2**20  # of copies; an eighth file may lie there while it is written
_KINDS = (".json", ".md", ".log", ".txt")
_FIRST = ("gpu.log", "tuning.json", "layers.json", "pools.json", "models.json", "training.json", "inspect.md", "train.md")
_ARCHIVE = "more.tar.gz"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROBE = """
import json, sys, torch
from fastconv import backends, tuning
from fastconv.backends.triton_launch import PROCESSORS
from fastconv.tuning import tables
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device; DEVICE=cpu QUICK=1 rehearses all parts without one")
chip = backends.chip(sys.argv[1], 0)
known = [name for name in PROCESSORS if int(name[3:]) <= (tuning.capability(chip) or 90)]
arch = known[-1] if known else "sm_90"
found = {"chip": chip, "arch": arch, "shipped": str(tables.shipped_folder()), "file": tables.file_name(chip)}
print(json.dumps(found))
"""


class Stopped(Exception):
    """By the signal that is its argument."""


class Row(NamedTuple):
    part: str
    step: str
    seconds: float
    outcome: str
    last: str  # line that it printed


class Run:
    """The parts that are run, what they print and what is copied."""

    def __init__(self, setup: Setup, limit: float, out: Path | None) -> None:
        self.setup, self.limit, self.out, self.rows = setup, limit, out, list[Row]()
        self.log = setup.folder / "gpu.log"
        setup.folder.mkdir(parents=True, exist_ok=True)
        self._before = {file.name: _stamp(file) for file in setup.folder.iterdir()}
        self._shown = self.log.stat().st_size if self.log.is_file() else 0
        self._pages: dict[str, list[str]] = {}
        self._table = setup.folder / "tuning.json"
        if setup.table.is_file() and not self._table.is_file():
            shutil.copyfile(setup.table, self._table)
        self.install()

    def part(self, name: str, steps: list[Step]) -> None:
        end, is_over = time.monotonic() + self.limit, False
        for step in steps:
            left = end - time.monotonic()
            if (is_over or left < _LEAST * self.limit) and not step.always:
                self.rows.append(Row(name, step.name, 0.0, "not begun", ""))
                continue
            self.say(f"\n=== {name}: {step.name}")
            begun, shown, outcome = time.monotonic(), self._shown, "stopped"
            try:
                status = self._execute(step.command, step.most if step.always else min(left, step.most))
                outcome = {0: "ok", None: "over its time", step.unfinished: "unfinished"}.get(status, f"failed: {status}")
                is_over |= outcome in ("over its time", "unfinished") and left <= step.most
            finally:
                text = self.log.read_bytes()[shown:].decode(errors="replace").replace(f"{ROOT}/", "")
                last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
                self.rows.append(Row(name, step.name, time.monotonic() - begun, outcome, last.strip()))
                if step.is_page:
                    page = self._pages.setdefault(
                        name, [f"# Seen on {self.setup.chip}", "", f"Written by `make gpu PART={name}`.", ""]
                    )
                    words = step.command[2:] if step.command[0] == sys.executable else step.command
                    command = " ".join(words).replace(f"{ROOT}/", "")
                    page += [f"## {step.name}", "", f"`{command}`: {outcome}", "", *_fenced(text)]
                    (self.setup.folder / f"{name}.md").write_text("\n".join(page), encoding="utf-8")
                self.install()
                self.copy()

    def _execute(self, command: tuple[str, ...], seconds: float) -> int | None:
        """The exit status of a command; None where it had to be stopped."""
        words = [word.replace("{seconds}", f"{max(1, _SHARE * seconds):.0f}") for word in command]
        begun, is_over = time.monotonic(), False
        copied = begun
        grace = min(_GRACE, 0.1 * seconds)
        cache = {"XDG_CACHE_HOME": str(self.setup.cache), "OUT": str(self.setup.folder), "PYTHONUNBUFFERED": "1"}
        options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, **cache}, "start_new_session": True}
        with self.log.open("ab") as log:
            try:
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **options)
            except OSError as error:
                self.say(str(error))
                return 127
        try:
            while process.poll() is None and not is_over:
                time.sleep(0.1)
                self._show()
                if time.monotonic() - copied > _EVERY:
                    self.copy()
                    copied = time.monotonic()
                is_over = time.monotonic() - begun > seconds - grace and process.poll() is None
        except Stopped:
            grace = min(grace, 3.0)  # whoever sent the signal may not wait much longer
            raise
        finally:
            _end(process, grace)
            self._show()
        return None if is_over else process.returncode

    def install(self) -> None:
        """Have the processes to come read the table."""
        table = self.setup.table
        if self._table.is_file() and (not table.is_file() or table.read_bytes() != self._table.read_bytes()):
            table.parent.mkdir(parents=True, exist_ok=True)
            _replace(table, self._table.read_bytes())

    def copy(self) -> None:
        """To `out` whatever is new: the first files as they are, the others in an archive."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        new = self._new()
        plain = [file for file in new if file == self.log or file.stat().st_size <= _MOST_BYTES]
        plain = plain if len(plain) == len(new) <= _MOST_FILES else plain[: _MOST_FILES - 1]
        for file in plain:
            _replace(self.out / file.name, file.read_bytes()[-_MOST_BYTES:])
        packed = [file for file in new if file not in plain]
        for file in packed:
            (self.out / file.name).unlink(missing_ok=True)
        if packed:
            beside = self.setup.folder / f"{_ARCHIVE}.new"
            with tarfile.open(beside, "w:gz") as archive:
                for file in packed:
                    archive.add(file, file.name)
            _replace(self.out / _ARCHIVE, beside.read_bytes())
            beside.unlink()

    def _new(self) -> list[Path]:
        """Files of results that this run wrote, those first that are to be copied as they are."""
        kept = (file for file in sorted(self.setup.folder.iterdir()) if file.suffix in _KINDS)
        new = [file for file in kept if self._before.get(file.name) != _stamp(file)]
        return sorted(new, key=lambda file: _FIRST.index(file.name) if file.name in _FIRST else len(_FIRST))

    def say(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        self._show()

    def _show(self) -> None:
        """What the log has got, on the screen too."""
        with self.log.open("rb") as log:
            log.seek(self._shown)
            text = log.read()
        self._shown += len(text)
        with contextlib.suppress(OSError):  # who reads it may be gone, and what was measured is kept all the same
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

    def table(self) -> str:
        widths = [max([len(row[i]) for row in self.rows], default=0) for i in (0, 1, 3)]
        lines = [
            f"{part:<{widths[0]}}  {step:<{widths[1]}}  {seconds:>5.0f} s  {outcome:<{widths[2]}}  {last[:80]}"
            for part, step, seconds, outcome, last in self.rows
        ]
        return "\n".join(
            ["", *lines, f"in {self.setup.folder}: {', '.join(file.name for file in self._new()) or 'nothing'}"]
        )

    def status(self) -> int:
        outcomes = {row.outcome for row in self.rows}
        return 0 if outcomes <= {"ok"} else 3 if outcomes <= {"ok", "unfinished", "not begun"} else 1


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Interrupt it, wait, and kill it and all that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fenced(text: str) -> Iterator[str]:
    yield from ("```", text.strip("\n"), "```", "")


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def _replace(file: Path, content: bytes) -> None:
    """Nobody ever sees half of it."""
    beside = file.with_name(f"{file.name}.new")
    beside.write_bytes(content)
    beside.replace(file)


def _setup(device: str, is_quick: bool) -> Setup | None:
    """None where there is no such device, which is told. A rehearsal touches neither committed results nor the package."""
    command = [sys.executable, "-c", _PROBE, device]
    probe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if probe.returncode:
        print(f"make gpu: {probe.stderr.strip()}", file=sys.stderr)
        return None
    found = json.loads(probe.stdout.splitlines()[-1])
    runs, is_real = ROOT / "runs" / "gpu", device == "cuda" and not is_quick
    root, cache = (ROOT / "benchmarks" / "results", runs / "cache") if is_real else (runs, runs / "rehearsed")
    table = (Path(found["shipped"]) if is_real else cache / "fastconv") / found["file"]
    folder = root / Path(found["file"]).stem
    return Setup(device, is_quick, found["chip"], found["arch"], root, folder, cache, table)


def _stop(number: int, _: object) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n")[0])
    option = parser.add_argument
    option("--part", default=",".join(PARTS), metavar="PART,...", help=f"of {', '.join(PARTS)} (default: all)")
    option("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal (default: cuda)")
    option("--quick", action="store_true", help="small sizes: a rehearsal, whose results lie in runs/gpu")
    option("--limit", type=float, default=480.0, metavar="SECONDS", help="that a part may take (default: 480)")
    option("--check", action="store_true", help="only say whether these are arguments")
    options = parser.parse_args(arguments)
    chosen = options.part.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not options.limit > 0:
        parser.error(
            f"PART must be of {', '.join(PARTS)}, and LIMIT above 0; got PART={options.part} LIMIT={options.limit:g}"
        )
    setup = None if options.check else _setup(options.device, options.quick)
    if setup is None:
        return 0 if options.check else 2
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    out = os.environ.get("OUT")
    run, status = Run(setup, options.limit, Path(out) if out else None), 0
    try:
        run.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {setup.chip}, Python {sys.version.split()[0]}, parts {options.part}")
        for name, steps in parts(setup).items():
            if name in chosen:
                run.part(name, steps)
    except Stopped as stopped:
        status = 128 + stopped.args[0]
        run.say(f"stopped by signal {stopped.args[0]}")
    run.copy()  # before the table: whoever reads it may be gone
    run.say(run.table())
    run.copy()
    return status or run.status()


if __name__ == "__main__":
    raise SystemExit(main())
