"""The planned memory against what PyTorch's allocator held at its peak in two steps of training on the CPU."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, LlamaConfig

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from tests.modeling_proclip import tiny
from tests.trainers.tiny_recipe import settings, write_parts, write_recipe
from tests.trainers.tiny_training import COMMON
from trainers import (
    CaptionContrastiveConfig,
    CaptionContrastiveTrainer,
    ContrastiveTuningConfig,
    ContrastiveTuningTrainer,
    RepresentationInheritanceConfig,
    RepresentationInheritanceTrainer,
)
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.memory import memory_of, memory_of_llm, plan_memory
from trainers.recipe.schema import load_recipe


ROWS, SIZE, LLM_SIZE = 32, 64, 64
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}


SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
EVA02 = {**VISION, "model_type": "proclip_eva_vision"}
LLM = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def model(vision: dict = VISION) -> ProCLIPModel:
    text = {"model_type": "llama", "hidden_size": LLM_SIZE, "num_hidden_layers": 1, "vocab_size": 8}
    config = ProCLIPConfig(vision_config=vision, text_config=text, projection_dim=64, dtype="float32")
    return ProCLIPModel(config, load_text_model=False)


class Rows:
    def __init__(self, images: bool = True):
        self.images = images

    def __len__(self) -> int:
        return 2 * ROWS

    def __getitem__(self, index: int) -> dict:
        return {"text": str(index)} | ({"pixel_values": torch.zeros(3, SIZE, SIZE)} if self.images else {})


class Store:
    def lookup(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), LLM_SIZE)


def num_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def measured(trainer) -> int:
    """Bytes that PyTorch's allocator holds at its peak, from before the first step; what the trainer has made by then counts."""
    held = num_bytes(trainer.model)
    if getattr(trainer, "ema", None) is not None:
        held += num_bytes(trainer.ema.averaged)
    gc.collect()  # what earlier tests left would be freed while this one is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    peak = held
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def common(folder, **options) -> dict:
    own = {"output_dir": str(folder), "per_device_train_batch_size": ROWS, "max_steps": 2}
    return {**COMMON, **own, **options}


def precision_of(arguments) -> torch.dtype:
    return torch.bfloat16 if arguments.bf16 else torch.float32


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "vision, options",
    [
        (VISION, {}),
        (VISION, CHECKPOINTED),
        (VISION, {"gradient_caching_batch_size": ROWS // 4}),
        (SIGLIP, {"gradient_caching_batch_size": ROWS // 4, **CHECKPOINTED, "bf16": True}),
        (EVA02, CHECKPOINTED),
    ],
    ids=str,
)
def test_stage_2_takes_what_is_planned(tmp_path, vision, options):
    arguments = ContrastiveTuningConfig(**common(tmp_path, **options))
    with torch.device("meta"):
        planned = model(vision)
    plan = memory_of(planned, arguments, precision_of(arguments))
    trainer = ContrastiveTuningTrainer(model(vision), arguments, Rows(), text_store=Store())
    assert plan.peak == pytest.approx(measured(trainer), rel=0.15)


@pytest.mark.parametrize("options", [{}, {"gradient_caching_batch_size": 512}], ids=str)
def test_stage_1_takes_what_is_planned(tmp_path, options):
    """2,048 rows of a small image encoder, so that weights alone are not all of it."""
    rows = [{"text": str(i)} for i in range(4096)]
    arguments = RepresentationInheritanceConfig(**common(tmp_path, per_device_train_batch_size=2048, **options))
    with torch.device("meta"):
        planned = model()
    plan = memory_of(planned, arguments, precision_of(arguments))
    trainer = RepresentationInheritanceTrainer(model(), arguments, rows, text_store=Store(), teacher_store=Store())
    assert plan.peak == pytest.approx(measured(trainer), rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**CHECKPOINTED, "bf16": True},
        {"lora_num_layers": 2, "gradient_caching_batch_size": 64, "micro_batch_tokens": 8 * 48},
    ],
    ids=str,
)
def test_stage_0_takes_what_is_planned(tmp_path, options):
    """Texts as long as `max_length` lets them be."""
    text = " ".join(["one word after another"] * 40)
    rows = [{"text": [f"{i} {text}", f"the {i} {text}"]} for i in range(2 * ROWS)]
    arguments = CaptionContrastiveConfig(**common(tmp_path, max_length=48, **options))
    tokenizer = tiny.tokenizer()
    config = LlamaConfig(**{**LLM, "vocab_size": len(tokenizer)})
    with torch.device("meta"):
        planned = AutoModel.from_config(config)
    plan = memory_of_llm(planned, arguments, 48, precision_of(arguments))
    trainer = CaptionContrastiveTrainer(AutoModel.from_config(config), arguments, rows, processing_class=tokenizer)
    assert plan.peak == pytest.approx(measured(trainer), rel=0.15)


DEVICES = 8


@pytest.mark.parametrize(
    "launch, weights, gradients, optimizer",
    [
        ({}, 1, 1 / 2, 1),  # DDP: twice
        ({"fsdp_plugin_args": {}}, DEVICES, DEVICES, DEVICES),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=1)}, 1, 1, DEVICES),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, 1, DEVICES, DEVICES),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, DEVICES, DEVICES, DEVICES),
    ],
    ids=["ddp", "fsdp", "zero-1", "zero-2", "zero-3"],
)
def test_what_a_launch_divides(tmp_path, monkeypatch, launch, weights, gradients, optimizer):
    arguments = ContrastiveTuningConfig(**common(tmp_path))

    def plan():
        with torch.device("meta"):
            planned = model()
        return memory_of(planned, arguments, torch.float32)

    alone = plan()
    monkeypatch.setattr(ContrastiveTuningConfig, "world_size", DEVICES)
    for name, value in launch.items():
        setattr(arguments, name, value)
    shared = plan()
    assert shared.weights == alone.weights // weights
    assert shared.gradients == alone.gradients // gradients
    assert shared.optimizer == alone.optimizer // optimizer
    assert alone.activations < shared.activations < 1.01 * alone.activations + 2**20, "the embeddings of all devices"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_parts(folder)
    return write_recipe(folder / "recipe.yaml", settings(folder))


