"""The planned memory against what PyTorch's allocator held at its peak in two steps of training on the CPU."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from tests.trainers.tiny_recipe import settings, write_parts, write_recipe
from trainers import ContrastiveTuningConfig, ContrastiveTuningTrainer
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.memory import memory_of, plan_memory
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


def model() -> ProCLIPModel:
    text = {"model_type": "llama", "hidden_size": LLM_SIZE, "num_hidden_layers": 1, "vocab_size": 8}
    config = ProCLIPConfig(vision_config=VISION, text_config=text, projection_dim=64, dtype="float32")
    return ProCLIPModel(config, load_text_model=False)


class Rows:
    def __len__(self) -> int:
        return 2 * ROWS

    def __getitem__(self, index: int) -> dict:
        return {"text": str(index), "pixel_values": torch.zeros(3, SIZE, SIZE)}


class Store:
    def lookup(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), LLM_SIZE)


def num_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def measured(arguments: ContrastiveTuningConfig) -> int:
    trainer = ContrastiveTuningTrainer(model(), arguments, Rows(), text_store=Store())
    held = num_bytes(trainer.model) + (0 if trainer.ema is None else num_bytes(trainer.ema.averaged))
    gc.collect()  # what earlier tests left would be freed while this one is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    peak = held
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "options", [{}, {"method": "llm2clip"}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str
)
def test_the_plan_is_within_15_percent_of_what_is_measured(tmp_path, options):
    arguments = ContrastiveTuningConfig(
        str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=ROWS,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    precision = torch.bfloat16 if arguments.bf16 else torch.float32
    with FakeTensorMode():
        plan = memory_of(model(), arguments, ROWS, precision)
    assert plan.peak == pytest.approx(measured(arguments), rel=0.15)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_parts(folder)
    return write_recipe(folder / "recipe.yaml", settings(folder))


def test_what_a_recipe_takes(recipe):
    """Known before anything is loaded: the weights of the pair without its LLM, what is trained, twice that for AdamW."""
    curriculum = Curriculum(load_recipe(recipe))
    one, two = (plan_memory(curriculum, stage, 8) for stage in ("inheritance", "contrastive_tuning"))
    curriculum._prepare()
    pair = ProCLIPModel.from_pretrained(curriculum.output_dir / "preparation" / "model", load_text_model=False)
    image_encoder = num_bytes(pair.vision_model) + num_bytes(pair.visual_projection)
    assert one.weights == num_bytes(pair)
    assert one.gradients == sum(parameter.nbytes for parameter in pair.text_adapter.parameters())
    # Position ids are a buffer of the image encoder, which the teacher does not average.
    assert two.weights == pytest.approx(num_bytes(pair) + image_encoder, rel=0.01)
    assert two.gradients > one.gradients and two.activations > one.activations
    assert one.optimizer == 2 * one.gradients and two.optimizer == 2 * two.gradients


def test_checkpointing_and_compiling_are_recipe_keys(recipe):
    keys = ["stages.contrastive_tuning.gradient_checkpointing=true", "stages.contrastive_tuning.torch_compile=true"]
    arguments = Curriculum(load_recipe(recipe, keys)).arguments
    tuning, inheritance = arguments["contrastive_tuning"], arguments["inheritance"]
    assert tuning.gradient_checkpointing and tuning.torch_compile
    assert not (inheritance.gradient_checkpointing or inheritance.torch_compile)


def test_what_cannot_be_planned(recipe):
    curriculum = Curriculum(load_recipe(recipe, [f"model.text={recipe.parent / 'nothing'}"]))
    assert plan_memory(curriculum, "inheritance", 8) is None
