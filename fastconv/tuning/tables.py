"""Tables of measurements: JSON files, one for each chip, written by `fastconv tune` and read once in a process.

{"format": 1, "chip": "NVIDIA H100 80GB HBM3 sm_90", "written_by": {"fastconv": …, "torch": …, "triton": …}, "entries": [
{"op": "conv2d_relu", "direction": "forward", "dtype": "bfloat16", "tf32": false, "channels_last": true,
 "geometry": {"input": [N, C, H, W], "weight": [O, C / groups, KH, KW], "stride": […], …},
 "candidate": {"backend": "triton", "kernel": "pointer", "config": {…}}, "seconds": 3.1e-05, "others": [{…, "seconds": …}],
 "sources": "5f1c22ab"}]}

A user's tables lie in the platform's cache directory, those that come with fastconv beside this file; a user's entry goes
before a shipped one. A file that is corrupt, of another chip or of a newer format is reported once and ignored.

A candidate runs the same kernel whatever the precision, which only says which candidates are allowed. So entries are
measured under 'fast', which allows all of them, and a direct call gets the fastest of its own from the same entry.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastconv.geometry import DTYPES, ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning.calls import CONVOLUTIONS, PASSES, Call, cached
from fastconv.tuning.candidates import Candidate

FORMAT = 1

_BACKENDS = ("triton", "native", "aten")
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_BUCKET = 1.0  # in powers of two of a map's pixels, the batch counted in

_log = logging.getLogger("fastconv")
_reported: set[tuple[Path, str]] = set()


class Entry(NamedTuple):
    """What was measured for a call: the winner, its median seconds, those of the other candidates, and the sources."""

    call: Call
    candidate: Candidate
    seconds: float
    others: tuple[tuple[Candidate, float], ...] = ()
    sources: str = ""

    def medians(self) -> dict[Candidate, float]:
        """Every measured candidate's seconds, the winner first and then the fastest."""
        return {self.candidate: self.seconds, **dict(sorted(self.others, key=lambda other: other[1]))}


class TableError(ValueError):
    """A file that is no table for this chip; the message is the reason."""


def user_folder() -> Path | None:
    """$XDG_CACHE_HOME/fastconv or ~/.cache/fastconv; None where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG specification has relative ones ignored
        return Path(named) / "fastconv"
    try:
        return Path.home() / ".cache" / "fastconv"
    except RuntimeError:
        return None


def shipped_folder() -> Path:
    return Path(__file__).parent


def file_name(chip: str) -> str:
    """'nvidia-h100-80gb-hbm3-sm_90.json'."""
    return re.sub(r"[^a-z0-9_]+", "-", chip.lower()).strip("-") + ".json"


def user_file(chip: str) -> Path:
    """Where a user's table for `chip` lies.

    Raises:
        ValueError: there is no home directory to keep it in.
    """
    folder = user_folder()
    if folder is None:
        raise ValueError("there is no home directory to keep a table in: set XDG_CACHE_HOME")
    return folder / file_name(chip)


class Table:
    """The entries known for a chip, by call and by what calls of a bucket share."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._exact: dict[Call, Entry] = {entry.call: entry for entry in entries}
        self._alike: dict[tuple[object, ...], list[Entry]] = {}
        for entry in sorted(self._exact.values(), key=_sort_key):
            self._alike.setdefault(_shared_key(entry.call), []).append(entry)

    def __len__(self) -> int:
        return len(self._exact)

    def lookup(self, call: Call, allowed: Sequence[Candidate]) -> Entry | None:
        """The entry of exactly this call, else the nearest in its bucket, whose candidate is still one of `allowed`.

        A bucket holds calls that differ in batch and map only, up to twice or half as many pixels. For a direct call the
        winner is the fastest of the candidates measured that it allows.
        """
        direct = call.policy.direct
        call = as_measured(call)
        exact = _narrowed(self._exact.get(call), allowed, direct)
        if exact is not None:
            return exact
        near = [(_distance(entry.call, call), i, entry) for i, entry in enumerate(self._alike.get(_shared_key(call), ()))]
        for distance, _, entry in sorted(near, key=lambda item: item[:2]):
            found = _narrowed(entry, allowed, direct) if distance <= _BUCKET else None
            if found is not None:
                return found
        return None


def as_measured(call: Call) -> Call:
    """The call whose entry serves `call`: itself under 'fast'."""
    return call._replace(policy=call.policy._replace(direct=False)) if call.policy.direct else call


