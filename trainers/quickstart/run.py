"""`proclip quickstart`: the whole of ProCLIP on real parts, with its baselines, in one run."""

import copy
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, Trainer, set_seed

from hub_cards import quickstart_card
from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.identity import module_sha256
from trainers.alignment.input_statistics import fit_input_statistics, set_anchors
from trainers.compute.dtypes import native_dtype
from trainers.contrastive_tuning.config import ContrastiveTuningConfig
from trainers.contrastive_tuning.trainer import ContrastiveTuningTrainer
from trainers.display.training import training_table
from trainers.inheritance.config import RepresentationInheritanceConfig
from trainers.inheritance.trainer import RepresentationInheritanceTrainer
from trainers.openmoji.images import LANGUAGES
from trainers.openmoji.task import SIZES, ImageDataset, make_task
from trainers.storage.files import write_file
from trainers.storage.folders import replacing_folder
from trainers.storage.locks import only_writer
from trainers.text_store.store import TextEmbeddingStore

from .evaluate import embed_images, rank_images, score
from .language_model import LANGUAGE_MODELS
from .report import print_table, write_plots


# Two residual blocks of the papers' four: a 135M-parameter LLM and 600 concepts do not need more. This LLM has had no
# caption-contrastive tuning, so its embeddings are standardised.
ADAPTER: dict[str, Any] = {"adapter_num_layers": 2, "adapter_expansion": 2, "adapter_input_norm": "standardize"}
INHERITANCE: dict[str, Any] = {"learning_rate": 1e-3, "per_device_train_batch_size": 256}
TUNING: dict[str, Any] = {"learning_rate": 1e-4, "per_device_train_batch_size": 128}
# LLM2CLIP and LiT start from a fresh adapter, which wants larger steps than an inherited one; the image encoder's stay the same.
FRESH_ADAPTER: dict[str, Any] = {"adapter_learning_rate": 1e-3}


