"""Swap the layers of an existing model for fastconv's."""

from __future__ import annotations

from fastconv.convert.chains import convert
from fastconv.convert.convolutionize import convolutionize
from fastconv.convert.freeze import freeze

__all__ = ["convert", "convolutionize", "freeze"]
