"""Measuring: the only timing code of the project."""

from __future__ import annotations

from fastconv.bench.timing import Timing, compare, ratio, stopwatch

__all__ = ["Timing", "compare", "ratio", "stopwatch"]
