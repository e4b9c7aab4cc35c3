"""Conversion of the published checkpoints of ProCLIP and LLM2CLIP."""

from .converter import ConversionReport, convert
from .errors import ConversionError


__all__ = ["ConversionError", "ConversionReport", "convert"]
