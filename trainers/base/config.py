"""Settings that every stage shares, and those of Transformers that a stage would not follow."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


# Setting -> the values that it may have, and why no others.
Refused = dict[str, tuple[tuple[Any, ...], str]]


@dataclass
class StageArguments(TrainingArguments):
    """Defaults that differ from [`~transformers.TrainingArguments`] in every stage, and settings that are refused because they would be ignored, or
    would change the loss; ValueError says why.
    """

    dataloader_drop_last: bool = True
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    data_seed: int | None = None
    logging_nan_inf_filter: bool = False

    # Without annotation, as it is no setting itself.
    refused = Refused(
        label_smoothing_factor=((0.0,), "the loss has no class labels that could be smoothed"),
        auto_find_batch_size=((False,), "the loss depends on the batch: choose per_device_train_batch_size yourself"),
        resume_from_checkpoint=((None,), "trainers do not read it: call trainer.train(resume_from_checkpoint=...)"),
        bf16_full_eval=((False,), "evaluating would round the weights that are trained: use bf16=True"),
        fp16_full_eval=((False,), "evaluating would round the weights that are trained: use fp16=True"),
        remove_unused_columns=((False,), "it would drop the captions, which the model's forward does not take"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:
            # Else the order of the rows would come from whatever torch was seeded with last.
            self.data_seed = self.seed
        for name, (allowed, reason) in self.refused.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: {reason}; leave it {allowed[0]!r}.")
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config {name}=True: every process reads batches of per_device_train_batch_size rows of its own. Leave it out."
                )

    def refuse_batch_of_one(self) -> None:
        """Raises ValueError if a batch over all processes has one row, for a loss that compares the rows of a batch with each other."""
        for name, rows in (
            ("per_device_train_batch_size", self.train_batch_size),
            ("per_device_eval_batch_size", self.eval_batch_size),
        ):
            if rows * self.world_size < 2:
                raise ValueError(
                    f"{name}={rows} on one process: the loss compares the rows of a batch with each other, and is 0 for a batch of one. "
                    "Raise it to at least 2."
                )
