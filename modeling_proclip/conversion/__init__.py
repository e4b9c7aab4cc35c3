"""Conversion of the published checkpoints of ProCLIP and LLM2CLIP."""

from .checkpoint import ConversionError
from .converter import ConversionReport, convert


__all__ = ["ConversionError", "ConversionReport", "convert"]