def _narrowed(entry: Entry | None, allowed: Sequence[Candidate], direct: bool) -> Entry | None:
    """`entry` if its winner is allowed; for a direct call that of those measured which are, if any."""
    if entry is None or entry.candidate in allowed:
        return entry
    medians = [(c, seconds) for c, seconds in entry.medians().items() if direct and c in allowed]
    return Entry(entry.call, *medians[0], tuple(medians[1:])) if medians else None


def _shared_key(call: Call) -> tuple[object, ...]:
    g = call.geometry
    window = (g.kernel_height, g.kernel_width, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.dilation_h, g.dilation_w)
    if isinstance(g, PoolGeometry):
        sizes: tuple[int, ...] = (g.channels, g.ceil_mode)
    else:
        sizes = (g.in_channels, g.out_channels, g.groups)
    return (call.op, call.direction, call.policy, call.channels_last, type(g), *window, *sizes)


def _distance(one: Call, other: Call) -> float:
    a, b = one.geometry, other.geometry
    return abs(math.log2(a.batch * a.height * a.width) - math.log2(b.batch * b.height * b.width))


def files(chip: str) -> list[Path]:
    """The tables for `chip` that there are, the shipped one before the user's."""
    folders = (shipped_folder(), user_folder())
    paths = [folder / file_name(chip) for folder in folders if folder is not None]
    return [path for path in paths if path.is_file()]


def describe(path: Path, chip: str) -> str:
    """'12 entries', or why the file is ignored."""
    try:
        return f"{len(read(path, chip))} entries"
    except (TableError, OSError) as error:
        return f"ignored: {error}"


@cached
def load(chip: str) -> Table:
    """The shipped table for `chip` and the user's over it; read once, until `forget`."""
    entries: dict[Call, Entry] = {}
    for path in files(chip):
        try:
            entries.update((entry.call, entry) for entry in read(path, chip))
        except (TableError, OSError) as error:
            _report(path, str(error))
    return Table(entries.values())


def _report(path: Path, reason: str) -> None:
    if (path, reason) not in _reported:
        _reported.add((path, reason))
        _log.warning("table of measurements %s is ignored: %s", path, reason)


