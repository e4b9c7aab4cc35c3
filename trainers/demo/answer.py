"""What a gallery answers to a text, an image, or both, and how that looks as HTML."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.display.html import html_environment
from trainers.search.folder import printable
from trainers.search.query import COLUMNS, Question, search

from .gallery import Gallery


@dataclass(frozen=True)
class Answer:
    """What one gallery found.

    Args:
        title: of the gallery.
        read: the beginning of the text, as far as its model reads it.
        unread: the rest.
        max_length: how many tokens the model reads.
        results: as [`trainers.search.query.search`] gives them, with thumbnails.
        message: why there are no results.
    """

    title: str
    read: str = ""
    unread: str = ""
    max_length: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    message: str = ""


def ask(gallery: Gallery, text: str, image: Path | None, top: int) -> Answer:
    """The `top` images of `gallery` that are nearest to `text`, `image`, or both."""
    try:
        index = gallery.open()
        if index is None or not len(index):
            return Answer(gallery.title, message="There are no images in the index yet.")
        embedding = Question(text or None, image).embedding(gallery.encoder, index.dim)
        results = search(index, embedding, top, columns=(*COLUMNS, "thumbnail"))
    except (ValueError, OSError, RuntimeError) as error:  # of what was asked, of the disk, of the database
        return Answer(gallery.title, message=str(error))
    num_read = gallery.encoder.characters_read(text)
    max_length = gallery.encoder.protocol()["text"]["max_length"]
    return Answer(gallery.title, text[:num_read], text[num_read:], max_length, results)


def render(answers: Sequence[Answer]) -> str:
    """The answers side by side as HTML, their thumbnails inside it, so that the page asks for no file."""
    environment = html_environment(Path(__file__).parent / "templates")
    environment.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "printable": printable}
    return environment.get_template("answers.html.jinja").render(answers=answers)
