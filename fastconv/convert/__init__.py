"""Swap the layers of an existing model for fastconv's."""

from __future__ import annotations

from fastconv.convert.convolutionize import convolutionize
from fastconv.convert.freeze import freeze
from fastconv.convert.report import Layer
from fastconv.convert.restore import restore
from fastconv.convert.swap import convert, convert_with_report

__all__ = ["Layer", "convert", "convert_with_report", "convolutionize", "freeze", "restore"]
