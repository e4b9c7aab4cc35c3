"""What a recipe means on this machine, and how far its output directory has come; nothing here trains or writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from trainers.base.checkpoints import last_complete_checkpoint
from trainers.compute.dtypes import native_dtype
from trainers.data.pairs import PairSource, open_pairs

from .files import RecipeError
from .schema import CONFIG_OF, ELSEWHERE, Recipe, derived_arguments, own_fields


PREPARATION = "preparation"
STAGE_0 = "caption_contrastive"

# What of a recipe may change between a step and its resumption, because the step's result does not depend on it.
_MAY_CHANGE_AT_THE_TOP = ("output_dir",)
_MAY_CHANGE_IN_DATA = ("eval", "num_texts", "num_captions", "captions_per_pair")
_MAY_CHANGE_IN_A_STAGE = (
    "device_batch_size",
    "disable_tqdm",
    "log_level",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "eval_steps",
    "eval_strategy",
    "per_device_eval_batch_size",
    "report_to",
    "run_name",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
)


class RecipeProgress:
    """
    One recipe on one or several processes, and what of it is done.

    Args:
        recipe: checked, as [`load_recipe`] gives it.

    Attributes:
        recipe: the same.
        output_dir: absolute.
        processes: how many there are, and which of them this one is.
        precision: "float32", "bfloat16" or "float16".
        arguments: stage -> its trainer config, as this machine and number of processes have it.

    Raises:
        RecipeError: If a stage's trainer refuses its settings.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir).absolute()
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self.precision = _precision(recipe.precision)
        if recipe.data.eval is not None and recipe.data.eval.streaming:
            raise RecipeError("data.eval.streaming: held-out rows are read by number; leave it false")
        self.arguments = {name: self._arguments(name) for name in recipe.stages}

    def state_of(self, step: str) -> str:
        """
        "finished", "begun" or "to do".

        Raises:
            RecipeError: If the step was finished or begun with another recipe; names the keys that changed.
        """
        for file, state in (("complete.json", "finished"), ("started.json", "begun")):
            path = self.output_dir / step / file
            if path.is_file():
                before = json.loads(path.read_text(encoding="utf-8"))["recipe"]
                changes = list(_changes(before, self._part(step)))
                if changes:
                    raise RecipeError(
                        f"{path.parent} was {state} with another recipe: {'; '.join(changes[:3])}. Give this recipe an output_dir of its own, "
                        f"or delete {path.parent} to run it anew"
                    )
                return state
        return "to do"

    def predecessor(self, stage: str) -> str:
        """The step whose model `stage` starts from, if it is not stage 0."""
        order = [name for name in self.recipe.stages if name != STAGE_0]
        position = order.index(stage)
        return order[position - 1] if position else PREPARATION

    def checkpoint_of(self, stage: str) -> str | None:
        """The last complete checkpoint of a stage that was interrupted."""
        if not (self.output_dir / stage / "checkpoints").is_dir():
            return None
        try:
            return last_complete_checkpoint(self.output_dir / stage / "checkpoints")
        except ValueError:
            return None  # killed before the first one

    def store_path(self, which: str) -> Path:
        """Folder of the text store "llm" or "teacher"."""
        path = getattr(self.recipe.text_stores, which).path
        return self.output_dir / "text-stores" / which if path is None else Path(path).absolute()

    def text_sources(self, which: str) -> list[PairSource]:
        """What the store "llm" or "teacher" holds the captions of."""
        data = self.recipe.data
        trained = [data.texts or data.train] if "inheritance" in self.recipe.stages else []
        if which == "llm" and "contrastive_tuning" in self.recipe.stages:
            trained.append(data.train)
        sources = [*trained, *([data.eval] if data.eval else [])]
        return [source for i, source in enumerate(sources) if source not in sources[:i]]

    def rows_of(self, stage: str) -> int | None:
        """How many rows `stage` trains on: as the recipe says, or counted; None if they are not there or a stream."""
        source, key = self.source_of(stage)
        stated = getattr(self.recipe.data, key)
        if stated is not None or source.streaming:
            return stated
        try:
            return len(open_pairs(source, images=False))
        except FileNotFoundError:
            return None

    def expected_texts(self, which: str) -> int | None:
        """About how many different texts the store "llm" or "teacher" will hold, a row of `texts` being one; None if rows cannot be counted."""
        data, stages = self.recipe.data, self.recipe.stages
        counts = []
        for stage in ("inheritance", "contrastive_tuning") if which == "llm" else ("inheritance",):
            if stage in stages:
                rows = self.rows_of(stage)
                if rows is None:
                    return None
                apart = stage == "inheritance" and data.texts is not None
                counts.append(rows if apart else rows * data.captions_per_pair)
        # Both stages read the same captions, unless stage 1 has texts of its own.
        return (sum(counts) if data.texts is not None else max(counts)) if counts else None

    def needs_store(self, which: str) -> bool:
        """Whether a stage reads the store "llm" or "teacher"."""
        stages = self.recipe.stages
        return "inheritance" in stages or (which == "llm" and "contrastive_tuning" in stages)

    def _arguments(self, name: str) -> Any:
        stage = self.recipe.stages[name]
        derived = derived_arguments(name, stage, self.processes.num_processes)
        if name == STAGE_0 and self._is_stream(name):
            raise RecipeError(
                f"stages.{name}: draws pairs by row number, so it cannot read a stream: set data.captions (with streaming false)"
            )
        if self._is_stream(name) and stage.arguments.get("max_steps", -1) <= 0:
            derived["max_steps"] = self._stream_steps(name)
        try:
            return CONFIG_OF[name](
                **{
                    "output_dir": str(self.output_dir / name / "checkpoints"),
                    "seed": self.recipe.seed,
                    "bf16": self.precision == "bfloat16",
                    "fp16": self.precision == "float16",
                    "use_cpu": not torch.accelerator.is_available(),
                    **stage.arguments,
                    **derived,
                }
            )
        except ValueError as error:
            raise RecipeError(f"stages.{name}: {error}") from error

    def source_of(self, stage: str) -> tuple[PairSource, str]:
        """What `stage` trains on, and the key of `data` that has its number of rows."""
        data = self.recipe.data
        if stage == STAGE_0 and data.captions is not None:
            return data.captions, "num_captions"
        if stage == "inheritance" and data.texts is not None:
            return data.texts, "num_texts"
        return data.train, "num_pairs"

    def _is_stream(self, stage: str) -> bool:
        return self.source_of(stage)[0].streaming

    def _stream_steps(self, stage: str) -> int:
        key = self.source_of(stage)[1]
        num_rows, settings = getattr(self.recipe.data, key), self.recipe.stages[stage]
        if num_rows is None:
            raise RecipeError(
                f"data.{key}: a stream cannot be counted, so say how many rows it has (or set stages.{stage}.max_steps)"
            )
        epochs = settings.arguments.get("num_train_epochs", CONFIG_OF[stage].num_train_epochs)
        return max(1, int(epochs * num_rows / settings.global_batch_size))

    def resolved(self) -> dict[str, Any]:
        """The recipe with all that decides the result filled in; it can be run as it is."""
        values = self.recipe.as_dict()
        values["precision"] = self.precision
        if values["model"]["teacher"] is None:
            values["model"]["teacher"] = values["model"]["vision"]
            values["model"]["teacher_revision"] = values["model"]["vision_revision"]
        for which in ("llm", "teacher"):
            values["text_stores"][which]["path"] = str(self.store_path(which))
        for name, config in self.arguments.items():
            ours = {key: value for key, value in own_fields(config).items() if key not in ELSEWHERE}
            if self.recipe.stages[name].published_lambda is not None:
                del ours["lambda_ins"], ours["lambda_struct"]
            values["stages"][name] = {**values["stages"][name], **ours}
        return values

    def _part(self, step: str) -> dict[str, Any]:
        """What of the recipe decides the result of `step`, as JSON has it."""
        values = self.resolved()
        stages = values.pop("stages")
        order = list(stages)
        wanted = [] if step == PREPARATION else order[: order.index(step) + 1]
        if step == PREPARATION:
            wanted = [name for name in order if name == STAGE_0]
        for key in _MAY_CHANGE_AT_THE_TOP:
            del values[key]
        for key in _MAY_CHANGE_IN_DATA:
            del values["data"][key]
        if not self.recipe.data.train.streaming:
            del values["data"]["num_pairs"]
        values["text_stores"] = {which: values["text_stores"][which]["dtype"] for which in ("llm", "teacher")}
        values["stages"] = {
            name: {key: value for key, value in stages[name].items() if key not in _MAY_CHANGE_IN_A_STAGE}
            for name in wanted
        }
        return json.loads(json.dumps(values))


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if torch.accelerator.is_available():
        return "float32"
    return str(native_dtype()).removeprefix("torch.")


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {before!r} and is {now!r}"
