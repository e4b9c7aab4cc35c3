"""The captions of a row, and which of them it shows in an epoch."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from .epochs import EpochDataset


class DrawnCaptions(EpochDataset):
    """Rows whose "text" is one caption: from a list of captions, one is drawn for each row and epoch (ProCLIP, arXiv 2510.18795, Table 8: "one
    drawn at random per sample per epoch"; the published code draws without a seed). The draw is a function of seed, epoch and row alone, so
    a resumed run and a run with another number of processes or data workers sees the same captions. So is "teacher_text", by a draw of its
    own, in rows that have it.

    Args:
        rows: the dataset: `len(rows)` rows by number, each a mapping with "text", a string or a list of captions.
        seed: seed of the draw.

    Raises:
        ValueError: If the dataset has no rows by number (a stream), or, when it is read, if a row has no caption.
    """

    def __init__(self, rows: Any, seed: int):
        if isinstance(rows, IterableDataset):
            raise ValueError(
                f"the dataset is a stream ({type(rows).__name__}), which has no row numbers: open it by trainers.data.open_pairs with "
                "PairSource(..., streaming=True), whose streams can be shared by processes and resumed, or pass a dataset with len() and [i]"
            )
        super().__init__()
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """As of any [`EpochDataset`], of the rows too if they are one."""
        super().set_epoch(epoch)
        if isinstance(self.rows, EpochDataset):
            self.rows.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        drawn = draw_captions(row, f"row {index}", self.seed, self.epoch, index)
        return {**row, **drawn}


def draw_captions(row: Mapping[str, Any], name: str, seed: int, epoch: int, key: int | str) -> dict[str, str]:
    """One caption for each reader that the row has captions for, by independent draws: "text", and in rows that have it "teacher_text"."""
    drawn = {"text": draw_caption(captions_of(row, name), seed, epoch, key)}
    if row.get("teacher_text") is not None:
        drawn["teacher_text"] = draw_caption(captions_of(row, name, "teacher_text"), seed, epoch, f"{key} teacher")
    return drawn


def draw_caption(captions: Sequence[str], seed: int, epoch: int, row: int | str) -> str:
    """One of `captions`, drawn by seed, epoch and what tells the row from others (ProCLIP, arXiv 2510.18795, Table 8)."""
    if len(captions) == 1:
        return captions[0]
    # Seeded by a string, whose hash mixes all three: neighbouring rows and epochs draw independently.
    return random.Random(f"{seed} {epoch} {row}").choice(captions)


def captions_of(row: Mapping[str, Any], name: str, reader: str = "text") -> list[str]:
    """The captions of a row, at least one: of its "text", or its "teacher_text" for the `reader` of that name, where the row has one.

    Raises:
        ValueError: If the row has no column "text", no caption there, or something that is not text; calls the row `name`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{name} is a {type(row).__name__}, not columns with their values: of a dataset of `datasets`, take one split, and dataset.with_format(None)"
        )
    if "text" not in row:
        raise ValueError(f'{name} has no column "text", only {sorted(row)}: rename the column that holds the captions')
    column = "text" if row.get(reader) is None else reader
    value = row[column]
    captions = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not captions or value is None or "" in captions:
        raise ValueError(f'{name} has no caption in "{column}": leave such rows out')
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(
                f'{name} has the {type(caption).__name__} {caption!r:.80} in "{column}", where a caption or a list of captions is expected'
            )
    return captions
