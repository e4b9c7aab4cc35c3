"""Training in bfloat16 with float32 weights: what is loaded in half precision, how far it is from float32, and that small steps count."""

import pytest
import torch

from modeling_proclip import ProCLIPModel
from tests.trainers.alignment.test_peft_training import adapted
from tests.trainers.tiny_training import (
    assert_same_bits,
    copy_state,
    inheritance_trainer,
    tiny_model,
    training_state,
    tuning_trainer,
)


STAGES = pytest.mark.parametrize("trainer_of", [inheritance_trainer, tuning_trainer])


def half_model() -> ProCLIPModel:
    return tiny_model(adapter_input_norm="standardize").to(torch.bfloat16)


def trained(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@STAGES
def test_what_was_loaded_in_half_precision_trains_as_its_float32_copy(tmp_path, caplog, trainer_of):
    half = trainer_of(tmp_path / "half", half_model(), max_steps=3)
    assert "were torch.bfloat16: they are converted to float32" in caplog.text
    caplog.clear()
    whole = trainer_of(tmp_path / "whole", half_model().float(), max_steps=3)
    assert "converted" not in caplog.text
    half.train(), whole.train()
    assert losses(half) == losses(whole)
    expected = training_state(whole)
    # What stage 1 freezes, the image encoder, stays as it was loaded.
    assert_same_bits({name: value.to(expected[name].dtype) for name, value in training_state(half).items()}, expected)
    half.save_model(str(tmp_path / "saved"))
    loaded = ProCLIPModel.from_pretrained(tmp_path / "saved", load_text_model=False)
    assert {loaded.get_parameter(name).dtype for name in trained(half)} == {torch.float32}


@STAGES
@pytest.mark.parametrize("cached", [None, 4])
def test_bfloat16_follows_float32(tmp_path, trainer_of, cached):
    """12 steps at a learning rate of 1e-3: losses within 2 %, weights within a quarter of the way that they went."""
    settings = {"max_steps": 12, "learning_rate": 1e-3, "gradient_caching_batch_size": cached}
    runs = [trainer_of(tmp_path, tiny_model(), bf16=bf16, **settings) for bf16 in (False, True)]
    start = trained(runs[0])
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0.02)
    ends = [trained(run) for run in runs]
    way = sum((ends[0][name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((ends[1][name] - ends[0][name]).square().sum() for name in start).sqrt()
    assert 0 < apart < way / 4


@STAGES
def test_steps_that_bfloat16_would_round_away_count(tmp_path, trainer_of):
    """At a learning rate of 1e-6 no weight but the smallest would change in bfloat16. They all move, and add up over the steps."""
    trainer = trainer_of(tmp_path, half_model(), bf16=True, learning_rate=1e-6, weight_decay=0.0, max_steps=8)
    start = trained(trainer)
    trainer.train()
    end = trained(trainer)
    moved = torch.cat([(end[name] - start[name]).abs().flatten() for name in start])
    assert (moved > 0).float().mean() > 0.9 and moved.max() > 3e-6
    rounded_away = torch.cat([(end[name].bfloat16() == start[name].bfloat16()).flatten() for name in start])
    assert rounded_away.float().mean() > 0.8


def test_adapters_on_an_image_encoder_in_half_precision(tmp_path):
    """The adapters are trained in float32, the image encoder below them stays as it was loaded."""
    model = adapted().to(torch.bfloat16)
    before = copy_state(model)
    trainer = tuning_trainer(tmp_path, model, bf16=True, max_steps=2)
    trainer.train()
    assert {p.dtype for p in trained(trainer).values()} == {torch.float32}
    base = {name: value for name, value in copy_state(model).items() if "vision_model" in name and "lora" not in name}
    assert_same_bits(base, {name: before[name] for name in base})