def quickstart(output_dir: Path, size: str = "full", seed: int = 0, llm: str = "plain") -> dict[str, Any]:
    """Align an LLM with a small CLIP by ProCLIP and by its baselines, print the table and write everything to `output_dir`.

    Args:
        output_dir: Gets `proclip/` (checkpoint and card), `results.json` and three plots; and what a second run need not do again:
            `llm/`, `text-store/`, `clip-text-store/`.
        size: "full" or "small" (a smoke test of the same path).
        seed: Of images, captions, adapters and batches.
        llm: "plain", SmolLM2 as it was published, "tuned", SmolLM2 with the LoRA of stage 0 that comes with this package, or "gemma3", the
            multilingual Gemma 3 270M, under the Gemma Terms of Use.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If size or LLM are unknown, or another run is writing to `output_dir`.
        ImportError: If the packages with the images, names or the LLM are missing.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if llm not in LANGUAGE_MODELS:
        raise ValueError(f"llm must be one of {', '.join(LANGUAGE_MODELS)}, got {llm!r}")
    output_dir = output_dir.resolve()
    with only_writer(
        output_dir, f"another quickstart is writing to {output_dir}: wait for it, or choose another --output-dir"
    ):
        return Quickstart(output_dir, size, seed, llm).run()


class Quickstart:
    """One run; `run` reads top to bottom. Arguments as for [`quickstart`].

    Args:
        adapter: Fields of [`ProCLIPConfig`] for the text adapter.
    """

    def __init__(
        self, output_dir: Path, size: str, seed: int, llm: str = "plain", adapter: Mapping[str, Any] = ADAPTER
    ):
        self.output_dir, self.size_name, self.size, self.seed = output_dir, size, SIZES[size], seed
        self.llm_name, self.language_model, self.adapter = llm, LANGUAGE_MODELS[llm], adapter
        self.console = Console(highlight=False)
        self.seconds: dict[str, float] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}

    @contextmanager
    def step(self, key: str, title: str) -> Iterator[None]:
        self.console.print(f"[bold]{title}[/bold]")
        start = time.perf_counter()
        yield
        self.seconds[key] = round(time.perf_counter() - start, 1)
        self.console.print(f"  {self.seconds[key]:.0f} s", style="dim")

    def run(self) -> dict[str, Any]:
        with self.step("pictures", "Drawing the images"):
            self.draw()
        if self.language_model.weights.terms is not None:
            self.console.print(self.language_model.weights.terms, soft_wrap=True)
        with self.step("llm", f"Unpacking the LLM, {self.language_model.weights.title}"):
            self.pair_with_llm()
        with self.step("text_store", "Embedding every text once, by the LLM and by CLIP's own text encoder"):
            self.build_stores()

        pairs, texts = (f"{settings['per_device_train_batch_size']}" for settings in (TUNING, INHERITANCE))
        rows, rankings = [], {}
        with self.step("clip", "Scoring CLIP, the teacher"):
            images = embed_images(self.clip, self.test_pixels)
            rows.append(
                {"model": "clip", "budget": "the teacher", **score(self.task, images, self.teacher_store.lookup)}
            )
            rankings["CLIP"] = rank_images(self.task, images, self.teacher_store.lookup)
        for name, title in (("lit", "LiT"), ("llm2clip", "LLM2CLIP")):
            with self.step(name, f"Training the baseline {title}"):
                model = self.tune(self.untrained(), name, title, self.size.baseline_steps, **FRESH_ADAPTER)
            budget = f"{self.size.baseline_steps} × {pairs} pairs"
            rows.append({"model": name, "budget": budget, **score(self.task, *self.encode(model))})
        with self.step("proclip-stage1", "Training ProCLIP, stage 1: inherit from CLIP's text encoder, text only"):
            model = self.inherit(self.untrained())
        budget = f"{self.size.inheritance_steps} × {texts} texts"
        rows.append({"model": "proclip-stage1", "budget": budget, **score(self.task, *self.encode(model))})
        with self.step("proclip", "Training ProCLIP, stage 2: contrastive tuning with self-distillation"):
            model = self.tune(model, "proclip", "ProCLIP, stage 2", self.size.tuning_steps)
        encoded = self.encode(model)
        budget = f"+ {self.size.tuning_steps} × {pairs} pairs"
        rows.append({"model": "proclip", "budget": budget, **score(self.task, *encoded)})
        rankings["ProCLIP"] = rank_images(self.task, *encoded)

        results = {
            "rows": rows,
            "seconds": self.seconds,
            "seed": self.seed,
            "llm": self.llm_name,
            "size": self.size_name,
            "num_concepts": self.size.concepts,
            "num_seen": self.size.seen,
            "num_language_concepts": self.size.language_concepts,
            "num_retrieval_pictures": len(self.task.retrieval),
            "protocol": {
                "dtype": {"image": "float32", "text": str(self.llm.dtype).removeprefix("torch.")},
                "device": "cpu",
            },
        }
        with self.step("writing", "Writing checkpoint, card and plots"):
            self.write(model, results, rankings)
        print_table(self.console, results)
        self.console.print(
            f"Written to {self.output_dir}: proclip/ (checkpoint, card), results.json, retrieval.png, languages.png, loss_curves.png",
            soft_wrap=True,
        )
        return results

    def draw(self) -> None:
        self.task = make_task(self.size, self.seed)
        assets = files("trainers.quickstart") / "assets" / "emoji-clip"
        # Eager attention: the fused kernel's backward is twice as slow on sequences as short as 50 patches.
        self.clip = CLIPModel.from_pretrained(str(assets), dtype=torch.float32, attn_implementation="eager").eval()
        self.clip_processor = CLIPProcessor.from_pretrained(str(assets))
        self.alignment = ImageDataset(self.task, self.task.alignment, self.clip_processor.image_processor)
        self.test_pixels = ImageDataset(self.task, self.task.test, self.clip_processor.image_processor).pixel_values

    def pair_with_llm(self) -> None:
        self.llm_folder = self.language_model.prepare(self.output_dir, native_dtype())
        adapter = dict(self.adapter)
        if self.language_model.multilingual:
            adapter |= {
                "adapter_language_directions": len(LANGUAGES) - 1,
                "adapter_num_anchors": len(self.task.inheritance_texts),
            }
        set_seed(self.seed)
        self.pair = ProCLIPModel.from_vision_text_pretrained(
            copy.deepcopy(self.clip), self.llm_folder, attn_implementation="eager", **adapter
        )
        # The trainers, which have no LLM, compare it with the text store's.
        self.pair.config.text_model_sha256 = module_sha256(self.pair.text_model)
        tokenizer = AutoTokenizer.from_pretrained(self.llm_folder)
        self.processor = ProCLIPProcessor(
            self.clip_processor.image_processor, tokenizer, instruction=self.language_model.instruction, max_length=128
        )

    def build_stores(self, more_texts: Sequence[str] = ()) -> None:
        if self.language_model.multilingual:
            more_texts = [*more_texts, *chain.from_iterable(self.task.parallel_names.values())]
        texts = list(dict.fromkeys([*self.task.all_texts(), *more_texts]))
        store = self.output_dir / f"text-store{self.language_model.suffix}"
        self.text_store = TextEmbeddingStore.build(texts, self.pair, self.processor, store)
        self.teacher_store = TextEmbeddingStore.build(
            texts, self.clip, self.clip_processor, self.output_dir / "clip-text-store"
        )
        if self.language_model.multilingual:
            fit_input_statistics(self.pair, self.text_store, self.task.parallel_names)
            set_anchors(self.pair, self.text_store, self.task.inheritance_texts)
        elif self.pair.config.adapter_input_norm == "standardize":
            self.pair.text_adapter.set_input_statistics(*self.text_store.statistics())
        # From here on the LLM is not needed: what trains and scores reads its embeddings from the store.
        self.llm, self.pair.text_model = self.pair.text_model, None

    def untrained(self) -> ProCLIPModel:
        """CLIP's image encoder beside the same fresh adapter for every run."""
        return copy.deepcopy(self.pair)

    def training_arguments(self, name: str, steps: int) -> dict[str, Any]:
        return {
            "output_dir": str(self.output_dir / "training" / name),
            "max_steps": steps,
            "warmup_steps": steps // 20,
            "logging_steps": max(1, steps // 60),
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": native_dtype() == torch.bfloat16,
            "seed": self.seed,
        }

    def inherit(self, model: ProCLIPModel, **settings: Any) -> ProCLIPModel:
        arguments = RepresentationInheritanceConfig(
            **self.training_arguments("stage-1", self.size.inheritance_steps), **INHERITANCE, **settings
        )
        texts = [{"text": text} for text in self.task.inheritance_texts]
        trainer = RepresentationInheritanceTrainer(
            model, arguments, texts, text_store=self.text_store, teacher_store=self.teacher_store
        )
        return self.train(trainer, "ProCLIP, stage 1")

    def tune(self, model: ProCLIPModel, method: str, title: str, steps: int, **settings: Any) -> ProCLIPModel:
        arguments = ContrastiveTuningConfig(
            **self.training_arguments(method, steps), method=method, **TUNING, **settings
        )
        trainer = ContrastiveTuningTrainer(model, arguments, self.alignment, text_store=self.text_store)
        return self.train(trainer, title)

    def train(self, trainer: Trainer, title: str) -> ProCLIPModel:
        with training_table(trainer):
            trainer.train()
        self.curves[title] = [(log["step"], float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
        return trainer.model

    @torch.inference_mode()
    def embed_texts(self, model: ProCLIPModel, texts: list[str]) -> torch.Tensor:
        return model.eval().get_text_features(llm_embeds=self.text_store.lookup(texts)).pooler_output

    def encode(self, model: ProCLIPModel) -> tuple[torch.Tensor, Callable[[list[str]], torch.Tensor]]:
        """The test images' embeddings, and the function that embeds texts: what scoring and ranking take."""
        return embed_images(model, self.test_pixels), functools.partial(self.embed_texts, model)

    def write(self, model: ProCLIPModel, results: dict[str, Any], rankings: dict[str, list[list[int]]]) -> None:
        write_plots(self.output_dir, self.task, results, self.curves, rankings)
        model.text_model = self.llm
        with replacing_folder(self.output_dir / "proclip") as partial:
            model.save_pretrained(partial)
            self.processor.save_pretrained(partial)
            for _, notice in self.language_model.weights.notices:
                shutil.copy(self.output_dir / self.language_model.folder / Path(notice).name, partial)
            quickstart_card(results).save(partial / "README.md")
        shutil.rmtree(self.output_dir / "training", ignore_errors=True)
        write_file(self.output_dir / "results.json", (json.dumps(results, indent=2) + "\n").encode())
