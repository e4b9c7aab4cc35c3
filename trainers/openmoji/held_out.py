"""Whether a text holds a name by which languages are compared, which no training may read."""

import re
from collections.abc import Iterable

from .images import LANGUAGES, Concept


# Written without spaces between words, or with endings joined to them: a name is looked for anywhere in the text.
_UNSPACED = ("zh", "ja", "ko")


class HeldOutNames:
    """Finds names of `concepts` in texts of any language, whatever their case.

    A name inside a longer word counts only in Chinese, Japanese and Korean: "gato" is in "gato negro", but not in "gatos".

    Args:
        concepts: The concepts whose names are held out.
        languages: The names' languages. By default all but English, whose names stage 1 reads.
    """

    def __init__(self, concepts: Iterable[Concept], languages: Iterable[str] = LANGUAGES[1:]):
        spaced: set[str] = set()
        unspaced: set[str] = set()
        for concept in concepts:
            for language in languages:
                (unspaced if language in _UNSPACED else spaced).add(concept.names[language].casefold())
        # Longest first, so that a match is the whole of a name. One boundary around all names: one around each is slow.
        either = []
        if unspaced:
            either.append(_any_of(unspaced))
        if spaced:
            either.append(rf"(?<!\w){_any_of(spaced)}(?!\w)")
        self._pattern = re.compile("|".join(either))

    def in_text(self, text: str) -> str | None:
        """The first held-out name in `text`, casefolded, or None."""
        found = self._pattern.search(text.casefold())
        return found.group() if found else None


def _any_of(names: set[str]) -> str:
    return f"(?:{'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})"
