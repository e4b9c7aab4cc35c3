"""What datasets show differs by epoch: how a dataset knows its epoch, and who tells it."""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback


class EpochDataset(Dataset):
    """Rows that depend on the epoch, which [`SetEpoch`] tells."""

    def __init__(self) -> None:
        # In shared memory: data workers that live through several epochs have a copy of this object.
        self._epoch = torch.tensor(0).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose rows are shown."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Show the rows of that epoch, also in data workers that run already."""
        self._epoch.fill_(epoch)


class SetEpoch(TrainerCallback):
    """Tells a dataset the epoch that begins. accelerate calls set_epoch of a dataset only where its sampler has none, and not on several
    processes.
    """

    def __init__(self, rows: EpochDataset):
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.rows.set_epoch(int(state.epoch or 0))
