"""What a recipe does on this machine, estimated before anything runs: rows, steps, batches, and the size of the text stores."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trainers.caption_contrastive.batches import count_batches
from trainers.storage.model_files import loading_from
from trainers.text_store.build import bytes_of_text

from .files import RecipeError
from .progress import RecipeProgress, read_record
from .steps import STAGE_0


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        state: "finished", "to do", "begun", or "resumes from checkpoint-N".
        rows: training rows; None where they cannot be counted yet.
        steps: optimizer steps in all, the Trainer's own number; None where `rows` is None.
        epochs: passes over the rows, as the Trainer counts them; None where a number of steps is given and `rows` is not known.
        global_batch_size, num_processes: rows of a step over all processes, and how many share it.
        device_batch_size, gradient_caching: most rows that a device takes at once, and whether its share goes through it in parts.
        seconds, last_evaluation: of a finished stage, the time since it was last resumed, and metrics on the held-out rows.
    """

    name: str
    state: str
    rows: int | None
    steps: int | None
    epochs: float | None
    global_batch_size: int
    num_processes: int
    device_batch_size: int
    gradient_caching: bool
    seconds: float | None
    last_evaluation: dict[str, float]


@dataclass(frozen=True)
class StorePlan:
    """The text store "llm" or "teacher": how many texts are in it now, and will be (estimated; None where rows cannot be counted yet). `dim` is None if the
    encoder's config cannot be read.
    """

    name: str
    path: str | Path
    stored: int
    texts: int | None
    dim: int | None
    dtype: str

    @property
    def num_bytes(self) -> int | None:
        """Estimated size on the disk."""
        if self.texts is None or self.dim is None:
            return None
        return self.texts * bytes_of_text(self.dim, self.dtype)


def plan_stages(curriculum: RecipeProgress) -> list[StagePlan]:
    """The stages of a recipe, in their order. Rows that the recipe does not number are counted, which for a large dataset means to open it. RecipeError if
    a stage was run with another recipe or other files, or its rows do not fill a batch.
    """
    return [_plan_stage(curriculum, name) for name in curriculum.recipe.stages]


def plan_stores(curriculum: RecipeProgress) -> list[StorePlan]:
    """The text stores that the recipe's stages read."""
    return [_plan_store(curriculum, which) for which in ("llm", "teacher") if curriculum.needs_store(which)]


def _plan_stage(curriculum: RecipeProgress, name: str) -> StagePlan:
    settings, arguments = curriculum.recipe.stages[name], curriculum.arguments[name]
    state = curriculum.state_of(name)
    done: dict[str, Any] = {"seconds": None, "last_evaluation": {}}
    if state == "finished":
        done = read_record(curriculum.output_dir / name / "complete.json")
    elif (checkpoint := curriculum.checkpoint_of(name)) is not None:
        state = f"resumes from {Path(checkpoint).name}"
    rows, per_epoch = curriculum.rows_of(name), _steps_per_epoch(curriculum, name)
    steps, epochs = arguments.max_steps, arguments.num_train_epochs
    if steps > 0:
        epochs = None if per_epoch is None else steps / per_epoch
    else:
        steps = None if per_epoch is None else math.ceil(epochs * per_epoch)
    share = arguments.per_device_train_batch_size
    at_once = min(share, settings.device_batch_size or share)
    return StagePlan(
        name,
        state,
        rows,
        steps,
        epochs,
        settings.global_batch_size,
        curriculum.processes.num_processes,
        at_once,
        at_once < share,
        done["seconds"],
        done["last_evaluation"],
    )


def _steps_per_epoch(curriculum: RecipeProgress, name: str) -> float | None:
    """Optimizer steps of one pass over the rows, as the Trainer counts them: whole batches, and a smaller one at the end unless it is dropped. A
    stream has no end of an epoch, so its last batch goes on into the next pass.
    """
    rows, plain = curriculum.rows_of(name), curriculum.plain_rows_of(name)
    if rows is None or plain is None:
        return None
    batch, arguments = curriculum.recipe.stages[name].global_batch_size, curriculum.arguments[name]
    if curriculum.data_of(name).streaming:
        return rows / batch
    try:
        if name == STAGE_0:
            return sum(count_batches(rows, plain, batch, arguments.plain_text_share))
        if arguments.dataloader_drop_last and rows < batch:
            raise ValueError(f"there are {rows} rows, fewer than one batch of {batch}: lower global_batch_size")
    except ValueError as error:
        raise RecipeError(f"stages.{name}: {error}") from error
    return rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)


def _plan_store(curriculum: RecipeProgress, which: str) -> StorePlan:
    path, store = curriculum.store_path(which), curriculum.find_store(which)
    stored = 0 if store is None else len(store)
    dtype = getattr(curriculum.recipe.text_stores, which).dtype
    return StorePlan(which, path, stored, curriculum.expected_texts(which), _dim(curriculum, which), dtype)


def _dim(curriculum: RecipeProgress, which: str) -> int | None:
    model = curriculum.recipe.model
    try:
        name, revision = model.place_of("text" if which == "llm" else "teacher")
        with loading_from((name, revision)):
            config = AutoConfig.from_pretrained(name, revision=revision)
        if which == "llm":
            return config.get_text_config().hidden_size
    except OSError:
        return None
    # CLIP projects its texts; SigLIP's text encoder has its own projection, to the size of its image embeddings.
    projected = getattr(config, "projection_dim", None)
    return projected or getattr(config.text_config, "projection_size", None)
