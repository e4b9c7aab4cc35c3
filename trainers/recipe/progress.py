"""Which steps of a recipe are done in its output directory, and whether they were done with this recipe and these files."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers.base.checkpoints import last_written_checkpoint

from .files import RecipeError
from .inputs import (
    Json,
    changes_of,
    data_files,
    describe_data,
    describe_model,
    model_files,
    with_commits,
)
from .schema import Recipe
from .steps import LLM_STAGES, PREPARATION, RecipeSteps


logger = logging.getLogger(__name__)

COMMITS = "commits.json"

# Keys that may change before a step is resumed, because its result does not depend on them.
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


class RecipeProgress(RecipeSteps):
    """The steps of a recipe, and what of them is done. `as_written` is the recipe as [`load_recipe`] gives it; `recipe` has the commits that its branches and
    tags on the Hub stood for when it was first run.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.as_written = recipe
        self.recipe = with_commits(recipe, self.commits())

    def commits(self) -> Json:
        """The commits of repositories on the Hub at the first run, see [`~trainers.recipe.inputs.find_commits`]."""
        return read_record(self.output_dir / COMMITS)

    def state_of(self, step: str) -> str:
        """ "finished", "begun" or "to do". Reads all files that decide the step's result, unless this process has read them before. RecipeError names what
        differs if the step was begun or finished with another recipe or other files, or its result was changed later.
        """
        record, state = self._record_of(step)
        if state != "to do":
            self._check_recipe(step, record, state)
            self._check_files(step, record, state)
        return state

    def check_recipe(self) -> None:
        """Raise RecipeError if a step was begun or finished with another recipe; names the keys that differ. Opens no data."""
        for step in (PREPARATION, *self.recipe.stages):
            record, state = self._record_of(step)
            if state != "to do":
                self._check_recipe(step, record, state)

    def checkpoint_of(self, stage: str) -> str | None:
        """The last checkpoint of an interrupted stage. Resuming verifies it, and takes the one before it if it is damaged."""
        checkpoint = last_written_checkpoint(self.output_dir / stage / "checkpoints")
        return None if checkpoint is None else str(checkpoint)

    def inputs_of(self, step: str) -> Json:
        """What decides the result of `step` besides the recipe, as JSON: hashes of data, models and the previous step's model."""
        found: Json = {}
        for field in self.fields_read_by(step):
            source = getattr(self.recipe.data, field)
            found[f"data.{field}"] = describe_data(source, images=_reads_images(step))
        for part in self.models_read_by(step):
            found[f"model.{part}"] = describe_model(*self.recipe.model.place_of(part))
        before = self.step_before(step)
        if before is not None:
            found[f"{before}/model"] = self.result_of(before)
        for which in self.stores_read_by(step):
            found[f"text_stores.{which}"] = self._encoder_of(which)
        return found

    def result_of(self, step: str) -> Json:
        """The hashes of the model that `step` wrote, by file; empty if there is none."""
        folder = self.output_dir / step / "model"
        return describe_model(folder, None) if folder.is_dir() else {}

    def files(self) -> list[Path]:
        """All local files that [`~RecipeProgress.inputs_of`] and [`~RecipeProgress.result_of`] hash."""
        files: list[Path] = []
        for step in (PREPARATION, *self.recipe.stages):
            for field in self.fields_read_by(step):
                source = getattr(self.recipe.data, field)
                files += data_files(source, images=_reads_images(step))
            folders = [Path(self.recipe.model.place_of(part)[0]) for part in self.models_read_by(step)]
            for folder in [*folders, self.output_dir / step / "model"]:
                files += model_files(folder) if folder.is_dir() else []
        return files

    def _record_of(self, step: str) -> tuple[Json, str]:
        """The last record of `step`, and its state; an empty one if nothing was recorded."""
        for file, state in (("complete.json", "finished"), ("started.json", "begun")):
            if record := read_record(self.output_dir / step / file):
                return record, state
        return {}, "to do"

    def _check_recipe(self, step: str, record: Json, state: str) -> None:
        if changes := list(_changes(record.get("recipe", {}), self._part(step))):
            raise RecipeError(
                f"{self.output_dir / step} was {state} with another recipe: {'; '.join(changes[:3])}. Change it back, {self._remedy(step)}"
            )

    def _check_files(self, step: str, record: Json, state: str) -> None:
        folder = self.output_dir / step
        if "inputs" not in record:
            logger.warning(
                "%s was begun by an earlier release, which recorded no hashes: changes of its data and models cannot be noticed",
                folder,
            )
        elif changes := changes_of(record["inputs"], self.inputs_of(step)):
            raise RecipeError(
                f"{folder} was {state} with other files: {'; '.join(changes)}. Put them back, {self._remedy(step)}"
            )
        elif state == "finished" and (
            changes := changes_of({"model": record.get("result", {})}, {"model": self.result_of(step)})
        ):
            raise RecipeError(
                f"{folder} was changed after it was finished: {'; '.join(changes)}. Put it back, {self._remedy(step)}"
            )

    def _remedy(self, step: str) -> str:
        return f"give this recipe an output_dir of its own, or delete {self.output_dir / step} to run it anew"

    def _encoder_of(self, which: str) -> Json:
        """The encoder of the text store "llm" or "teacher", without the place of its files."""
        store = self.find_store(which)
        fingerprint = {} if store is None else store.fingerprint
        return {key: value for key, value in fingerprint.items() if key not in ("model", "revision")}

    def _part(self, step: str) -> dict[str, Any]:
        """The part of the recipe that decides the result of `step`, as JSON."""
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


def read_record(path: Path) -> Json:
    """The JSON object in a file of the output directory; empty if there is no such file. RecipeError if it holds something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is damaged ({error}): delete {path.parent} to run the step anew") from error
    if not isinstance(record, dict):
        raise RecipeError(f"{path} is damaged (it holds no object): delete {path.parent} to run the step anew")
    return record


def _reads_images(step: str) -> bool:
    return step == "contrastive_tuning"


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if key not in before and not now[key]:
                continue  # a setting that an earlier release did not have, and that is off
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {before!r} and is {now!r}"
