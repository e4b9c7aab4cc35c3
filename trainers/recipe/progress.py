"""What a recipe means on this machine, and how far its output directory has come; nothing here trains."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from trainers.base.checkpoints import last_written_checkpoint
from trainers.compute.dtypes import native_dtype
from trainers.data.pairs import PairSource, open_pairs
from trainers.text_store.store import TextEmbeddingStore

from .files import RecipeError
from .inputs import (
    Json,
    changes_of,
    data_files,
    describe_data,
    describe_model,
    is_local,
    model_files,
    with_commits,
)
from .schema import CONFIG_OF, ELSEWHERE, Recipe, derived_arguments, own_fields


logger = logging.getLogger(__name__)

COMMITS = "commits.json"
PREPARATION = "preparation"
MASKED_NEXT_TOKEN, STAGE_0 = "masked_next_token", "caption_contrastive"
LLM_STAGES = (MASKED_NEXT_TOKEN, STAGE_0)  # they tune the LLM, which the stages after them read with

# Training texts that are embedded beforehand where the others are embedded while they are trained on: enough for their statistics.
ON_THE_FLY_TEXTS = 10_000

# What of a recipe may change between a step and its resumption, because the step's result does not depend on it.
_MAY_CHANGE_AT_THE_TOP = ("output_dir",)
_MAY_CHANGE_IN_DATA = ("eval", "num_texts", "num_captions", "num_masked_texts", "captions_per_pair")
_MAY_CHANGE_IN_A_STAGE = (
    "device_batch_size",
    "disable_tqdm",
    "log_level",
    "logging_first_step",
    "logging_nan_inf_filter",
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
        recipe: the same, with the commits that its branches and tags on the Hub stood for when it was first run.
        output_dir: absolute.
        processes: how many there are, and which of them this one is.
        precision: "float32", "bfloat16" or "float16".
        arguments: stage -> its trainer config, as this machine and number of processes have it.

    Raises:
        RecipeError: If a stage's trainer refuses its settings.
    """

    def __init__(self, recipe: Recipe):
        self.output_dir = Path(recipe.output_dir).absolute()
        self.as_written = recipe
        self.recipe = with_commits(recipe, self.commits())
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self.precision = _precision(recipe.precision)
        if recipe.data.eval is not None and recipe.data.eval.streaming:
            raise RecipeError("data.eval.streaming: held-out rows are read by number; leave it false")
        self.arguments = {name: self._arguments(name) for name in recipe.stages}

    def commits(self) -> Json:
        """The commits that names on the Hub stood for when the recipe was first run, see [`~trainers.recipe.inputs.find_commits`]."""
        path = self.output_dir / COMMITS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def state_of(self, step: str) -> str:
        """
        "finished", "begun" or "to do". Costs one pass over the files that decide the step's result, if they were not read before.

        Raises:
            RecipeError: If the step was finished or begun with another recipe or other files, or its result was changed since; names what differs.
        """
        record, state = self._record_of(step)
        if state != "to do":
            self._check_recipe(step, record, state)
            self._check_files(step, record, state)
        return state

    def check_recipe(self) -> None:
        """RecipeError if a step was finished or begun with another recipe; names the keys that changed. Opens no files."""
        for step in (PREPARATION, *self.recipe.stages):
            record, state = self._record_of(step)
            if state != "to do":
                self._check_recipe(step, record, state)

    def _record_of(self, step: str) -> tuple[Json, str]:
        """The last record of `step`, and its state; an empty one if nothing was recorded."""
        for file, state in (("complete.json", "finished"), ("started.json", "begun")):
            path = self.output_dir / step / file
            if path.is_file():
                return json.loads(path.read_text(encoding="utf-8")), state
        return {}, "to do"

    def _check_recipe(self, step: str, record: Json, state: str) -> None:
        if changes := list(_changes(record["recipe"], self._part(step))):
            raise RecipeError(
                f"{self.output_dir / step} was {state} with another recipe: {'; '.join(changes[:3])}. Change it back, {self._remedy(step)}"
            )

    def _check_files(self, step: str, record: Json, state: str) -> None:
        folder = self.output_dir / step
        if "inputs" not in record:
            logger.warning(
                "%s is of an earlier release, which kept no hashes: whether its data and models have changed is unknown",
                folder,
            )
        elif changes := changes_of(record["inputs"], self.inputs_of(step)):
            raise RecipeError(
                f"{folder} was {state} with other files: {'; '.join(changes)}. Put them back, {self._remedy(step)}"
            )
        elif state == "finished" and (
            changes := changes_of({"model": record["result"]}, {"model": self.result_of(step)})
        ):
            raise RecipeError(
                f"{folder} was changed after it was finished: {'; '.join(changes)}. Put it back, {self._remedy(step)}"
            )

    def _remedy(self, step: str) -> str:
        return f"give this recipe an output_dir of its own, or delete {self.output_dir / step} to run it anew"

    def inputs_of(self, step: str) -> Json:
        """What decides the result of `step` besides the recipe: hashes of data, models and the model before, by key of the recipe, as JSON."""
        found: Json = {}
        for field in self._data_of(step):
            source = getattr(self.recipe.data, field)
            found[f"data.{field}"] = describe_data(source, images=_reads_images(step))
        for part in self._models_of(step):
            found[f"model.{part}"] = describe_model(*self.recipe.model.place_of(part))
        before = self.step_before(step)
        if before is not None:
            found[f"{before}/model"] = self.result_of(before)
        for which in self._stores_of(step):
            found[f"text_stores.{which}"] = self._encoder_of(which)
        return found

    def result_of(self, step: str) -> Json:
        """The hashes of the model that `step` wrote, by file; empty if there is none."""
        folder = self.output_dir / step / "model"
        return describe_model(folder, None) if folder.is_dir() else {}

    def files(self) -> list[Path]:
        """All files of this machine that [`~RecipeProgress.inputs_of`] and [`~RecipeProgress.result_of`] hash."""
        files: list[Path] = []
        for step in (PREPARATION, *self.recipe.stages):
            for field in self._data_of(step):
                source = getattr(self.recipe.data, field)
                files += data_files(source, images=_reads_images(step)) if is_local(source) else []
            folders = [Path(self.recipe.model.place_of(part)[0]) for part in self._models_of(step)]
            for folder in [*folders, self.output_dir / step / "model"]:
                files += model_files(folder) if folder.is_dir() else []
        return files

    def _data_of(self, step: str) -> list[str]:
        """The fields of `data` that decide the result of `step`."""
        if step == PREPARATION:
            return self.text_fields("llm")
        plain_texts = step == STAGE_0 and self.recipe.data.plain_texts is not None
        return [self.source_of(step)[0], *(["plain_texts"] if plain_texts else [])]

    def _models_of(self, step: str) -> list[str]:
        """The fields of `model` that decide the result of `step`."""
        text = ["text"] if step in (*LLM_STAGES, PREPARATION) and self.step_before(step) is None else []
        if step != PREPARATION:
            return text
        return ["vision", "image_processor", *text, *(["teacher"] if self.needs_store("teacher") else [])]

    def _stores_of(self, step: str) -> list[str]:
        """The text stores that `step` reads."""
        return {"inheritance": ["llm", "teacher"], "contrastive_tuning": ["llm"]}.get(step, [])

    def _encoder_of(self, which: str) -> Json:
        """What made the text store "llm" or "teacher"; where its model lay is of no account."""
        path = self.store_path(which)
        fingerprint = TextEmbeddingStore(path).fingerprint if (path / "store.json").is_file() else {}
        return {key: value for key, value in fingerprint.items() if key not in ("model", "revision")}

    def step_before(self, step: str) -> str | None:
        """The step whose model `step` starts from."""
        if step not in (*LLM_STAGES, PREPARATION):
            return self.predecessor(step)
        stages = [stage for stage in self.recipe.stages if stage in LLM_STAGES]
        before = stages if step == PREPARATION else stages[: stages.index(step)]
        return before[-1] if before else None

    def llm_of(self, stage: str | None) -> tuple[str, str]:
        """Folder or Hub name, and revision, of the LLM that `stage` tunes, and with None of the LLM that stages 1 and 2 read with."""
        before = self.step_before(stage or PREPARATION)
        return (
            self.recipe.model.place_of("text") if before is None else (str(self.output_dir / before / "model"), "main")
        )

    def predecessor(self, stage: str) -> str:
        """The step whose model stage 1 or stage 2 starts from."""
        order = [name for name in self.recipe.stages if name not in LLM_STAGES]
        position = order.index(stage)
        return order[position - 1] if position else PREPARATION

    def checkpoint_of(self, stage: str) -> str | None:
        """The last checkpoint of a stage that was interrupted; resuming verifies it, and takes the one before it if it was damaged."""
        checkpoint = last_written_checkpoint(self.output_dir / stage / "checkpoints")
        return None if checkpoint is None else str(checkpoint)

    def store_path(self, which: str) -> Path:
        """Folder of the text store "llm" or "teacher"."""
        path = getattr(self.recipe.text_stores, which).path
        return self.output_dir / "text-stores" / which if path is None else Path(path).absolute()

    def text_fields(self, which: str) -> list[str]:
        """The fields of `data` whose captions are trained on from the store "llm" or "teacher"."""
        stages = [stage for stage in self.recipe.stages if which in self._stores_of(stage)]
        return list(dict.fromkeys(self.source_of(stage)[0] for stage in stages))

    def text_sources(self, which: str) -> list[str]:
        """The fields of `data` whose captions the store "llm" or "teacher" holds: what is trained on from it, and what is held out."""
        return [*self.text_fields(which), *(["eval"] if self.recipe.data.eval is not None else [])]

    def rows_of(self, stage: str) -> int | None:
        """How many rows `stage` trains on, without plain texts: as the recipe says, or counted; None if they are not there or a stream."""
        return self._count(*self.source_of(stage))

    def plain_rows_of(self, stage: str) -> int | None:
        """How many rows of plain text `stage` trains on; None if they are not there."""
        return 0 if stage != STAGE_0 or self.recipe.data.plain_texts is None else self._count("plain_texts")

    def _count(self, field: str, number: str | None = None) -> int | None:
        """The rows of a field of `data`: as the field `number` says, or counted."""
        source = getattr(self.recipe.data, field)
        stated = None if number is None else getattr(self.recipe.data, number)
        if stated is not None or source.streaming:
            return stated
        try:
            return len(open_pairs(source, images=False))
        except FileNotFoundError:
            return None

    def expected_texts(self, which: str) -> int | None:
        """About how many different texts the store "llm" or "teacher" will hold, a row of `texts` being one; None if rows cannot be counted."""
        data = self.recipe.data
        numbers = {"train": "num_pairs", "texts": "num_texts", "eval": None}
        total = 0
        for field in self.text_sources(which):
            rows = self._count(field, numbers[field])
            if rows is None:
                return None
            texts = rows if field == "texts" else rows * data.captions_per_pair
            total += min(texts, ON_THE_FLY_TEXTS) if self.samples(which) and field != "eval" else texts
        return total

    def samples(self, which: str) -> bool:
        """Whether the store "llm" or "teacher" holds only some of the texts that are trained on, as the others are embedded on the fly."""
        return which == "llm" and self.recipe.text_stores.llm.on_the_fly

    def needs_store(self, which: str) -> bool:
        """Whether a stage reads the store "llm" or "teacher"."""
        return bool(self.text_fields(which))

    def _arguments(self, name: str) -> Any:
        stage = self.recipe.stages[name]
        derived = derived_arguments(name, stage, self.processes.num_processes)
        if name in LLM_STAGES and self._is_stream(name):
            field = "captions" if name == STAGE_0 else "masked_texts"
            raise RecipeError(
                f"stages.{name}: reads rows by number, so it cannot read a stream: set data.{field} (with streaming false)"
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

    def source_of(self, stage: str) -> tuple[str, str]:
        """The fields of `data` that say what `stage` trains on, and how many rows that has."""
        data = self.recipe.data
        if stage == MASKED_NEXT_TOKEN and data.masked_texts is not None:
            return "masked_texts", "num_masked_texts"
        if stage in LLM_STAGES and data.captions is not None:
            return "captions", "num_captions"
        if stage == "inheritance" and data.texts is not None:
            return "texts", "num_texts"
        return "train", "num_pairs"

    def data_of(self, stage: str) -> PairSource:
        """What `stage` trains on."""
        return getattr(self.recipe.data, self.source_of(stage)[0])

    def _is_stream(self, stage: str) -> bool:
        return self.data_of(stage).streaming

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
            wanted = [name for name in order if name in LLM_STAGES]
        for key in _MAY_CHANGE_AT_THE_TOP:
            del values[key]
        for key in _MAY_CHANGE_IN_DATA:
            del values["data"][key]
        if not self.recipe.data.train.streaming:
            del values["data"]["num_pairs"]
        on_the_fly = {"on_the_fly": True} if self.samples("llm") else {}
        values["text_stores"] = {
            which: values["text_stores"][which]["dtype"] for which in ("llm", "teacher")
        } | on_the_fly
        values["stages"] = {
            name: {key: value for key, value in stages[name].items() if key not in _MAY_CHANGE_IN_A_STAGE}
            for name in wanted
        }
        return json.loads(json.dumps(values))


def _reads_images(step: str) -> bool:
    return step == "contrastive_tuning"


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return str(native_dtype(device)).removeprefix("torch.")


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if key not in before and not now[key]:
                continue  # a setting that an earlier release did not have, and that is off
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {before!r} and is {now!r}"
