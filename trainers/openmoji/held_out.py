"""The foreign names by which languages are compared, and whether a text tells one of them: what no training may read."""

import re
from collections.abc import Iterable

from .images import LANGUAGES, Concept
from .task import SIZES, make_task


# Written without spaces between words, or with endings joined to them: a name is looked for anywhere in the text.
_UNSPACED = ("zh", "ja", "ko")


def held_out_concepts() -> list[Concept]:
    """The 150 concepts by which the quickstart compares languages; they are the same for every seed."""
    task = make_task(SIZES["full"], seed=0)
    return [task.concepts[i] for i in task.language_concepts]


class HeldOutNames:
    """Finds names of `concepts` in texts of any language, whatever their case.

    A name counts where it stands between other letters only in Chinese, Japanese and Korean: "gato" is in "gato negro", but not in "gatos".

    Args:
        concepts: Whose names are held out.
        languages: Of the names; without English by default, whose names stage 1 reads.
    """

    def __init__(self, concepts: Iterable[Concept], languages: Iterable[str] = LANGUAGES[1:]):
        spaced: set[str] = set()
        unspaced: set[str] = set()
        for concept in concepts:
            for language in languages:
                (unspaced if language in _UNSPACED else spaced).add(concept.names[language].casefold())
        # Longest first, so that a match is the whole of a name.
        either = [re.escape(name) for name in sorted(unspaced, key=len, reverse=True)]
        either += [rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(spaced, key=len, reverse=True)]
        self._pattern = re.compile("|".join(either))

    def in_text(self, text: str) -> str | None:
        """The first held-out name in `text`, casefolded, or None."""
        found = self._pattern.search(text.casefold())
        return found.group() if found else None
