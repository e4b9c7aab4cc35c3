"""Runs a recipe: text stores, then stage after stage, each from the last one's result, resuming what was interrupted.

The output directory of a recipe:

    recipe.yaml                 the recipe with all defaults filled in; `proclip train` takes it
    text-stores/{llm,teacher}/  unless the recipe has them elsewhere
    preparation/model/          the untrained pair: image encoder, fresh adapter, processor
    <stage>/checkpoints/        of the Trainer
    <stage>/model/              the stage's result, a lean checkpoint with its processor
    <step>/started.json         the part of the recipe that decides the step's result
    <step>/complete.json        the same, versions, steps, last log: written last, so a step that has it is finished
"""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, Trainer, set_seed

from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor

from .checkpoints import last_complete_checkpoint
from .contrastive_tuning_trainer import ContrastiveTuningTrainer
from .data.pairs import PairSource, iter_texts, open_pairs
from .data.store_files import write_file
from .data.text_store import TextEmbeddingStore
from .inheritance_trainer import RepresentationInheritanceTrainer
from .quickstart.language_model import native_dtype
from .recipe import CONFIG_OF, ELSEWHERE, Recipe, derived_arguments, own_fields
from .recipe_files import RecipeError


logger = logging.getLogger(__name__)

PREPARATION = "preparation"
_VERSIONS_OF = ("proclip-transformers", "torch", "transformers", "accelerate", "datasets")

# What of a recipe may change between a step and its resumption, because the step's result does not depend on it.
_MAY_CHANGE_AT_THE_TOP = ("output_dir",)
_MAY_CHANGE_IN_DATA = ("eval", "num_texts", "captions_per_pair")
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


