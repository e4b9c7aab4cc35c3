"""Which checkpoint a training goes on from."""

import logging
from pathlib import Path

from transformers import TrainerState


logger = logging.getLogger(__name__)

# The file that Trainer writes last: a checkpoint with it is complete.
STATE_FILE = "trainer_state.json"


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
