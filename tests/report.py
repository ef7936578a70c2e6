"""Counts that tests leave for the end of a run: pytest prints them below its summary."""

from __future__ import annotations

LINES: list[str] = []


def note(line: str) -> None:
    LINES.append(line)
