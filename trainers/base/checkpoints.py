"""Which checkpoint a training goes on from, and how one shows that it is complete."""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState


logger = logging.getLogger(__name__)

# The file that Trainer writes last: a checkpoint with it is complete.
STATE_FILE = "trainer_state.json"


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints count as complete, for [`last_complete_checkpoint`], only once all of their files are written."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the last complete one in `output_dir`: one that a killed process
                had not finished is passed over.

        Raises:
            ValueError: If there is no complete checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint or None, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # One left by an earlier run in the same folder would make this checkpoint look complete while it is written.
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (folder / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Every process has written its file before the first one writes the last file of the checkpoint.
        self.accelerator.wait_for_everyone()


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """
    The checkpoint of the most steps in `output_dir` that was written to its end.

    Raises:
        ValueError: If there is none.
    """
    steps = {int(folder.name.split("-")[1]): folder for folder in Path(output_dir).glob("checkpoint-[0-9]*")}
    for step in sorted(steps, reverse=True):
        try:
            TrainerState.load_from_json(str(steps[step] / STATE_FILE))
        except (OSError, ValueError):
            logger.warning(f"{steps[step]} was not written to its end; looking for the one before it.")
        else:
            return str(steps[step])
    raise ValueError(f"{output_dir} holds no complete checkpoint to resume from: leave resume_from_checkpoint out.")
