"""Swap the layers of an existing model for fastconv's."""

from __future__ import annotations

from fastconv.convert.freeze import freeze
from fastconv.convert.swap import convert

__all__ = ["convert", "freeze"]
