"""Model cards for ProCLIP checkpoints: what the Hub shows beside the weights."""

from .card import quickstart_card


__all__ = ["quickstart_card"]
