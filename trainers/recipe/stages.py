"""What the stages of a recipe train: encoders, processors, and the trainers over their data. Nothing here is written."""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
)

from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
from trainers.caption_contrastive.masked_next_token import MaskedNextTokenTrainer
from trainers.caption_contrastive.trainer import CaptionContrastiveTrainer
from trainers.contrastive_tuning.trainer import ContrastiveTuningTrainer
from trainers.data.pairs import open_pairs
from trainers.inheritance.trainer import RepresentationInheritanceTrainer
from trainers.storage.model_files import loading_from
from trainers.text_store.on_the_fly import OnTheFlyStore
from trainers.text_store.store import TextEmbeddingStore

from .files import RecipeError
from .steps import MASKED_NEXT_TOKEN, RecipeSteps


def untrained_pair(steps: RecipeSteps) -> tuple[ProCLIPModel, ProCLIPProcessor]:
    """Image encoder, LLM and a fresh adapter; the LLM is that of the recipe, or what its first stages made of it."""
    settings = steps.recipe.model
    text, text_revision = steps.llm_of(None)
    with loading_from((settings.vision, settings.vision_revision), (text, text_revision)):
        model = ProCLIPModel.from_vision_text_pretrained(
            _vision(steps),
            text,
            vision_revision=settings.vision_revision,
            text_revision=text_revision,
            dtype={"vision_config": torch.float32, "text_config": getattr(torch, steps.precision)},
            attn_implementation=settings.attn_implementation,
            **settings.config,
        )
        return model, _processor(steps, text, text_revision)


def teacher(steps: RecipeSteps) -> tuple[PreTrainedModel, Any]:
    """The CLIP or SigLIP whose text encoder teaches stage 1, and its tokenizer."""
    name, revision = steps.recipe.model.place_of("teacher")
    with loading_from((name, revision)):
        model = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(name, revision=revision)


def llm_trainer(steps: RecipeSteps, stage: str) -> MaskedNextTokenTrainer | CaptionContrastiveTrainer:
    """The trainer of a stage that tunes the LLM. RecipeError if masked tokens are to be predicted by an LLM without its language-modelling head."""
    args, (text, revision) = steps.new_arguments(stage), steps.llm_of(stage)
    rows, held_out = _rows(steps, stage, images=False), _held_out(steps, stage, images=False)
    loading: dict[str, Any] = {
        "revision": revision,
        "dtype": getattr(torch, steps.precision),
        "attn_implementation": steps.recipe.model.attn_implementation,
    }
    if stage == MASKED_NEXT_TOKEN:
        with loading_from((text, revision)):
            model, info = AutoModelForCausalLM.from_pretrained(text, output_loading_info=True, **loading)
            tokenizer = AutoTokenizer.from_pretrained(text, revision=revision)
        if info["missing_keys"]:
            raise RecipeError(
                f"stages.{stage}: {text} has no {min(info['missing_keys'])}: masked tokens are predicted by an LLM with its language-modelling "
                "head. Take the causal LM itself, not its base model"
            )
        return MaskedNextTokenTrainer(model, args, rows, held_out, processing_class=tokenizer)
    plain_texts = steps.recipe.data.plain_texts
    with loading_from((text, revision)):
        llm, processor = AutoModel.from_pretrained(text, **loading), _processor(steps, text, revision)
    return CaptionContrastiveTrainer(
        llm,
        args,
        rows,
        held_out,
        processing_class=processor,
        plain_text_dataset=plain_texts and open_pairs(plain_texts, steps.recipe.seed, images=False),
    )


def load_pair(steps: RecipeSteps, stage: str) -> tuple[ProCLIPModel, ProCLIPProcessor]:
    """The pair that stage 1 or stage 2 starts from, with the LLM if that embeds texts on the fly."""
    source = steps.output_dir / steps.predecessor(stage) / "model"
    loading: dict[str, Any] = {"load_text_model": False}
    if steps.samples("llm"):
        loading = {"dtype": {"vision_config": torch.float32, "text_config": getattr(torch, steps.precision)}}
    model = ProCLIPModel.from_pretrained(source, attn_implementation=steps.recipe.model.attn_implementation, **loading)
    return model, ProCLIPProcessor.from_pretrained(source)


def alignment_trainer(steps: RecipeSteps, stage: str, model: ProCLIPModel, processor: ProCLIPProcessor) -> Trainer:
    """The trainer of stage 1 or stage 2."""
    args, images = steps.new_arguments(stage), stage == "contrastive_tuning"
    rows, held_out = _rows(steps, stage, images=images), _held_out(steps, stage, images=images)
    text_store: Any = TextEmbeddingStore(steps.store_path("llm"))
    if steps.samples("llm"):
        model.text_model.to(steps.processes.device)
        text_store = OnTheFlyStore(text_store, model, processor)
        model.text_model = None  # the store has it
    if images:
        return ContrastiveTuningTrainer(model, args, rows, held_out, text_store=text_store, processing_class=processor)
    teacher_store = TextEmbeddingStore(steps.store_path("teacher"))
    return RepresentationInheritanceTrainer(
        model, args, rows, held_out, text_store=text_store, teacher_store=teacher_store
    )


def _processor(steps: RecipeSteps, text: str, revision: str) -> ProCLIPProcessor:
    settings = steps.recipe.model
    image_processor, image_processor_revision = settings.place_of("image_processor")
    return ProCLIPProcessor(
        AutoImageProcessor.from_pretrained(image_processor, revision=image_processor_revision),
        AutoTokenizer.from_pretrained(text, revision=revision),
        settings.prompt_template,
        settings.instruction,
        settings.max_length,
    )


def _vision(steps: RecipeSteps) -> str | ProCLIPModel:
    """The model whose image encoder is taken: its name, or a ProCLIP checkpoint, loaded without its LLM."""
    settings = steps.recipe.model
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


def _rows(steps: RecipeSteps, stage: str, *, images: bool) -> Dataset:
    return open_pairs(steps.data_of(stage), steps.recipe.seed, images=images)


def _held_out(steps: RecipeSteps, stage: str, *, images: bool) -> Dataset | None:
    source = steps.recipe.data.eval
    if source is None or steps.arguments[stage].eval_strategy == "no":
        return None
    return open_pairs(source, steps.recipe.seed, images=images)
