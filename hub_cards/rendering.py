"""Filling the cards' templates, and telling cards that nobody has touched since."""

import hashlib
import re
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CardData, RepoCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .measurements import shown_dataset
from .validity import check_metadata


TEMPLATES = Path(__file__).parent / "templates"
_Card = TypeVar("_Card", bound=RepoCard)


def render(card_class: type[_Card], template: str, data: CardData, **values: Any) -> _Card:
    """
    A card with the metadata `data`. Unlike `RepoCard.from_template`, templates can include others, and a value that is missing is an error.

    Raises:
        ValueError: If the Hub would refuse the metadata; see [`check_metadata`].
    """
    check_metadata(data)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["shown_dataset"] = shown_dataset
    return card_class(environment.get_template(template).render(card_data=data.to_yaml(), **values))


def signed(content: str) -> str:
    """`content` with its hash in a comment at the end, by which [`is_untouched`] knows it again."""
    return f"{content.rstrip()}\n\n<!-- written by proclip; hash of the above {_digest(content)} -->\n"


def is_untouched(content: str) -> bool:
    """Whether a card is as it was signed: what it says came from the checkpoint alone, so it can be rendered anew."""
    match = re.fullmatch(r"(.*)<!-- written by proclip; hash of the above (\w+) -->\s*", content, flags=re.DOTALL)
    return match is not None and _digest(match[1]) == match[2]


def _digest(content: str) -> str:
    return hashlib.sha256(content.strip().encode()).hexdigest()
