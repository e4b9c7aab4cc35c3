"""`gradient_checkpointing` and `torch_compile` in every stage: the losses are those of plain training."""

import pytest

from tests.modeling_proclip import tiny
from tests.trainers import tiny_llm
from tests.trainers.tiny_training import inheritance_trainer, tiny_model, tuning_trainer
from trainers.caption_contrastive.masked_next_token import MaskedNextTokenConfig, MaskedNextTokenTrainer


def masked_trainer(folder, **settings) -> MaskedNextTokenTrainer:
    args = MaskedNextTokenConfig(str(folder), **{**tiny_llm.SETTINGS, **settings})
    return MaskedNextTokenTrainer(tiny_llm.causal_llm(), args, tiny_llm.ROWS, processing_class=tiny.tokenizer())


TRAINERS = {
    "masked_next_token": masked_trainer,
    "caption_contrastive": tiny_llm.trainer,
    "inheritance": inheritance_trainer,
    "contrastive_tuning": tuning_trainer,
}
# "eager" traces the model as any other backend does, and takes no time to compile what was traced.
SETTINGS = {"checkpointing": {"gradient_checkpointing": True}, "compiling": {"torch_compile_backend": "eager"}}


def losses(trainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module", params=list(TRAINERS))
def plain(request, tmp_path_factory):
    trainer_of = TRAINERS[request.param]
    return trainer_of, losses(trainer_of(tmp_path_factory.mktemp("plain"), max_steps=3))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_losses_are_those_of_plain_training(tmp_path, plain, settings):
    trainer_of, expected = plain
    trainer = trainer_of(tmp_path, max_steps=3, **settings)
    assert losses(trainer) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3, "the losses say nothing if nothing is trained"
    if "torch_compile_backend" in settings:
        assert trainer.args.torch_compile


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_losses_with_gradient_caching(tmp_path, settings):
    """Every micro-batch goes through the compiled or checkpointed model twice; the same random state drops the same."""
    runs = [
        losses(tuning_trainer(tmp_path, tiny_model(dropout=0.2), max_steps=3, gradient_caching_batch_size=4, **each))
        for each in ({}, settings)
    ]
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
