"""Griffe extension: what docstrings write as in Transformers, [`ProCLIPModel`] or [`~hub_cards.model_card`], becomes a link."""

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


class DocstringLinks(Extension):
    """Links lead to what the site documents; a name that it does not document stays plain code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the references of one docstring."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            shown = name.rpartition(".")[2] if short else name
            try:
                identifier = obj.resolve(name)
            except NameResolutionError:
                identifier = name
            return f'<autoref identifier="{identifier}" optional><code>{shown}</code></autoref>'

        obj.docstring.value = REFERENCE.sub(link, obj.docstring.value)