def test_what_a_recipe_takes(recipe):
    """Known before anything is loaded: the weights of the pair without its LLM, what is trained, twice that for AdamW."""
    curriculum = Curriculum(load_recipe(recipe))
    one, two = (plan_memory(curriculum, stage) for stage in ("inheritance", "contrastive_tuning"))
    curriculum._prepare()
    pair = ProCLIPModel.from_pretrained(curriculum.output_dir / "preparation" / "model", load_text_model=False)
    image_encoder = num_bytes(pair.vision_model) + num_bytes(pair.visual_projection)
    assert one.weights == num_bytes(pair)
    assert one.gradients == sum(parameter.nbytes for parameter in pair.text_adapter.parameters())
    # Position ids are a buffer of the image encoder, which the teacher does not average.
    assert two.weights == pytest.approx(num_bytes(pair) + image_encoder, rel=0.01)
    assert two.gradients > one.gradients and two.activations > one.activations
    assert one.optimizer == 2 * one.gradients and two.optimizer == 2 * two.gradients


def test_what_embedding_on_the_fly_adds(recipe):
    stored, on_the_fly = (
        plan_memory(Curriculum(load_recipe(recipe, [f"text_stores.llm.on_the_fly={value}"])), "inheritance")
        for value in ("false", "true")
    )
    llm = AutoModel.from_pretrained(recipe.parent / "llm")
    assert on_the_fly.weights - stored.weights == sum(parameter.nbytes for parameter in llm.parameters())


def test_checkpointing_and_compiling_are_recipe_keys(recipe):
    keys = ["stages.contrastive_tuning.gradient_checkpointing=true", "stages.contrastive_tuning.torch_compile=true"]
    arguments = Curriculum(load_recipe(recipe, keys)).arguments
    tuning, inheritance = arguments["contrastive_tuning"], arguments["inheritance"]
    assert tuning.gradient_checkpointing and tuning.torch_compile
    assert not (inheritance.gradient_checkpointing or inheritance.torch_compile)


def test_what_cannot_be_planned(recipe):
    curriculum = Curriculum(load_recipe(recipe, [f"model.text={recipe.parent / 'nothing'}"]))
    assert plan_memory(curriculum, "inheritance") is None
