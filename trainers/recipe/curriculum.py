"""Run a recipe: tune the LLM if asked, embed the texts, then train stage after stage, each from the previous one's result.

The output directory of a recipe:

    recipe.yaml                 the recipe with all defaults filled in; `proclip train` runs it
    commits.json                the commits of repositories on the Hub at the first run
    text-stores/{llm,teacher}/  unless the recipe puts them elsewhere
    preparation/model/          the untrained pair: image encoder, fresh adapter, processor
    <stage>/checkpoints/        the Trainer's
    <stage>/model/              the stage's result: a lean checkpoint with its processor, or the tuned LLM
    <stage>/adapter/            the LoRA by itself, if the stage tunes the LLM
    <step>/started.json         what decides the step's result: part of the recipe, hashes of data and models, versions
    <step>/complete.json        the same with hashes of the result, steps and the last log; written last, so it marks a finished step
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, Trainer, set_seed

from hub_cards import model_card
from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from trainers.base.checkpoints import CheckpointError
from trainers.data.pairs import iter_texts
from trainers.data.text_files import TextSource
from trainers.display.training import training_table
from trainers.storage.files import write_file
from trainers.storage.folders import partial_folder, put_folder_in_place, replacing_folder
from trainers.storage.locks import only_writer
from trainers.storage.versions import installed_versions
from trainers.text_store.store import TextEmbeddingStore

from .files import RecipeError
from .inputs import Json, describe_data, find_commits, hash_together, with_commits
from .progress import COMMITS, RecipeProgress, read_record
from .schema import in_terms_of_recipes
from .stages import alignment_trainer, llm_trainer, load_pair, teacher, untrained_pair
from .steps import LLM_STAGES, ON_THE_FLY_TEXTS, PREPARATION


logger = logging.getLogger(__name__)

_VERSIONS_OF = ("proclip-transformers", "torch", "transformers", "accelerate", "datasets")


class Curriculum(RecipeProgress):
    """Runs a recipe, on one or several processes (`accelerate launch`). RecipeError if a stage's trainer refuses its settings."""

    def run(self, stage: str | None = None) -> Path:
        """Run or resume the stages, or with `stage` that one only, and return the folder of the last stage's model.

        Raises:
            RecipeError: If another run has the output directory, a step was run with another recipe, or the predecessor of `stage` is not
                finished.
        """
        if stage is not None and stage not in self.recipe.stages:
            raise RecipeError(f"this recipe has no stage {stage!r}, only {', '.join(self.recipe.stages)}")
        names = list(self.recipe.stages) if stage is None else [stage]
        with self._locked():
            self._on_main(self._find_commits)
            self.recipe = with_commits(self.as_written, self.commits())
            self.check_recipe()
            hash_together(self.files(), self.processes)
            for step in (PREPARATION, *self.recipe.stages):
                self.state_of(step)
            if stage is not None:
                self._check_predecessors(stage)
            self._check_devices()
            self._on_main(self._write_resolved)
            for name in names:
                if name not in LLM_STAGES:
                    self._prepare()
                if self.state_of(name) != "finished":
                    self._run_stage(name)
        return self.output_dir / names[-1] / "model"

    def _check_predecessors(self, stage: str) -> None:
        order = list(self.recipe.stages)
        for before in order[: order.index(stage)]:
            if self.state_of(before) != "finished":
                raise RecipeError(
                    f"stage {stage} starts from the result of {before}, which is not finished: run --stage {before} first, or all stages by "
                    "leaving --stage out"
                )

    def _check_devices(self) -> None:
        """Refuse one process with several GPUs: Trainer would give each of them a whole batch, and the batch would not be the recipe's."""
        num_gpus = max(arguments.n_gpu for arguments in self.arguments.values())
        if num_gpus > 1:
            raise RecipeError(
                f"one process sees {num_gpus} GPUs: start one for each, by `accelerate launch -m trainers.cli train ...`, or show it one only, by "
                "CUDA_VISIBLE_DEVICES=0"
            )

    def _prepare(self) -> None:
        """Build the text stores, and save the untrained pair."""
        folder, stores = self.output_dir / PREPARATION, self._stores()
        finished = self.state_of(PREPARATION) == "finished"
        if finished and read_record(folder / "complete.json").get("stores", stores) == stores:
            return
        self._say("preparation: embedding the captions, pairing the encoders")
        if not finished:
            self._on_main(lambda: self._begin(PREPARATION))
        started = time.perf_counter()
        set_seed(self.recipe.seed)
        model, processor = untrained_pair(self)
        self._build_store("llm", model, processor)
        if self.needs_store("teacher"):
            self._build_store("teacher", *teacher(self))

        def save() -> None:
            with replacing_folder(folder / "model") as partial:
                model.save_pretrained(partial, lean=True)
                processor.save_pretrained(partial)

        if not finished:
            self._on_main(save)
        facts = {"stores": stores, "seconds": round(time.perf_counter() - started, 1)}
        self._on_main(lambda: self._finish(PREPARATION, facts))

    def _stores(self) -> Json:
        """Where the text stores are, and what they hold besides the training texts; both may change after the stores were built."""
        held_out, stores = self.recipe.data.eval, self.recipe.text_stores
        return {
            "llm": stores.llm.path,
            "teacher": stores.teacher.path,
            "data.eval": None if held_out is None else describe_data(held_out, images=False),
        }

    def _captions(self, which: str) -> Iterator[str]:
        """The texts of a store."""
        reader = "teacher_text" if which == "teacher" else "text"
        for field in self.text_sources(which):
            texts = iter_texts(getattr(self.recipe.data, field), reader)
            yield from islice(texts, ON_THE_FLY_TEXTS) if self.samples(which) and field != "eval" else texts

    def _build_store(self, which: str, model: torch.nn.Module, processor: Any) -> None:
        """Every process embeds its share of the texts."""
        TextEmbeddingStore.build(
            TextSource(f"data of {which}", lambda: self._captions(which), self.expected_texts(which)),
            model.to(self.processes.device),
            processor,
            self.store_path(which),
            token_budget=self.recipe.text_stores.token_budget,
            dtype=getattr(self.recipe.text_stores, which).dtype,
            progress=self.processes.is_main_process,
            process_index=self.processes.process_index,
            num_processes=self.processes.num_processes,
        )
        model.to("cpu")
        self.processes.wait_for_everyone()

    def _run_stage(self, stage: str) -> None:
        self._on_main(lambda: self._begin(stage))
        train = self._tune_llm if stage in LLM_STAGES else self._align
        train(stage, time.perf_counter())

    def _tune_llm(self, stage: str, started: float) -> None:
        """Masked next-token prediction, or stage 0. `started` is the time of `time.perf_counter`."""
        folder = self.output_dir / stage
        trainer = llm_trainer(self, stage)
        self._train(stage, trainer)
        adapter = folder / "adapter"
        self._save(trainer, adapter)
        tuned = trainer.merge()

        def finish() -> None:
            with replacing_folder(folder / "model") as partial:
                tuned.save_pretrained(partial)
                # The LLM's own: the processor's has a template around every text.
                text, revision = self.llm_of(stage)
                AutoTokenizer.from_pretrained(text, revision=revision).save_pretrained(partial)
            put_folder_in_place(adapter)
            self._finish(stage, self._facts(trainer, started))

        self._on_main(finish)

    def _align(self, stage: str, started: float) -> None:
        """Stage 1 or stage 2."""
        folder = self.output_dir / stage
        model, processor = load_pair(self, stage)
        try:
            trainer = self._trainer(stage, model, processor)
        except (
            KeyError,
            ValueError,
        ) as error:  # KeyError: a caption that a text store of the recipe's own does not hold
            raise RecipeError(f"stages.{stage}: {in_terms_of_recipes(error)}") from error
        self._train(stage, trainer)
        self._save(trainer, folder / "model")

        def finish() -> None:
            partial = partial_folder(folder / "model")
            processor.save_pretrained(partial)
            model_card(partial, title=self.output_dir.name).save(partial / "README.md")
            put_folder_in_place(folder / "model")
            self._finish(stage, self._facts(trainer, started))

        self._on_main(finish)

    def _save(self, trainer: Trainer, folder: Path) -> None:
        """Write the model of `trainer`, without the pickle beside it, to the [`partial_folder`] of `folder`."""
        partial = partial_folder(folder)
        self._on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        trainer.save_model(str(partial))  # on all processes: under FSDP each holds a part
        self._on_main(lambda: (partial / "training_args.bin").unlink(missing_ok=True))

    def _facts(self, trainer: Trainer, started: float) -> dict[str, Any]:
        history = trainer.state.log_history
        return {
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - started, 1),  # since it was last resumed
            "last_log": next((log for log in reversed(history) if "loss" in log), {}),
            "last_evaluation": next((log for log in reversed(history) if "eval_loss" in log), {}),
            "arguments": trainer.args.to_dict(),
        }

    def _trainer(self, stage: str, model: ProCLIPModel, processor: ProCLIPProcessor) -> Trainer:
        return alignment_trainer(self, stage, model, processor)

    # Files

    def _write_resolved(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        head = "# The recipe with all defaults filled in, as it was run.\n"
        head += "".join(f"# {name} {number}\n" for name, number in versions().items())
        body = yaml.safe_dump(json.loads(json.dumps(self.resolved())), sort_keys=False, allow_unicode=True)
        write_file(self.output_dir / "recipe.yaml", (head + body).encode())

    def _find_commits(self) -> None:
        """Record the current commits of repositories on the Hub, unless an earlier release began this run without recording them."""
        begun = any(self.output_dir.glob("*/started.json"))
        if begun and not (self.output_dir / COMMITS).is_file():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._write_json(COMMITS, find_commits(self.as_written, self.commits()))

    def _begin(self, step: str) -> None:
        (self.output_dir / step).mkdir(parents=True, exist_ok=True)
        before = read_record(self.output_dir / step / "started.json").get("versions", versions())
        if before != versions():
            logger.warning(
                "%s was begun with %s and is resumed with %s: the last bits of its result can differ from an uninterrupted run",
                self.output_dir / step,
                ", ".join(map(" ".join, before.items())),
                ", ".join(map(" ".join, versions().items())),
            )
        record = {"recipe": self._part(step), "inputs": self.inputs_of(step), "versions": versions()}
        self._write_json(f"{step}/started.json", record)

    def _finish(self, step: str, facts: Json) -> None:
        # The inputs are those at the beginning: if a file has changed since, the next run says so.
        begun = read_record(self.output_dir / step / "started.json")
        record = {**begun, "versions": versions(), "result": self.result_of(step), **facts}
        self._write_json(f"{step}/complete.json", record)

    def _write_json(self, name: str, content: Json) -> None:
        write_file(self.output_dir / name, (json.dumps(content, indent=1) + "\n").encode())

    # Processes

    def _say(self, line: str) -> None:
        """Print what begins now."""
        if self.processes.is_main_process:
            print(line, flush=True)

    def _train(self, stage: str, trainer: Trainer) -> None:
        checkpoint, rows = self.checkpoint_of(stage), self.recipe.stages[stage].global_batch_size
        resumed = "" if checkpoint is None else f", resumed from {Path(checkpoint).name}"
        self._say(f"{stage}: training on batches of {rows:,} rows{resumed}")
        try:
            with training_table(trainer):
                trainer.train(resume_from_checkpoint=checkpoint is not None)
        except CheckpointError as error:
            raise RecipeError(f"{error}. To run the stage anew, delete {self.output_dir / stage}") from error

    def _on_main(self, work: Any) -> None:
        """Do `work` on the main process while the others wait."""
        if self.processes.is_main_process:
            work()
        self.processes.wait_for_everyone()

    def _locked(self) -> AbstractContextManager:
        if not self.processes.is_main_process:
            return nullcontext()
        refusal = f"another run is writing to {self.output_dir}: wait for it, or give this recipe another output_dir"
        return only_writer(self.output_dir, refusal, error=RecipeError)


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    return installed_versions(_VERSIONS_OF)
