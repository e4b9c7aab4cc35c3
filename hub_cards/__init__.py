"""Model cards for ProCLIP checkpoints: what the Hub shows beside the weights."""

from .card import quickstart_card
from .converted import converted_card


__all__ = ["converted_card", "quickstart_card"]
