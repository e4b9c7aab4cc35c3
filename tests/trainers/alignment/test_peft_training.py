"""Stage 2 with PEFT adapters on the image encoder: what moves, what is saved, and that it goes on where it was."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from modeling_proclip import ProCLIPModel
from tests.trainers.tiny_training import copy_state, inheritance_trainer, picture_rows, tiny_model, tuning_trainer
from trainers.alignment.peft_model import ProCLIPPeftModel


VISION = r"vision_model\..*\.(q_proj|v_proj|fc1)"


def adapted(targets: str = VISION, **settings) -> ProCLIPPeftModel:
    torch.manual_seed(1)
    base = tiny_model(load_text_model=True, adapter_input_norm="standardize", **settings)
    return ProCLIPPeftModel(base, LoraConfig(r=2, target_modules=targets, modules_to_save=["visual_projection"]))


@torch.no_grad()
def embed(model) -> torch.Tensor:
    model.eval()
    pixels = torch.stack([row["pixel_values"] for row in picture_rows(6)])
    return model(pixel_values=pixels, llm_embeds=torch.ones(6, 12)).logits_per_image


@pytest.mark.parametrize("settings", [{}, {"gradient_caching_batch_size": 2}])
def test_adapters_move_and_the_towers_do_not(tmp_path, settings):
    model = adapted()
    before = copy_state(model)
    trainer = tuning_trainer(tmp_path, model, max_steps=4, **settings)
    trainer.train()
    moved = {name for name, tensor in copy_state(model).items() if not torch.equal(before[name], tensor)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {f"base_model.model.text_adapter.modules_to_save.default.input_{name}" for name in ("mean", "std")}
    assert moved == trained | statistics
    kinds = (
        "lora_A.default",
        "lora_B.default",
        "text_adapter.modules_to_save",
        "visual_projection.modules_to_save",
        "logit_scale",
    )
    assert all(any(kind in name for name in moved) for kind in kinds)
    assert all(any(kind in name for kind in kinds) for name in moved)
    assert trainer.ema is not None and model.text_model is not None


def test_the_teacher_follows_the_adapted_image_encoder(tmp_path):
    """With decay 0 the EMA teacher is the student after every step."""
    model = adapted()
    trainer = tuning_trainer(tmp_path, model, max_steps=3, ema_decay=0.0)
    trainer.train()
    pixels = torch.stack([row["pixel_values"] for row in picture_rows(4)])
    with torch.no_grad():
        student = model.eval()(pixel_values=pixels).image_embeds
    torch.testing.assert_close(trainer.ema.embed(pixel_values=pixels), student)
    frozen = tuning_trainer(tmp_path, adapted(), max_steps=3, ema_decay=1.0)
    start = frozen.ema.embed(pixel_values=pixels)
    frozen.train()
    torch.testing.assert_close(frozen.ema.embed(pixel_values=pixels), start)
    assert (student - start).abs().max() > 1e-4


def test_checkpoints_hold_the_adapters_and_resume_to_the_same_bits(tmp_path):
    whole = tuning_trainer(tmp_path / "whole", adapted(), max_steps=4)
    whole.train()
    tuning_trainer(tmp_path / "run", adapted(), max_steps=4, save_strategy="steps", save_steps=2).train()
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "kept")
    resumed = tuning_trainer(tmp_path / "run", adapted(), max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in copy_state(whole.model).items():
        assert torch.equal(tensor, copy_state(resumed.model)[name]), name
    saved = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.logit_scale"], whole.model.logit_scale)
    assert not (tmp_path / "kept" / "model.safetensors").exists()
    (stage,) = json.loads((tmp_path / "kept" / "training.json").read_text())
    assert stage["stage"] == "contrastive tuning" and stage["steps"] == 4


def test_what_was_trained_loads_on_the_base(tmp_path):
    model = adapted()
    tiny_model(load_text_model=True, adapter_input_norm="standardize").save_pretrained(tmp_path / "base")
    trainer = tuning_trainer(tmp_path / "run", model, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected = embed(model)
    again = PeftModel.from_pretrained(ProCLIPModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(embed(again), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        embed(ProCLIPModel.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4
    )


def test_adapters_that_would_be_lost_or_idle_are_refused(tmp_path):
    config = LoraConfig(target_modules=VISION)
    with pytest.raises(ValueError, match="lose the logit scale .*ProCLIPPeftModel"):
        tuning_trainer(tmp_path, get_peft_model(tiny_model(load_text_model=True), config))
    with pytest.raises(ValueError, match="text_model.* text store"):
        tuning_trainer(tmp_path, adapted(r"text_model\..*\.q_proj"))
    with pytest.raises(ValueError, match="freeze_vision"):
        tuning_trainer(tmp_path, adapted(), method="lit")
    with pytest.raises(ValueError, match="stage 1 trains the text adapter alone"):
        inheritance_trainer(tmp_path, adapted())


def test_the_trainer_says_who_publishes_adapters(tmp_path):
    trainer = tuning_trainer(tmp_path, adapted(), max_steps=1)
    with pytest.raises(ValueError, match="trainer.model.push_to_hub"):
        trainer.push_to_hub()
