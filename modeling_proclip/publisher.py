"""The one way from the model to `hub_cards`, which publishes it. Nothing else here knows of cards or of publishing."""

import importlib
from types import ModuleType
from typing import Any


# Arguments of `save_pretrained(push_to_hub=True)` that are for the Hub.
_HUB_ARGUMENTS = ("repo_id", "private", "revision", "commit_message", "token")


def find_publisher(module: str) -> ModuleType | None:
    """The module of that name in `hub_cards`, or `None` where the package is not installed: this file travels to the Hub with a checkpoint."""
    try:
        return importlib.import_module(f"hub_cards.{module}")
    except ModuleNotFoundError as error:
        if error.name not in ("hub_cards", f"hub_cards.{module}"):
            raise
        return None


def take_hub_arguments(kwargs: dict[str, Any], default_repo_id: str) -> dict[str, Any]:
    """Those of `kwargs` that are for the Hub, which are taken out of it."""
    return {"repo_id": default_repo_id, **{key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}}


def private_by_default(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Transformers' own `push_to_hub`, which makes public repositories unless `private` is said."""
    return {**kwargs, "private": kwargs.get("private") is not False}
