"""The one way from the model to `hub_cards`, which publishes it. Nothing else here knows of cards or of publishing."""

import importlib
from types import ModuleType


def find_publisher(module: str) -> ModuleType | None:
    """The module of that name in `hub_cards`, or `None` where the package is not installed: this file travels to the Hub with a checkpoint."""
    try:
        return importlib.import_module(f"hub_cards.{module}")
    except ModuleNotFoundError as error:
        if error.name not in ("hub_cards", f"hub_cards.{module}"):
            raise
        return None
