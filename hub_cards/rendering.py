"""Filling the cards' templates, and recognising cards that nobody has edited since.

Every value is escaped where it is put in: names of models, data, classes and metrics come from anybody's files and must stay text. What is
Markdown already is a [`Markdown`]; code has filters of its own, as Markdown's escapes do not work in it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CardData, RepoCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from .measurements import shown_source
from .scrubbing import scrub_text
from .validity import check_metadata


TEMPLATES = Path(__file__).parent / "templates"
_Card = TypeVar("_Card", bound=RepoCard)
# What begins an element of Markdown or HTML wherever it stands; an underscore only at the edge of a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])")
# What does so at the beginning of a line: headings, bullets, rules; and numbers of a list.
_BLOCK = re.compile(r"(?=(?:#{1,6}|[+-])(?:\s|$)|[=-][=\s-]*$)|(?<=\d)(?=[.)](?:\s|$))")


class Markdown(str):
    """Text that is Markdown already, and is put into a card as it is."""


def render(card_class: type[_Card], template: str, data: CardData, **values: Any) -> _Card:
    """A card with the metadata `data`. Unlike `RepoCard.from_template`, values are escaped, templates can include others, a missing value is an
    error, and passwords, tokens and local paths are removed. ValueError as [`check_metadata`].
    """
    check_metadata(data)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markdown) else escape(value),
    )
    environment.filters |= {"code": inline_code, "literal": literal, "comment": comment, "source": shown_source}
    try:
        filled = environment.get_template(template).render(card_data=Markdown(data.to_yaml()), **values)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the card cannot be filled in: {error}") from error
    card = card_class(scrub_text(filled))
    if set(card.data.to_dict()) != set(data.to_dict()):
        raise ValueError("the card's metadata would be read as something else: is there a line of dashes in a name?")
    return card


def escape(value: Any) -> str:
    """`value` as text of one line in Markdown: nothing in it is read as Markdown or HTML."""
    text = _SPECIAL.sub(lambda match: f"\\{match[0]}", _one_line(value).replace("&", "&amp;"))
    digits = len(text) - len(text.lstrip("0123456789"))
    start = _BLOCK.match(text, digits)
    return f"{text[: start.end()]}\\{text[start.end() :]}" if start else text


def inline_code(value: Any) -> Markdown:
    """`value` as code in a line or in a table's cell; its line breaks are shown as such."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return Markdown(f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}")


def literal(value: Any) -> Markdown:
    """`value` as a string literal of Python, for a block of code."""
    return Markdown(json.dumps(str(value)))


def comment(value: Any) -> Markdown:
    """`value` as the rest of a comment, for a block of code."""
    return Markdown(_one_line(value))


def _one_line(value: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def signed(content: str) -> str:
    """`content` with its hash in a comment at the end, by which [`is_untouched`] knows it again."""
    return f"{content.rstrip()}\n\n<!-- written by proclip; hash of the above {_digest(content)} -->\n"


def is_untouched(content: str) -> bool:
    """Whether a card is as it was signed: what it says came from the checkpoint alone, so it can be rendered anew."""
    match = re.fullmatch(r"(.*)<!-- written by proclip; hash of the above (\w+) -->\s*", content, flags=re.DOTALL)
    return match is not None and _digest(match[1]) == match[2]


def _digest(content: str) -> str:
    return hashlib.sha256(content.strip().encode()).hexdigest()