class Curriculum:
    """
    One recipe on one or several processes (`accelerate launch`).

    Args:
        recipe: checked, as [`load_recipe`] gives it.

    Attributes:
        recipe: the same.
        output_dir: absolute.
        arguments: stage -> its trainer config, as this machine and number of processes have it.

    Raises:
        RecipeError: If a stage's trainer refuses its settings.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir).absolute()
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self.precision = _precision(recipe.precision)
        self.arguments = {name: self._arguments(name) for name in recipe.stages}

    # What is to be done

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
        """The step whose model `stage` starts from."""
        before = [name for name in self.recipe.stages if name != "caption_contrastive"]
        position = before.index(stage)
        return before[position - 1] if position else PREPARATION

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

    def needs_store(self, which: str) -> bool:
        """Whether a stage reads the store "llm" or "teacher"."""
        stages = self.recipe.stages
        return "inheritance" in stages or (which == "llm" and "contrastive_tuning" in stages)

    # Running

    def run(self, stage: str | None = None) -> Path:
        """
        Run or resume the stages, or one of them.

        Args:
            stage: the one; its predecessor must be finished.

        Returns:
            The folder of the last stage's model.

        Raises:
            RecipeError: If another run has the output directory, a step was run with another recipe, or the predecessor of `stage` is not
                finished.
        """
        if stage is not None and stage not in self.recipe.stages:
            raise RecipeError(f"this recipe has no stage {stage!r}, only {', '.join(self.recipe.stages)}")
        names = list(self.recipe.stages) if stage is None else [stage]
        with self._locked():
            for step in (PREPARATION, *self.recipe.stages):
                self.state_of(step)
            if stage is not None:
                self._check_predecessor(stage)
            self._on_main(self._write_resolved)
            for name in names:
                self._prepare()
                self._train(name)
        return self.output_dir / names[-1] / "model"

    def _check_predecessor(self, stage: str) -> None:
        before = self.predecessor(stage)
        if before != PREPARATION and self.state_of(before) != "finished":
            raise RecipeError(
                f"stage {stage} starts from {before}, which is not finished: run --stage {before} first, or all stages by leaving --stage out"
            )

    def _prepare(self) -> None:
        """Build the text stores, and save the untrained pair."""
        folder = self.output_dir / PREPARATION
        if self.state_of(PREPARATION) == "finished":
            return
        settings = self.recipe.model
        self._on_main(lambda: self._begin(PREPARATION))
        started = time.perf_counter()
        set_seed(self.recipe.seed)
        model = ProCLIPModel.from_vision_text_pretrained(
            self._vision(),
            settings.text,
            vision_revision=settings.vision_revision,
            text_revision=settings.text_revision,
            dtype={"vision_config": torch.float32, "text_config": getattr(torch, self.precision)},
            attn_implementation=settings.attn_implementation,
            **settings.config,
        )
        processor = ProCLIPProcessor(
            AutoImageProcessor.from_pretrained(
                settings.image_processor or settings.vision,
                revision=settings.vision_revision if settings.image_processor is None else "main",
            ),
            AutoTokenizer.from_pretrained(settings.text, revision=settings.text_revision),
            settings.prompt_template,
            settings.instruction,
            settings.max_length,
        )
        if self.needs_store("llm"):
            self._build_store("llm", model, processor)
        if self.needs_store("teacher"):
            name = settings.teacher or settings.vision
            revision = settings.teacher_revision or (settings.vision_revision if settings.teacher is None else "main")
            teacher = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32).eval()
            self._build_store("teacher", teacher, AutoTokenizer.from_pretrained(name, revision=revision))

        def save(staging: Path) -> None:
            model.save_pretrained(staging, lean=True)
            processor.save_pretrained(staging)

        self._on_main(lambda: _replace_folder(folder / "model", save))
        self._on_main(lambda: self._finish(PREPARATION, {"seconds": round(time.perf_counter() - started, 1)}))

    def _vision(self) -> str | ProCLIPModel:
        """The model whose image encoder is taken: by name, or loaded if it is a ProCLIP checkpoint, whose LLM is not wanted."""
        settings = self.recipe.model
        config = AutoConfig.from_pretrained(settings.vision, revision=settings.vision_revision)
        if not isinstance(config, ProCLIPConfig):
            return settings.vision
        return ProCLIPModel.from_pretrained(
            settings.vision,
            revision=settings.vision_revision,
            load_text_model=False,
            dtype=torch.float32,
            attn_implementation=settings.attn_implementation,
        )

    def _build_store(self, which: str, model: torch.nn.Module, processor: Any) -> None:
        # Every process takes part: the first one writes, and the others wait for it at the store's own lock, which has no time limit as the
        # barriers of torch.distributed have.
        model.to(self.processes.device)
        texts = chain.from_iterable(iter_texts(source) for source in self.text_sources(which))
        settings = getattr(self.recipe.text_stores, which)
        TextEmbeddingStore.build(
            texts,
            model,
            processor,
            self.store_path(which),
            token_budget=self.recipe.text_stores.token_budget,
            dtype=settings.dtype,
            progress=self.processes.is_main_process,
        )
        model.to("cpu")
        self.processes.wait_for_everyone()

    def _train(self, stage: str) -> None:
        folder = self.output_dir / stage
        if self.state_of(stage) == "finished":
            return
        self._on_main(lambda: self._begin(stage))
        started = time.perf_counter()
        source = self.output_dir / self.predecessor(stage) / "model"
        model = ProCLIPModel.from_pretrained(
            source, load_text_model=False, attn_implementation=self.recipe.model.attn_implementation
        )
        processor = ProCLIPProcessor.from_pretrained(source)
        trainer = self._trainer(stage, model, processor)
        trainer.train(resume_from_checkpoint=self.checkpoint_of(stage))
        staging = _staging(folder / "model")
        self._on_main(lambda: shutil.rmtree(staging, ignore_errors=True))
        trainer.save_model(str(staging))  # of all processes: under FSDP each holds a part

        def finish() -> None:
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle
            processor.save_pretrained(staging)
            shutil.rmtree(folder / "model", ignore_errors=True)
            staging.rename(folder / "model")
            history = trainer.state.log_history
            facts = {
                "steps": trainer.state.global_step,
                "seconds": round(time.perf_counter() - started, 1),  # since it was last resumed
                "last_log": next((log for log in reversed(history) if "loss" in log), {}),
                "last_evaluation": next((log for log in reversed(history) if "eval_loss" in log), {}),
                "arguments": self.arguments[stage].to_dict(),
            }
            self._finish(stage, facts)

        self._on_main(finish)

    def _trainer(self, stage: str, model: ProCLIPModel, processor: ProCLIPProcessor) -> Trainer:
        args, data, seed = self.arguments[stage], self.recipe.data, self.recipe.seed
        pictures = stage == "contrastive_tuning"
        rows = open_pairs(data.train if pictures else data.texts or data.train, seed, images=pictures)
        evaluated = data.eval if args.eval_strategy != "no" else None
        held_out = None if evaluated is None else open_pairs(evaluated, seed, images=pictures)
        text_store = TextEmbeddingStore(self.store_path("llm"))
        if pictures:
            return ContrastiveTuningTrainer(
                model, args, rows, held_out, text_store=text_store, processing_class=processor
            )
        teacher_store = TextEmbeddingStore(self.store_path("teacher"))
        return RepresentationInheritanceTrainer(
            model, args, rows, held_out, text_store=text_store, teacher_store=teacher_store
        )

    # Settings

    def _arguments(self, name: str) -> Any:
        stage = self.recipe.stages[name]
        derived = derived_arguments(name, stage, self.processes.num_processes)
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
            wanted = [name for name in order if name == "caption_contrastive"]
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

    # Files

    def _write_resolved(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        head = "# The recipe with all defaults filled in, as it was run.\n"
        head += "".join(f"# {name} {number}\n" for name, number in versions().items())
        body = yaml.safe_dump(json.loads(json.dumps(self.resolved())), sort_keys=False, allow_unicode=True)
        write_file(self.output_dir / "recipe.yaml", (head + body).encode())

    def _begin(self, step: str) -> None:
        (self.output_dir / step).mkdir(parents=True, exist_ok=True)
        self._write_json(step, "started.json", {"recipe": self._part(step), "versions": versions()})

    def _finish(self, step: str, facts: dict[str, Any]) -> None:
        self._write_json(step, "complete.json", {"recipe": self._part(step), "versions": versions(), **facts})

    def _write_json(self, step: str, name: str, content: dict[str, Any]) -> None:
        write_file(self.output_dir / step / name, (json.dumps(content, indent=1) + "\n").encode())

    # Processes

    def _on_main(self, work: Any) -> None:
        """Do `work` on the main process, while the others wait."""
        if self.processes.is_main_process:
            work()
        self.processes.wait_for_everyone()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.processes.is_main_process:
            yield
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.output_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RecipeError(
                f"another run is writing to {self.output_dir}: wait for it, or give this recipe another output_dir"
            ) from error
        try:
            yield
        finally:
            lock.release()


def versions() -> dict[str, str]:
    """What a result depends on, beside the recipe."""
    return {**{name: version(name) for name in _VERSIONS_OF}, "python": platform.python_version()}


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if torch.accelerator.is_available():
        return "float32"
    return str(native_dtype()).removeprefix("torch.")


def _staging(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _replace_folder(folder: Path, write: Any) -> None:
    """Write `folder` so that it is there as a whole or not at all."""
    staging = _staging(folder)
    shutil.rmtree(staging, ignore_errors=True)
    os.makedirs(staging)
    write(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {before!r} and is {now!r}"
