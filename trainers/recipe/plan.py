"""What a recipe does on this machine, told before anything is run: rows, steps, batches, and how large the text stores become."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trainers.text_store.build import bytes_of_text
from trainers.text_store.store import TextEmbeddingStore

from .progress import RecipeProgress


@dataclass(frozen=True)
class StagePlan:
    """
    One stage.

    Attributes:
        name: of the stage.
        state: "finished", "to do", "begun", or "resumes from checkpoint-N".
        rows: that it trains on; None where they cannot be counted yet.
        steps: optimizer steps in all; None where `rows` is.
        epochs: passes over the rows; None where a number of steps is given and `rows` is not known.
        global_batch_size: rows of a step over all processes.
        num_processes: that share it.
        device_batch_size: rows that a device takes at once.
        gradient_caching: whether its share goes through it in parts.
        seconds: that it took since it was last resumed, if it is finished.
        last_evaluation: of the held-out rows, if it is finished and had an `eval_strategy`.
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
    """
    One text store.

    Attributes:
        name: "llm" or "teacher".
        path: its folder.
        stored: texts that are in it.
        texts: about how many different ones it will hold; None where they cannot be counted yet.
        dim: size of an embedding; None if the encoder's config cannot be read.
        dtype: of the embeddings.
    """

    name: str
    path: Path
    stored: int
    texts: int | None
    dim: int | None
    dtype: str

    @property
    def num_bytes(self) -> int | None:
        """About how large it will be."""
        if self.texts is None or self.dim is None:
            return None
        return self.texts * bytes_of_text(self.dim, self.dtype)


def plan_stages(curriculum: RecipeProgress) -> list[StagePlan]:
    """
    The stages of a recipe, in their order. Rows that the recipe does not number are counted, which for a large dataset means to open it.

    Raises:
        RecipeError: If a stage was run with another recipe.
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
        done = json.loads((curriculum.output_dir / name / "complete.json").read_text(encoding="utf-8"))
    elif (checkpoint := curriculum.checkpoint_of(name)) is not None:
        state = f"resumes from {Path(checkpoint).name}"
    rows = curriculum.rows_of(name)
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    if steps is None and rows is not None:
        steps = int(arguments.num_train_epochs * (rows // settings.global_batch_size))
    epochs: float | None = arguments.num_train_epochs
    if arguments.max_steps > 0:
        epochs = None if rows is None else arguments.max_steps * settings.global_batch_size / rows
    share = arguments.per_device_train_batch_size
    cached = arguments.gradient_caching_batch_size
    return StagePlan(
        name,
        state,
        rows,
        steps,
        epochs,
        settings.global_batch_size,
        curriculum.processes.num_processes,
        cached or share,
        cached is not None,
        done["seconds"],
        done["last_evaluation"],
    )


def _plan_store(curriculum: RecipeProgress, which: str) -> StorePlan:
    path = curriculum.store_path(which)
    stored = len(TextEmbeddingStore(path)) if (path / "store.json").is_file() else 0
    dtype = getattr(curriculum.recipe.text_stores, which).dtype
    return StorePlan(which, path, stored, curriculum.expected_texts(which), _dim(curriculum, which), dtype)


def _dim(curriculum: RecipeProgress, which: str) -> int | None:
    model = curriculum.recipe.model
    try:
        if which == "llm":
            return AutoConfig.from_pretrained(model.text, revision=model.text_revision).get_text_config().hidden_size
        config = AutoConfig.from_pretrained(model.teacher or model.vision, revision=model.teacher_revision or "main")
    except OSError:
        return None
    # CLIP projects its texts; SigLIP's text encoder has its own projection, to the size of its pictures' embeddings.
    projected = getattr(config, "projection_dim", None)
    return projected or getattr(config.text_config, "projection_size", None)
