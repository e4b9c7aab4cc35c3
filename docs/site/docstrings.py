"""Griffe extension: docstrings in the style of Transformers, made into Markdown for the reference pages."""

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")  # [`ProCLIPModel`], [`~hub_cards.model_card`]
TYPE = re.compile(
    r"^( +[\w, ]+ \()(.*)(\):)", flags=re.MULTILINE
)  # vision_config (`dict` or `PreTrainedConfig`, *optional*):


class TransformersDocstrings(Extension):
    """References become links to what the site documents; a name that it does not document stays plain code. Types lose their own marks, as
    the reference shows them as code.
    """

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
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

        # A dataclass shows its defaults itself.
        marks = r"\[`~?|`\]|[`*]" + ("|, defaults to [^,)]*" if "dataclass" in obj.labels else "")
        text = TYPE.sub(lambda match: match[1] + re.sub(marks, "", match[2]) + match[3], obj.docstring.value)
        obj.docstring.value = REFERENCE.sub(link, text)