def write(path: Path, chip: str, entries: Iterable[Entry]) -> None:
    """Put `entries` into the file at `path`, in place of its own for the same calls; nobody ever sees half a file.

    Of processes that write at the same time none loses another's entries, where the file system has locks.

    Raises:
        TableError: what lies there is no table for `chip`, and would be lost.
        OSError: the file cannot be written.
        ValueError: an entry's call is direct: it would take the place of one with more candidates.
    """
    entries = tuple(entries)
    direct = next((entry.call for entry in entries if entry.call.policy.direct), None)
    if direct is not None:
        raise ValueError(f"entries must have been measured under set_precision('fast'), got one of {direct}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = {entry.call: entry for entry in (read(path, chip) if path.is_file() else ())}
        merged.update((entry.call, entry) for entry in entries)
        _replace(path, chip, merged.values())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, by a file beside the table: the table itself is replaced, and a lock on it with it."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path.with_name(path.name + ".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: entries may be lost, but no table
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, chip: str, entries: Iterable[Entry]) -> None:
    versions = {name: version(name) for name in ("fastconv", "torch", "triton")}
    head = json.dumps({"format": FORMAT, "chip": chip, "written_by": versions}, ensure_ascii=False)
    lines = [json.dumps(_to_json(entry), ensure_ascii=False) for entry in sorted(entries, key=_sort_key)]
    text = head[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are their owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def version(distribution: str) -> str | None:
    """Of what is installed; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sort_key(entry: Entry) -> tuple[object, ...]:
    call = entry.call
    sizes = tuple(map(int, astuple(call.geometry)))
    return (call.op, call.direction, str(call.policy.dtype), call.policy.tf32, call.channels_last, sizes)


def _to_json(entry: Entry) -> dict[str, object]:
    call, g = entry.call, entry.call.geometry
    geometry: dict[str, object] = {"input": g.input_shape}
    if isinstance(g, ConvGeometry):
        geometry["weight"] = g.weight_shape
    else:
        geometry["kernel_size"] = g.kernel_size
    geometry |= {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
    geometry |= {"groups": g.groups} if isinstance(g, ConvGeometry) else {"ceil_mode": g.ceil_mode}
    return {
        "op": call.op,
        "direction": call.direction,
        "dtype": str(call.policy.dtype).removeprefix("torch."),
        "tf32": call.policy.tf32,
        "channels_last": call.channels_last,
        "geometry": geometry,
        "candidate": _candidate_to_json(entry.candidate),
        "seconds": _rounded(entry.seconds),
        "others": [{**_candidate_to_json(candidate), "seconds": _rounded(seconds)} for candidate, seconds in entry.others],
        "sources": entry.sources,
    }


def _rounded(seconds: float) -> float:
    """More digits than these no measurement has."""
    return float(f"{seconds:.4g}")


def _candidate_to_json(candidate: Candidate) -> dict[str, object]:
    return {"backend": candidate.backend, "kernel": candidate.kernel, "config": dict(candidate.config)}


def read(path: Path, chip: str) -> list[Entry]:
    """Every entry of a file, whether or not its candidate still exists.

    Raises:
        TableError: it is no table for `chip`, or a value in it is not what its field may hold.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON ({error})") from None
    content = _typed(content, dict, "the file")
    version = _field(content, "format", int, "the file")
    if version != FORMAT:
        raise TableError(f"its format is {version}, and this version of fastconv reads {FORMAT}")
    if _field(content, "chip", str, "the file") != chip:
        raise TableError(f"it was measured on {content['chip']!r}, and this is {chip!r}")
    rows = _field(content, "entries", list, "the file")
    return [_entry(row, chip, f"entry {number}") for number, row in enumerate(rows)]


def _entry(row: Any, chip: str, where: str) -> Entry:
    row = _typed(row, dict, where)
    op, direction, name = (_field(row, field, str, where) for field in ("op", "direction", "dtype"))
    if (op, direction) not in (*CONVOLUTIONS, *PASSES):
        raise TableError(f"{where}: unknown operator {op!r} ({direction!r})")
    if name not in _NAMES:
        raise TableError(f"{where}: unknown dtype {name!r}")
    policy = Policy(_NAMES[name], _field(row, "tf32", bool, where))
    if policy.tf32 and policy.dtype != torch.float32:
        raise TableError(f"{where}: tf32 with dtype {name!r}")
    geometry = _geometry(op, direction, _field(row, "geometry", dict, where), where)
    call = Call(op, direction, geometry, policy, chip, _field(row, "channels_last", bool, where))
    others = []
    for number, other in enumerate(_field(row, "others", list, where)):
        place = f"{where}, other {number}"
        others.append((_candidate(_typed(other, dict, place), place), _seconds(other, place)))
    candidate = _candidate(_field(row, "candidate", dict, where), where)
    sources = _field(row, "sources", str, where) if "sources" in row else ""
    return Entry(call, candidate, _seconds(row, where), tuple(others), sources)


def _geometry(op: str, direction: str, row: dict[str, Any], where: str) -> ConvGeometry | PoolGeometry:
    is_conv = (op, direction) in CONVOLUTIONS
    known = {"input", "stride", "padding", "dilation"} | ({"weight", "groups"} if is_conv else {"kernel_size", "ceil_mode"})
    if set(row) != known:
        raise TableError(f"{where}: geometry must have the fields {sorted(known)}, got {sorted(row)}")
    shape = _integers(row, "input", 4, 1, where)
    stride, padding, dilation = (
        _integers(row, name, 2, least, where) for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    try:
        if is_conv:
            weight = _integers(row, "weight", 4, 1, where)
            groups = _field(row, "groups", int, where)
            return ConvGeometry.of(op, shape, weight, None, stride, padding, dilation, groups)
        kernel = _integers(row, "kernel_size", 2, 1, where)
        return PoolGeometry.of(op, shape, kernel, stride, padding, dilation, _field(row, "ceil_mode", bool, where))
    except RuntimeError as error:
        raise TableError(f"{where}: {error}") from None


def _candidate(row: dict[str, Any], where: str) -> Candidate:
    backend, kernel = (_field(row, name, str, where) for name in ("backend", "kernel"))
    if backend not in _BACKENDS:
        raise TableError(f"{where}: unknown backend {backend!r}")
    config = _field(row, "config", dict, where)
    for name in config:
        _field(config, name, int, f"{where}, config")
    return Candidate(backend, kernel, tuple(config.items()))


def _integers(row: dict[str, Any], name: str, count: int, least: int, where: str) -> tuple[int, ...]:
    values = _field(row, name, list, where)
    if len(values) != count or any(type(value) is not int or value < least for value in values):
        raise TableError(f"{where}: {name} must be {count} integers from {least} on, got {values!r}")
    return tuple(values)


def _seconds(row: dict[str, Any], where: str) -> float:
    value = row.get("seconds")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise TableError(f"{where}: seconds must be a positive number, got {value!r:.60}")
    return float(value)


def _field(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in row:
        raise TableError(f"{where} has no {name!r}")
    return _typed(row[name], kind, f"{where}: {name}")


def _typed(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise TableError(f"{where} must be of type {kind.__name__}, got {value!r:.60}")
    return value
