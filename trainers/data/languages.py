"""Rows of which each language gets the same share, however many there are of it."""

import random
from collections import defaultdict
from typing import Any

from .epochs import EpochDataset


class BalancedLanguages(EpochDataset):
    """As many rows an epoch as `rows` has, in turn of each language: of a large language a part is shown, another one every epoch, and a small
    one's rows are repeated. Which rows depends on seed and epoch alone. Pass it as `train_dataset`.

    Args:
        rows: `len(rows)` rows by number, each with "language" beside its other columns; all are read once to sort them by language.
        seed: seed of the order within a language.

    Raises:
        ValueError: If a row names no language.

    Example:

    ```python
    >>> rows = [{"text": "a red apple", "language": "en"}, {"text": "ein roter Apfel", "teacher_text": "a red apple", "language": "de"}, ...]
    >>> trainer = RepresentationInheritanceTrainer(model, settings, BalancedLanguages(rows, seed=0), text_store=..., teacher_store=...)
    ```"""

    def __init__(self, rows: Any, seed: int):
        super().__init__()
        self.rows, self.seed = rows, seed
        of_language: dict[str, list[int]] = defaultdict(list)
        for i in range(len(rows)):
            language = rows[i].get("language")
            if not isinstance(language, str) or not language:
                raise ValueError(f'row {i} has no "language", which its share of the batches goes by')
            of_language[language].append(i)
        self._groups = [of_language[language] for language in sorted(of_language)]
        self._orders: dict[tuple[int, int, int], list[int]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        place, language = divmod(index, len(self._groups))
        group = self._groups[language]
        turn, place = divmod(place, len(group))
        return self.rows[group[self._order(language, turn)[place]]]

    def _order(self, language: int, turn: int) -> list[int]:
        """The order in which the rows of a language are shown in this epoch, the `turn`th time that all of them are."""
        key = (self.epoch, language, turn)
        if key not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known[0] == self.epoch}
            size = len(self._groups[language])
            self._orders[key] = random.Random(f"{self.seed} {key}").sample(range(size), size)
        return self._orders[key]
