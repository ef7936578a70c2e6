"""Records read together: ours beside stock torch's, what the name of a case says, where and when they were taken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fastconv.bench.records import Record

_CASE = re.compile(r"(.+) batch (\d+)( NCHW)?")


class Pair(NamedTuple):
    """A record of ours, and that of the fastest provider of stock torch in the same trial, None where there is none."""

    ours: Record
    stock: Record | None


def pairs(records: Iterable[Record], provider: str | None = "fastconv") -> list[Pair]:
    """In the order of the records; of one provider of ours, or with None of all."""
    listed = list(records)
    found = {(record.trial, record.provider): record for record in listed}
    ours = [r for r in listed if (r.is_ours if provider is None else r.provider == provider)]
    return [Pair(r, None if r.fastest_stock is None else found.get((r.trial, r.fastest_stock))) for r in ours]


def flat(found: Iterable[Pair]) -> list[Record]:
    """The records of pairs, each once."""
    return list(dict.fromkeys(record for pair in found for record in pair if record is not None))


def split(case: str) -> tuple[str, int | None]:
    """A case without its batch, and the batch: '64-128@56 3x3/1 batch 32 NCHW' is '64-128@56 3x3/1 NCHW' and 32."""
    found = _CASE.fullmatch(case)
    return (case, None) if found is None else (found[1] + (found[3] or ""), int(found[2]))


def dtype_label(dtype: str) -> str:
    """'float32, ieee' of 'float32_ieee'."""
    return "TF32" if dtype == "tf32" else dtype.replace("_", ", ")


def span(values: Iterable[str | None]) -> str:
    """What they all are, or 'first to last'; empty of none."""
    known = sorted({value for value in values if value is not None})
    return known[0] if len(known) == 1 else " to ".join(known[:1] + known[-1:])


def dates(records: Iterable[Record]) -> str:
    return span(record.date[:10] for record in records)


def chip(records: Iterable[Record]) -> str:
    """The one that all were measured on.

    Raises:
        ValueError: several, or no records.
    """
    chips = list(dict.fromkeys(record.chip for record in records))
    if len(chips) != 1:
        raise ValueError(f"records of one chip are wanted, got {' and '.join(chips) or 'no records'}")
    return chips[0]
