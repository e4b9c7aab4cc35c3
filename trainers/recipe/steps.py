"""What a recipe means on this machine: its steps, what each of them reads and starts from, and the trainers' settings."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from trainers.compute.dtypes import native_dtype
from trainers.data.pairs import PairSource, open_pairs
from trainers.storage.object_stores import is_address
from trainers.text_store.store import TextEmbeddingStore

from .files import RecipeError
from .schema import CONFIG_OF, ELSEWHERE, Recipe, derived_arguments, in_terms_of_recipes, own_fields


PREPARATION = "preparation"
MASKED_NEXT_TOKEN, STAGE_0 = "masked_next_token", "caption_contrastive"
LLM_STAGES = (MASKED_NEXT_TOKEN, STAGE_0)  # they tune the LLM, which the stages after them read with

# Training texts that are embedded beforehand where the others are embedded while they are trained on: enough for their statistics.
ON_THE_FLY_TEXTS = 10_000


class RecipeSteps:
    """The steps of a recipe on one or several processes: the preparation, and the stages. A step is named as its folder in `output_dir` is.

    Attributes:
        recipe: checked, as [`load_recipe`] gives it.
        output_dir: absolute.
        processes: how many there are, and which of them this one is.
        precision: "float32", "bfloat16" or "float16".
        arguments: stage -> its trainer config, for this machine and number of processes. RecipeError if a trainer refuses its settings.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir).absolute()
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self.precision = _precision(recipe.precision)
        llm_stages = [stage for stage in recipe.stages if stage in LLM_STAGES]
        if recipe.data.eval is not None and recipe.data.eval.streaming and llm_stages:
            raise RecipeError(f"data.eval.streaming: {llm_stages[0]} reads held-out rows by number; leave it false")
        self.arguments = {name: self.new_arguments(name) for name in recipe.stages}

    # What a step starts from

    def step_before(self, step: str) -> str | None:
        """The step whose model `step` starts from."""
        if step not in (*LLM_STAGES, PREPARATION):
            return self.predecessor(step)
        stages = [stage for stage in self.recipe.stages if stage in LLM_STAGES]
        before = stages if step == PREPARATION else stages[: stages.index(step)]
        return before[-1] if before else None

    def predecessor(self, stage: str) -> str:
        """The step whose model stage 1 or stage 2 starts from."""
        order = [name for name in self.recipe.stages if name not in LLM_STAGES]
        position = order.index(stage)
        return order[position - 1] if position else PREPARATION

    def llm_of(self, stage: str | None) -> tuple[str, str]:
        """Folder or Hub name, and revision, of the LLM that `stage` tunes, and with None of the LLM that stages 1 and 2 read with."""
        before = self.step_before(stage or PREPARATION)
        return (
            self.recipe.model.place_of("text") if before is None else (str(self.output_dir / before / "model"), "main")
        )

    # What a step reads

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

    def fields_read_by(self, step: str) -> list[str]:
        """The fields of `data` that decide the result of `step`."""
        if step == PREPARATION:
            return self.text_fields("llm")
        plain_texts = step == STAGE_0 and self.recipe.data.plain_texts is not None
        return [self.source_of(step)[0], *(["plain_texts"] if plain_texts else [])]

    def models_read_by(self, step: str) -> list[str]:
        """The fields of `model` that decide the result of `step`."""
        text = ["text"] if step in (*LLM_STAGES, PREPARATION) and self.step_before(step) is None else []
        if step != PREPARATION:
            return text
        return ["vision", "image_processor", *text, *(["teacher"] if self.needs_store("teacher") else [])]

    def stores_read_by(self, step: str) -> list[str]:
        """The text stores that `step` reads."""
        return {"inheritance": ["llm", "teacher"], "contrastive_tuning": ["llm"]}.get(step, [])

    # Text stores

    def store_path(self, which: str) -> str | Path:
        """Folder of the text store "llm" or "teacher", or its address in an object store."""
        path = getattr(self.recipe.text_stores, which).path
        if path is None:
            return self.output_dir / "text-stores" / which
        return path if is_address(path) else Path(path).absolute()

    def find_store(self, which: str) -> TextEmbeddingStore | None:
        """The text store "llm" or "teacher", opened; None if it is still to be built here."""
        path = self.store_path(which)
        if is_address(path) or Path(path, "store.json").is_file():
            return TextEmbeddingStore(path)
        return None

    def needs_store(self, which: str) -> bool:
        """Whether a stage reads the store "llm" or "teacher"."""
        return bool(self.text_fields(which))

    def text_fields(self, which: str) -> list[str]:
        """The fields of `data` whose captions are trained on from the store "llm" or "teacher"."""
        stages = [stage for stage in self.recipe.stages if which in self.stores_read_by(stage)]
        return list(dict.fromkeys(self.source_of(stage)[0] for stage in stages))

    def text_sources(self, which: str) -> list[str]:
        """The fields of `data` whose captions the store "llm" or "teacher" holds: what is trained on from it, and what is held out."""
        return [*self.text_fields(which), *(["eval"] if self.recipe.data.eval is not None else [])]

    def samples(self, which: str) -> bool:
        """Whether the store "llm" or "teacher" holds only some of the texts that are trained on, as the others are embedded on the fly."""
        return which == "llm" and self.recipe.text_stores.llm.on_the_fly

    # Numbers of rows and texts

    def rows_of(self, stage: str) -> int | None:
        """How many rows `stage` trains on, without plain texts: as the recipe says, or counted; None if they are not there or a stream."""
        return self._count(*self.source_of(stage))

    def plain_rows_of(self, stage: str) -> int | None:
        """How many rows of plain text `stage` trains on; None if they are not there."""
        return 0 if stage != STAGE_0 or self.recipe.data.plain_texts is None else self._count("plain_texts")

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

    # Settings

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

    def new_arguments(self, name: str) -> Any:
        """The trainer config of a stage. Making it also makes accelerate forget the trainer that came before, and DeepSpeed's settings for that, which
        another trainer of this process would refuse.
        """
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
            raise RecipeError(f"stages.{name}: {in_terms_of_recipes(error)}") from error

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


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return str(native_dtype(device)).removeprefix("torch.")
