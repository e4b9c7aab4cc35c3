"""Filling the cards' templates."""

from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CardData, RepoCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .validity import check_card


TEMPLATES = Path(__file__).parent / "templates"
_Card = TypeVar("_Card", bound=RepoCard)


def render(card_class: type[_Card], template: str, data: CardData, **values: Any) -> _Card:
    """
    A card with the metadata `data`. Unlike `RepoCard.from_template`, templates can include others, and a value that is missing is an error.

    Raises:
        ValueError: If the Hub would refuse the metadata; see [`check_card`].
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    content = environment.get_template(template).render(card_data=data.to_yaml(), **values)
    card = card_class(content)
    check_card(card)
    return card
